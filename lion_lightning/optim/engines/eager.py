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
    elif momentum is not update.exp_avg:
        update.exp_avg.copy_(momentum)


def kept(update: TensorUpdate, grad: Tensor, nonfinite: Tensor) -> Tensor:
    """Mask of the elements that may change; adds to the counts of non-finite gradients."""
    found_inf = update.settings.found_inf
    finite = grad.isfinite()
    count = finite.logical_not().sum()
    nonfinite += count
    if update.statistics is not None:
        update.statistics[telemetry.NONFINITE] += count
    if not update.settings.skip_nonfinite:
        finite = torch.ones_like(finite)
    return finite if found_inf is None else finite & (found_inf == 0)


def is_ordinary(update: TensorUpdate, mixed: Tensor) -> bool:
    """Whether nothing in the chunk needs care. On a CPU it is told by a sum: if c's is finite, all it is made of is."""
    settings = update.settings
    plain = mixed.device.type == "cpu" and update.statistics is None and not settings.cautious
    return plain and settings.found_inf is None and bool(mixed.sum().isfinite())


def step_chunk(update: TensorUpdate, nonfinite: Tensor) -> None:
    """One chunk: decode, rule, encode; the rule in place where nothing needs care."""
    weight, momentum = decode(update)
    grad = update.grad.to(weight.dtype)
    factor = rule.gradient_factor(update.settings, weight.dtype)
    if isinstance(factor, Tensor) or factor != 1.0:
        grad = grad * factor
    mixed = rule.mixture(grad, momentum, update.settings)
    if is_ordinary(update, mixed):
        new_weight = rule.moved(weight, mixed.sign_(), update.settings)
        encode(update, new_weight, momentum.mul_(update.settings.beta2).add_(grad * (1 - update.settings.beta2)))
    else:
        step_carefully(update, weight.clone(), grad, momentum.clone(), nonfinite)


def step_carefully(update: TensorUpdate, weight: Tensor, grad: Tensor, momentum: Tensor, nonfinite: Tensor) -> None:
    """One chunk with a mask of what may change, and with telemetry; weight and momentum are copies."""
    mask = kept(update, grad, nonfinite)
    new_weight, new_momentum, direction = rule.ruled(weight, grad, momentum, update.settings)
    new_weight = torch.where(mask, new_weight, weight)
    new_momentum = torch.where(mask, new_momentum, momentum)
    encode(update, new_weight, new_momentum)
    if update.statistics is not None:
        direction = torch.where(mask, direction, 0.0)
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
