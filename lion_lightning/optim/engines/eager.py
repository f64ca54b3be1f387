"""The eager engine: torch operations over chunks that stay in cache. Any device, no compiler."""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from lion_lightning.optim import bits, rule, telemetry
from lion_lightning.optim.rule import TensorUpdate

CHUNK_ELEMENTS = 65_536
"""A dozen tensors of this length stay in the 2 MB of cache of a core; shorter ones cost more in calls."""


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
    elif weight is not update.param:
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


def step_chunk(update: TensorUpdate, nonfinite: Tensor, scratch: Tensor) -> None:
    """One chunk: decode, rule, encode. Where nothing needs care the rule is run in place, without new tensors."""
    settings = update.settings
    weight, momentum = decode(update)
    grad = update.grad.to(weight.dtype)
    factor = rule.gradient_factor(settings, weight.dtype)
    if isinstance(factor, Tensor) or factor != 1.0:
        grad = grad * factor
    first, second = scratch.view(weight.dtype)[:, : weight.numel()]
    mixed = torch.mul(momentum, settings.beta1, out=first)
    mixed += torch.mul(grad, 1 - settings.beta1, out=second)
    plain = update.statistics is None and not settings.cautious and settings.found_inf is None
    # On a CPU a sum tells: if c's is finite, so is every gradient and momentum it is made of.
    if not (plain and mixed.device.type == "cpu" and bool(mixed.sum().isfinite())):
        return step_carefully(update, weight.clone(), grad, momentum.clone(), nonfinite)
    change = torch.mul(weight, settings.weight_decay, out=second)
    change += mixed.sign_()
    change *= settings.lr
    weight -= change
    momentum *= settings.beta2
    momentum += torch.mul(grad, 1 - settings.beta2, out=second)
    encode(update, weight, momentum)


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

    def __init__(self) -> None:
        self._kept = threading.local()  # as many threads as like may step optimizers of their own

    def _scratch(self, device: torch.device) -> Tensor:
        """Two chunks of memory that stay in cache from one chunk to the next; wide enough for float64."""
        kept: dict[str, Tensor] = self._kept.__dict__
        name = str(device)
        if name not in kept:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            kept[name] = torch.empty(2, CHUNK_ELEMENTS, dtype=dtype, device=device)
        return kept[name]

    def step(self, updates: Sequence[TensorUpdate], nonfinite: Tensor) -> None:
        for update in updates:
            scratch = self._scratch(update.param.device)
            for start in range(0, update.param.numel(), CHUNK_ELEMENTS):
                stop = min(start + CHUNK_ELEMENTS, update.param.numel())
                step_chunk(update.part(start, stop), nonfinite, scratch)


engine = EagerEngine()
