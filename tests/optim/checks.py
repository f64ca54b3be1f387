"""The checks that a Lion must pass, as functions of an optimizer factory, so that broken ones can be put to them."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.reference.lion import Lion64
from tests.reference.storage import kept_weight

Factory = Callable[[nn.Parameter, float, float], Optimizer]
"""(parameter, lr, weight decay) -> optimizer."""

STEPS = 1000
LR = 4e-5
ELEMENTS = 8192


def weights(dtype: torch.dtype) -> Tensor:
    """Like those of a linear layer: magnitudes from 0.02 to 0.08, both signs."""
    generator = torch.Generator().manual_seed(0)
    magnitude = torch.rand(ELEMENTS, generator=generator) * 0.06 + 0.02
    return (magnitude * torch.randint(0, 2, (ELEMENTS,), generator=generator).mul(2).sub(1)).to(dtype)


TOWARD = {"decay alone": 0.0, "inward": 1.0, "outward": -1.0}
"""Gradients in units of the weight's sign: the three drifts that `drifts` measures."""


@functools.cache
def exact_run(dtype: torch.dtype, weight_decay: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights with a third for each direction, the gradient of every step, and the weights after 1,000 exact steps."""
    start = weights(dtype).repeat(3)
    grad = start.sign() * torch.tensor(list(TOWARD.values()), dtype=dtype).repeat_interleave(ELEMENTS)
    oracle = Lion64(start, LR, 0.9, 0.99, weight_decay)
    for _ in range(STEPS):
        oracle.step(grad)
    return start, grad, oracle.weight


def drifts(factory: Factory, dtype: torch.dtype, weight_decay: float) -> dict[str, tuple[float, float]]:
    """Realised over exact drift after 1,000 steps, and its standard error, for each direction of the gradient.

    Args:
        factory: of the optimizer under test, which steps one parameter that has a third for each direction.
        dtype: of the parameter.
        weight_decay: decoupled.
    """
    start, grad, end = exact_run(dtype, weight_decay)
    param = nn.Parameter(start.clone())
    optimizer = factory(param, LR, weight_decay)
    for _ in range(STEPS):
        param.grad = grad.clone()
        optimizer.step()
    inward = start.double().sign()
    kept = kept_weight(param, optimizer.state[param].get("weight_remainder"))
    moved = ((kept - start.double()) * inward).view(3, ELEMENTS)
    exact = ((end - start.double()) * inward).view(3, ELEMENTS)
    error = (moved - exact).std(1) / ELEMENTS**0.5 / exact.mean(1).abs()
    ratio = moved.mean(1) / exact.mean(1)
    return dict(zip(TOWARD, zip(ratio.tolist(), error.tolist(), strict=True), strict=True))


def check_drift(factory: Factory, dtype: torch.dtype, weight_decay: float) -> None:
    """Decay alone, and the step with and against the decay, within 1 % of exact beyond four standard errors."""
    for name, (realised, error) in drifts(factory, dtype, weight_decay).items():
        assert abs(realised - 1.0) <= 0.01 + 4 * error, f"drift {realised:.4f} ± {error:.4f} of exact, {name}"
        assert error < 0.02, f"{error:.4f} is too uncertain to tell"


def check_directions(factory: Factory, dtype: torch.dtype, allowed: float = 1e-4) -> None:
    """Twelve steps with changing gradients end at the oracle's weight, to `allowed` on average (a step is 1e-3)."""
    start = weights(dtype)
    param = nn.Parameter(start.clone())
    optimizer = factory(param, 1e-3, 0.1)
    oracle = Lion64(start, 1e-3, 0.9, 0.99, 0.1)
    for step in range(12):
        grad = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(step)).to(dtype)
        param.grad = grad.clone()
        optimizer.step()
        oracle.step(grad)
    error = (kept_weight(param, optimizer.state[param].get("weight_remainder")) - oracle.weight).abs().mean()
    assert error < allowed, f"mean distance {error:.2e} after 12 steps of 1e-3"
