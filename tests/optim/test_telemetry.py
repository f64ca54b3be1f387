"""Telemetry: the figures against float64, alike in every engine, and only when asked for."""

import copy
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from lion_lightning.optim import Lion
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


def seen(param: torch.Tensor) -> torch.Tensor:
    """The observed elements: all of a small tensor, else 64 whole blocks at multiples of the golden ratio."""
    blocks = param.numel() // 256
    if blocks <= 64:
        return torch.ones_like(param, dtype=torch.bool)
    chosen = ((torch.arange(64).double() * (5**0.5 - 1) / 2) % 1 * blocks).long()
    return torch.isin(torch.arange(param.numel()) // 256, chosen).view(param.shape)


def share(masks: list[torch.Tensor]) -> float:
    """Share of true elements among the observed ones of each tensor, averaged over all elements."""
    shares = [float(mask[seen(mask)].double().mean()) * mask.numel() for mask in masks]
    return sum(shares) / sum(mask.numel() for mask in masks)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_figures_are_those_of_float64(dtype: torch.dtype, fused: bool | None) -> None:
    tensors = params(dtype)
    optimizer = Lion(tensors, lr=1e-3, weight_decay=20.0, fused=fused, momentum_dtype=None)
    optimizer.telemetry_every = 1
    set_gradients(tensors, 1)
    optimizer.step()
    oracles: list[Lion64] = []
    firsts = []
    for param in tensors:
        oracle = Lion64(param, 1e-3, 0.9, 0.99, 20.0)
        oracle.momentum = optimizer.state[param]["exp_avg"].double()
        firsts.append(oracle.momentum.sign())  # after one step, that of the first gradient
        oracles.append(oracle)
    set_gradients(tensors, 2)
    near = [oracle.weight.abs() > 0.9 / 20.0 for oracle in oracles]
    grads = [param.grad.double() for param in tensors if param.grad is not None]
    agreed = [oracle.momentum * grad > 0 for oracle, grad in zip(oracles, grads, strict=True)]
    updates = [oracle.step(grad).sign() for oracle, grad in zip(oracles, grads, strict=True)]
    optimizer.step()
    figures = {name: value.item() for name, value in optimizer.telemetry().items()}
    flipped = [update * first < 0 for update, first in zip(updates, firsts, strict=True)]
    assert figures["lion/zero_update"] == pytest.approx(share([update == 0 for update in updates]), abs=1e-4)
    assert figures["lion/sign_agreement"] == pytest.approx(share(agreed), abs=1e-4)
    assert figures["lion/near_bound"] == pytest.approx(share(near), abs=2e-3)
    assert figures["lion/flip_rate"] == pytest.approx(share(flipped), abs=1e-4)
    squares = [oracle.momentum.square()[seen(oracle.momentum)].mean() * oracle.momentum.numel() for oracle in oracles]
    rms = (sum(squares) / sum(param.numel() for param in tensors)) ** 0.5
    assert figures["lion/momentum_rms"] == pytest.approx(float(rms), rel=1e-2)
    assert figures["lion/realised_decay"] == pytest.approx(1.0, abs=0.01)
    rms = tensors[0].detach().double().square().mean().sqrt()
    assert figures["lion/step_ratio_matrix"] == pytest.approx(1e-3 / rms.item(), rel=0.05)
    assert {"lion/step_ratio_vector", "lion/step_ratio_scalar"} <= figures.keys()
    assert figures["lion/nonfinite"] == 0
    assert figures["lion/unmoved"] < 0.01


@pytest.mark.parametrize("columns", [256, 768, 1024, 1280, 13_312])
def test_observed_elements_are_spread_over_a_matrix(columns: int) -> None:
    """A share of zero gradients in some rows or columns alone is estimated within a twentieth."""
    param = nn.Parameter(torch.zeros(1000, columns))
    for dimension, size in ((0, 1000), (1, columns)):
        optimizer = Lion([param], lr=1e-3)
        optimizer.telemetry_every = 1
        param.grad = torch.ones(1000, columns)
        param.grad.narrow(dimension, 0, size // 2).zero_()
        optimizer.step()
        assert float(optimizer.telemetry()["lion/zero_update"]) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("fused", [None, False])
def test_tensors_count_by_their_elements(fused: bool | None) -> None:
    tensors = [nn.Parameter(torch.zeros(300_000)), nn.Parameter(torch.zeros(100_000)), nn.Parameter(torch.zeros(0))]
    optimizer = Lion(tensors, lr=1e-3, fused=fused)
    optimizer.telemetry_every = 1
    for param, value in zip(tensors, (0.0, 1.0, 1.0), strict=True):
        param.grad = torch.full_like(param, value)
    optimizer.step()
    assert float(optimizer.telemetry()["lion/zero_update"]) == pytest.approx(0.75)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("momentum_dtype", [None, "int8"])
@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("cautious", [False, True])
def test_engines_see_the_same(dtype: torch.dtype, momentum_dtype: str | None, broken: bool, cautious: bool) -> None:
    """Also of tensors whose last block is shorter, and of one that is not observed whole."""
    figures = []
    for fused in (None, False):
        generator = torch.Generator().manual_seed(0)
        sizes = (40_000, 5121, 257, 300)
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


@pytest.mark.parametrize("options", [{"maximize": True}, {"cautious": True}, {"momentum_dtype": "int8"}])
def test_the_direction_is_that_of_the_step(options: dict[str, Any]) -> None:
    """With the scale of a GradScaler, and against a second sample of gradients reversed at some elements."""
    param = nn.Parameter(torch.randn(4000, generator=torch.Generator().manual_seed(0)))
    optimizer = Lion([param], lr=1e-2, weight_decay=0.0, betas=(0.0, 0.5), **options)
    optimizer.telemetry_every = 1
    optimizer.grad_scale = torch.tensor(1024.0)
    gradient = torch.randn(4000, generator=torch.Generator().manual_seed(1)) * 1024
    for reverse in (0, 1200):
        before = param.detach().clone()
        param.grad = gradient.clone()
        param.grad[:reverse] *= -1
        optimizer.step()
        moved = param.detach() - before
        assert torch.equal(moved.sign(), param.grad.sign() * (1 if options.get("maximize") else -1))
    figures = optimizer.telemetry()
    assert float(figures["lion/flip_rate"]) == pytest.approx(0.3)
    assert float(figures["lion/sign_agreement"]) == pytest.approx(0.7, abs=0.01)
    assert figures["lion/unmoved"] == figures["lion/zero_update"] == 0


def test_a_step_that_found_inf_moves_nothing_and_counts_its_gradients() -> None:
    param = nn.Parameter(torch.ones(300))
    optimizer = Lion([param], lr=1e-2)
    optimizer.telemetry_every = 1
    param.grad = torch.full((300,), torch.inf)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert optimizer.telemetry() == {}, "the host knows that the step is skipped"
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    figures = optimizer.telemetry()
    assert figures["lion/nonfinite"] == 300
    assert figures["lion/unmoved"] == figures["lion/zero_update"] == 1


def test_a_copy_samples_as_often() -> None:
    optimizer = Lion([nn.Parameter(torch.ones(2))])
    optimizer.telemetry_every = 5
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.telemetry_every == 5
    optimizer.load_state_dict(Lion([nn.Parameter(torch.ones(2))]).state_dict())
    assert optimizer.telemetry_every == 5
