"""Telemetry: the figures against float64, alike in every engine, and only when asked for."""

import weakref

import pytest
import torch
from torch import nn

from lion_lightning.optim import Lion, telemetry
from tests.reference.lion import Lion64


def params(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(300, 301), (301,), ()]
    return [nn.Parameter((torch.randn(shape, generator=generator) * 0.03).to(dtype)) for shape in shapes]


def set_gradients(tensors: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in tensors:
        grad = torch.randn(param.shape, generator=generator) * 1e-3
        param.grad = torch.where(torch.rand(param.shape, generator=generator) < 0.1, 0.0, grad).to(param.dtype)


def seen(param: torch.Tensor, share: float = 1 / 16) -> torch.Tensor:
    """The observed blocks of 256 elements: where multiples of the golden ratio fall below the share, 1/16 at most."""
    blocks = torch.arange(param.numel()) // 256
    return ((blocks.double() * (5**0.5 - 1) / 2) % 1 < share).view(param.shape)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_figures_are_those_of_float64(dtype: torch.dtype, fused: bool | None) -> None:
    tensors = params(dtype)
    optimizer = Lion(tensors, lr=1e-3, weight_decay=20.0, fused=fused, momentum_dtype=None)
    optimizer.telemetry_every = 1
    set_gradients(tensors, 1)
    optimizer.step()
    oracles, agreed, flipped, zero, near = [], 0, 0.0, 0, 0
    elements = sum(int(seen(param).sum()) for param in tensors)
    sampled = sum(param.numel() for param in tensors)
    for param in tensors:
        oracle = Lion64(param, 1e-3, 0.9, 0.99, 20.0)
        oracle.momentum = optimizer.state[param]["exp_avg"].double()
        first = oracle.momentum.sign()  # after one step, that of the first gradient
        oracles.append((oracle, first))
    set_gradients(tensors, 2)
    for param, (oracle, first) in zip(tensors, oracles, strict=True):
        near += int((oracle.weight.abs() > 0.9 / 20.0)[seen(param)].sum())
        agreed += int((oracle.momentum * param.grad > 0)[seen(param)].sum())
        update = oracle.step(param.grad).sign()
        zero += int((update == 0)[seen(param)].sum())
        flipped += int((update * first < 0).sum())
    optimizer.step()
    figures = {name: value.item() for name, value in optimizer.telemetry().items()}
    assert figures["lion/zero_update"] == pytest.approx(zero / elements, abs=1e-4)
    assert figures["lion/sign_agreement"] == pytest.approx(agreed / elements, abs=1e-4)
    assert figures["lion/near_bound"] == pytest.approx(near / elements, abs=2e-3)
    assert figures["lion/flip_rate"] == pytest.approx(flipped / sampled, abs=1e-3)
    momentum = torch.cat([oracle.momentum[seen(oracle.momentum)] for oracle, _ in oracles])
    assert figures["lion/momentum_rms"] == pytest.approx(momentum.square().mean().sqrt().item(), rel=1e-2)
    assert figures["lion/realised_decay"] == pytest.approx(1.0, abs=0.01)
    rms = tensors[0].detach().double().square().mean().sqrt()
    assert figures["lion/step_ratio_matrix"] == pytest.approx(1e-3 / rms.item(), rel=0.05)
    assert {"lion/step_ratio_vector", "lion/step_ratio_scalar"} <= figures.keys()
    assert figures["lion/nonfinite"] == 0
    assert figures["lion/unmoved"] < 0.01


@pytest.mark.parametrize("columns", [256, 768, 1024, 1280, 1792, 2560, 13_312])
def test_observed_blocks_are_spread_over_every_column_of_a_matrix(columns: int) -> None:
    rows = seen(torch.empty(200, columns)).float()
    assert telemetry.observed_count(rows.numel(), 1 << 28) == rows.sum()
    assert 0.06 < rows.mean() < 0.066
    assert 0.045 < rows.mean(0).min() <= rows.mean(0).max() < 0.08


def test_elements_are_counted_in_a_shorter_last_block() -> None:
    for count in (1, 255, 256, 257, 1300, 5121, 70_001):
        assert telemetry.observed_count(count, 1 << 28) == seen(torch.empty(count)).sum() > 0


@pytest.mark.parametrize("fused", [None, False])
def test_of_a_large_model_half_a_million_elements_are_observed(fused: bool | None) -> None:
    tensors = [nn.Parameter(torch.zeros(1 << 23)), nn.Parameter(torch.zeros(1 << 23)), nn.Parameter(torch.zeros(100))]
    share = 2**19 / sum(param.numel() for param in tensors)
    optimizer = Lion(tensors, lr=1e-3, fused=fused)
    optimizer.telemetry_every = 1
    for param in tensors:
        param.grad = torch.rand(param.shape, generator=torch.Generator().manual_seed(3)).sub_(0.3).relu_()
    optimizer.step()
    looked_at = [seen(param, share) for param in tensors]
    elements = sum(int(mask.sum()) for mask in looked_at)
    assert 2**19 * 0.99 < elements < 2**19 * 1.01
    zero = sum(int((param.grad == 0)[mask].sum()) for param, mask in zip(tensors, looked_at, strict=True))
    assert float(optimizer.telemetry()["lion/zero_update"]) == pytest.approx(zero / elements, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("momentum_dtype", [None, "int8"])
@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("cautious", [False, True])
def test_engines_see_the_same(dtype: torch.dtype, momentum_dtype: str | None, broken: bool, cautious: bool) -> None:
    """Of more blocks than are looked at together, with a last one that is shorter."""
    figures = []
    for fused in (None, False):
        generator = torch.Generator().manual_seed(0)
        sizes = (1_400_000, 5121, 257, 300)
        tensors = [nn.Parameter((torch.randn(n, generator=generator) * 0.03).to(dtype)) for n in sizes]
        optimizer = Lion(
            tensors, lr=1e-3, weight_decay=20.0, fused=fused, momentum_dtype=momentum_dtype, cautious=cautious
        )
        optimizer.telemetry_every = 1
        for step in range(2):
            set_gradients(tensors, step)
            assert tensors[0].grad is not None
            tensors[0].grad[:200] *= torch.inf if broken else 1.0
            optimizer.step()
        figures.append({name: value.item() for name, value in optimizer.telemetry().items()})
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)
    assert (figures[0]["lion/nonfinite"] > 100) == broken


@pytest.mark.parametrize("fused", [None, False])
def test_unmoved_and_nonfinite_are_seen(fused: bool | None) -> None:
    param = nn.Parameter(torch.ones(5000))
    optimizer = Lion([param], lr=1e-12, fused=fused)
    optimizer.telemetry_every = 1
    param.grad = torch.ones(5000)
    param.grad[7] = float("nan")
    optimizer.step()
    figures = optimizer.telemetry()
    assert figures["lion/unmoved"] == 1.0
    assert figures["lion/nonfinite"] == 1
    assert "lion/flip_rate" not in figures  # nothing to compare with yet
    param.grad = -torch.ones(5000) * 100
    optimizer.step()
    assert optimizer.telemetry()["lion/flip_rate"] > 0.99


def test_sampling_changes_no_weight_and_keeps_to_its_period() -> None:
    plain, watched = params(torch.bfloat16), params(torch.bfloat16)
    optimizer, other = (Lion(tensors, weight_bits=16, momentum_dtype="int8") for tensors in (plain, watched))
    other.telemetry_every = 3
    assert optimizer.telemetry() == {}
    seen = []
    for step in range(6):
        for lion, tensors in ((optimizer, plain), (other, watched)):
            set_gradients(tensors, step)
            lion.step()
        seen.append(other.telemetry()["lion/momentum_rms"].item())
    assert seen[0] == seen[1] == seen[2] != seen[3] == seen[4] == seen[5]
    assert all(torch.equal(left, right) for left, right in zip(plain, watched, strict=True))
    with pytest.raises(ValueError, match="telemetry_every=-1"):
        other.telemetry_every = -1


def test_a_sample_keeps_no_gradient_alive() -> None:
    tensors = params(torch.float32)
    optimizer = Lion(tensors)
    optimizer.telemetry_every = 1
    set_gradients(tensors, 1)
    gradients = [weakref.ref(param.grad) for param in tensors]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    assert optimizer.telemetry()
    assert [gradient() for gradient in gradients] == [None, None, None]
