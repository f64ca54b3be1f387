"""measures.c against float64, at every length around its vectors and for numbers near both ends of float32."""

import pytest
import torch

from lion_lightning.guard.norms import SMALL_ELEMENTS, SquareSum
from lion_lightning.optim.kernels import measures

LENGTHS = (0, 1, 15, 16, 17, 255, 256, 257, 10_000)


def exact(tensors):
    return float(sum(tensor.double().square().sum() for tensor in tensors))


@pytest.mark.parametrize("size", [1.0, 1e-18, 1e-25, 1e18, 1e25])
def test_the_square_sum_is_that_of_float64(size):
    dice = torch.Generator().manual_seed(1)
    tensors = [size * torch.randn(length + 1, generator=dice)[1:] for length in LENGTHS]  # at odd addresses
    assert measures.square_sum(tensors) == pytest.approx(exact(tensors), rel=1e-5)
    assert [measures.square_sum([tensor]) for tensor in tensors[:2]] == pytest.approx(
        [0.0, exact(tensors[1:2])], rel=1e-5
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 16, 256])
def test_one_bad_element_shows(bad, place):
    tensor = torch.ones(257)
    tensor[place] = bad
    assert measures.square_sum([torch.ones(5), tensor]) == pytest.approx(bad * bad, nan_ok=True)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.ones(4, 6), True),
        (torch.ones(4, 6, dtype=torch.bfloat16), True),
        (torch.ones(4, 6).t(), False),
        (torch.ones(4, 6, dtype=torch.float64), False),
        (torch.ones(4, 6, dtype=torch.int8), False),
        (torch.ones(4, 6, device="meta"), False),
    ],
    ids=lambda value: f"{value.dtype} {value.device}" if isinstance(value, torch.Tensor) else None,
)
def test_what_a_probe_takes(tensor, expected):
    plain = torch.ones(24)
    assert measures.Probe([(0, 24)]).aim(0, tensor, plain, 0.9, 1.0) == expected
    assert measures.Probe([(0, 24)]).aim(0, plain, tensor, 0.9, 1.0) == expected


@pytest.mark.parametrize("by", ["measures.c", "torch"])
@pytest.mark.parametrize("shapes", [[(3,)], [(SMALL_ELEMENTS,)], [(3, 5), (SMALL_ELEMENTS + 1,), (7,)]], ids=str)
def test_the_norm_of_the_guard_is_that_of_float64(monkeypatch, by, shapes):
    if by == "torch":
        monkeypatch.setattr(measures, "square_sum", lambda *_: None)
    grads = [torch.randn(shape, generator=torch.Generator().manual_seed(2)) for shape in shapes]
    assert float(SquareSum()(dict(enumerate(grads)))) == pytest.approx(exact(grads), rel=1e-5)


def test_sizes_are_looked_up_each_time_and_nothing_has_no_norm():
    squares = SquareSum()
    assert [float(squares({0: torch.ones(size)})) for size in (300, 100, 500)] == [300, 100, 500]
    assert float(squares({})) == 0


def test_what_is_no_float32_in_one_piece_is_left_to_torch():
    for other in (torch.ones(4, 6).t(), torch.ones(4, dtype=torch.bfloat16), torch.ones(4, device="meta")):
        assert measures.square_sum([torch.ones(4), other]) is None
