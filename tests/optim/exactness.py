"""One step held to float64, whatever the state was, and an optimizer held to what it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lion_lightning.optim import Lion
from tests.reference.storage import kept_momentum, kept_weight, momentum_spacing, weight_spacing


def kept(param: Tensor, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The float64 weight and momentum that a parameter and its state stand for."""
    exp_avg = state.get("exp_avg")
    momentum = torch.zeros_like(param, dtype=torch.float64)
    if exp_avg is not None:
        momentum = kept_momentum(exp_avg, state.get("exp_avg_scale"))
    return kept_weight(param, state.get("weight_remainder")).clone(), momentum.clone()


def assert_step_is_exact(
    optimizer: Lion,
    param: nn.Parameter,
    grad: Tensor,
    weight: Tensor | None = None,
    momentum: Tensor | None = None,
    others: tuple[nn.Parameter, ...] = (),
) -> None:
    """Takes a step and compares one parameter with float64.

    Args:
        optimizer: takes the step.
        param: is compared; bf16, fp32 or fp64.
        grad: its gradient, finite, in the parameter's dtype.
        weight, momentum: float64, what parameter and state stand for before the step; None reads them.
        others: get a gradient of ones.
    """
    if weight is None or momentum is None:
        held = kept(param, optimizer.state[param])
        weight, momentum = held[0] if weight is None else weight, held[1] if momentum is None else momentum
    group = next(group for group in optimizer.param_groups if any(param is own for own in group["params"]))
    lr, (beta1, beta2), decay = float(group["lr"]), group["betas"], float(group["weight_decay"])
    param.grad = grad.clone()
    for other in others:
        other.grad = torch.ones_like(other)
    optimizer.step()

    state, wide = optimizer.state[param], grad.double()
    stored, full = state["exp_avg"].dtype, param.dtype == torch.float64
    mixed = beta1 * momentum + (1 - beta1) * wide
    rounding = 2.0 ** (-48 if full and stored == torch.float64 else -21)
    unsure = rounding * (momentum.abs() + wide.abs())
    if stored in (torch.int8, torch.bfloat16, torch.float32):  # what it was may have been converted to what it is
        unsure = unsure + momentum_spacing(momentum, stored)
    after_weight, after_momentum = kept(param, state)
    expected = weight - lr * (mixed.sign() + decay * weight)
    precision = 2.0 ** (-50 if full else -22)
    allowed = 2 * weight_spacing(
        weight.abs().maximum(expected.abs()), param.dtype, group["weight_bits"]
    ) + precision * (expected.abs() + lr)
    allowed = torch.where(mixed.abs() <= unsure, allowed + 2 * lr, allowed)
    error = (after_weight - expected).abs()
    assert (error <= allowed).all(), f"a weight is {float((error - allowed).max()):.3e} further off than allowed"
    new_momentum = beta2 * momentum + (1 - beta2) * wide
    slack = 2 * momentum_spacing(new_momentum, stored) + unsure
    error = (after_momentum - new_momentum).abs()
    assert (error <= slack).all(), f"a momentum is {float((error - slack).max()):.3e} further off than allowed"


def _content(value: Any) -> Any:
    """What can be compared bit for bit."""
    if isinstance(value, Tensor) and value.device.type == "cpu" and value.layout == torch.strided and value.numel():
        plain = value.detach().resolve_neg().resolve_conj()
        if not plain.is_quantized and plain.dtype.itemsize:
            return (
                plain.dtype,
                tuple(plain.shape),
                plain.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).numpy().tobytes(),
            )
    return repr(value)


def record(optimizer: Lion) -> list[Any]:
    """Everything that a refusal must leave as it was: weights, state with the identity of its tensors, options."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    weights = [_content(param) for param in params]
    state = [
        {key: (id(value), _content(value)) for key, value in optimizer.state.get(param, {}).items()} for param in params
    ]
    options = [
        {key: _content(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    return [weights, state, options, [id(param) for param in params], int(optimizer.nonfinite_count)]


def assert_refused(action: Callable[[], Any], optimizer: Lion, *words: str) -> str:
    """Calls `action`, which must raise a ValueError that has all the words, and leave the optimizer as it was."""
    before = record(optimizer)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are checked below
        action()
    message = str(caught.value)
    assert not [word for word in words if word not in message], message
    assert record(optimizer) == before, "a refusal changed the optimizer"
    return message
