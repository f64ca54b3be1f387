"""The eager engine: torch operations over chunks that stay in cache. Any device, no compiler."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lion_lightning.optim import bits, rule, telemetry
from lion_lightning.optim.rule import TensorUpdate

CHUNK_ELEMENTS = 262_144
"""About twice the speed of whole-tensor operations on a CPU with 2 MB of cache a core."""


def decode(update: TensorUpdate) -> tuple[Tensor, Tensor]:
    """Weight and momentum in the precision of the arithmetic. Either may be the stored tensor itself."""
    if update.param.dtype == torch.bfloat16:
        weight = bits.join_weight(update.param, update.weight_remainder)
    else:
        weight = update.param
    if update.exp_avg_scale is not None:
        return weight, bits.dequantize(update.exp_avg, update.exp_avg_scale).to(weight.dtype)
    return weight, update.exp_avg.to(weight.dtype)


def encode(update: TensorUpdate, weight: Tensor, momentum: Tensor) -> None:
    """Stores weight and momentum in place."""
    random = update.random_bits()
    if update.param.dtype == torch.bfloat16:
        high, remainder = bits.split_weight(weight, update.settings.weight_bits, random)
        update.param.copy_(high)
        if update.weight_remainder is not None and remainder is not None:
            update.weight_remainder.copy_(remainder)
    else:
        update.param.copy_(weight)
    if update.exp_avg_scale is not None:
        levels, scale = bits.quantize(momentum.float(), random)
        update.exp_avg.copy_(levels)
        update.exp_avg_scale[: scale.numel()].copy_(scale)
    else:
        update.exp_avg.copy_(momentum)


def kept(update: TensorUpdate, grad: Tensor, nonfinite: Tensor) -> Tensor | None:
    """Mask of the elements that may change, None for all; adds to the counts of non-finite gradients.

    On a CPU the sum of the gradient is looked at first: if it is finite, so is every element.
    """
    found_inf = update.settings.found_inf
    if grad.device.type == "cpu" and found_inf is None and bool(grad.sum().isfinite()):
        return None
    finite = grad.isfinite()
    count = finite.logical_not().sum()
    nonfinite += count
    if update.statistics is not None:
        update.statistics[telemetry.NONFINITE] += count
    if not update.settings.skip_nonfinite:
        finite = torch.ones_like(finite)
    return finite if found_inf is None else finite & (found_inf == 0)


def step_chunk(update: TensorUpdate, nonfinite: Tensor) -> None:
    """One chunk: decode, rule, encode."""
    weight, momentum = decode(update)
    grad = update.grad.to(weight.dtype)
    factor = rule.gradient_factor(update.settings, weight.dtype)
    if isinstance(factor, Tensor) or factor != 1.0:
        grad = grad * factor
    mask = kept(update, grad, nonfinite)
    new_weight, new_momentum, direction = rule.ruled(weight, grad, momentum, update.settings)
    if mask is not None:
        new_weight = torch.where(mask, new_weight, weight)
        new_momentum = torch.where(mask, new_momentum, momentum)
        direction = torch.where(mask, direction, 0.0)
    if update.statistics is None:
        encode(update, new_weight, new_momentum)
        return
    weight = weight.clone()  # may be the parameter itself
    momentum = momentum.clone()
    encode(update, new_weight, new_momentum)
    telemetry.observe(update, weight, grad, momentum, decode(update)[0], new_momentum, direction)


class EagerEngine:
    """Runs every update anywhere; the fallback of the other engines."""

    name = "eager"

    def objection(self, update: TensorUpdate) -> str | None:
        return None

    def step(self, updates: Sequence[TensorUpdate], nonfinite: Tensor) -> None:
        for update in updates:
            for start in range(0, update.param.numel(), CHUNK_ELEMENTS):
                stop = min(start + CHUNK_ELEMENTS, update.param.numel())
                step_chunk(update.part(start, stop), nonfinite)


engine = EagerEngine()
