"""The eager engine: torch operations over chunks that stay in cache. Any device, no compiler."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lion_lightning.optim.kernels import rule, storage_formats
from lion_lightning.optim.kernels.rule import TensorUpdate

CHUNK_ELEMENTS = 81_920
"""Largest chunk for each thread. Half as large took 1.2 to 1.8 times as long for BERT-base on an AMD EPYC."""

DEVICE_CHUNK_ELEMENTS = 2**24
"""Largest chunk on other devices, which bounds the memory of a step: about half a gigabyte."""


class EagerEngine:
    """Supports every update on every device; the fallback if no other engine supports it."""

    name = "eager"

    def objection(self, update: TensorUpdate) -> str | None:
        return None

    def step(self, updates: Sequence[TensorUpdate], nonfinite: Tensor) -> None:
        for update in updates:
            on_cpu = update.param.device.type == "cpu"
            limit = CHUNK_ELEMENTS * torch.get_num_threads() if on_cpu else DEVICE_CHUNK_ELEMENTS
            for chunk in chunks(update, limit):
                _step(chunk, nonfinite)


def chunks(update: TensorUpdate, limit: int) -> Iterator[TensorUpdate]:
    """The update in chunks of equal size, rounded up to whole blocks, of at most `limit` elements."""
    count = update.param.numel()
    if count <= limit:
        yield update
        return
    blocks = -(-count // storage_formats.BLOCK_ELEMENTS)
    size = -(-blocks // -(-count // limit)) * storage_formats.BLOCK_ELEMENTS
    for start in range(0, count, size):
        yield update.part(start, min(start + size, count))


def _step(update: TensorUpdate, nonfinite: Tensor) -> None:
    """Runs the rule where the gradient is finite (with `skip_nonfinite`); adds the others to the count `nonfinite`."""
    settings = update.settings
    weight, momentum = rule.decode(update)
    factor = rule.gradient_factor(settings, weight.dtype)
    grad = update.grad.to(weight.dtype)
    grad = grad if isinstance(factor, float) and factor == 1.0 else grad * factor
    new_weight, new_momentum, _ = rule.ruled(weight, grad, momentum, settings)
    if settings.found_inf is not None or not _are_known_finite(grad):
        nonfinite += grad.isfinite().logical_not().sum()
        mask = rule.update_mask(grad, settings)
        new_weight = torch.where(mask, new_weight, weight)
        new_momentum = torch.where(mask, new_momentum, momentum)
    _store(update, new_weight, new_momentum)


def _are_known_finite(values: Tensor) -> bool:
    """Whether the sum of squares is finite, and so every number; False on a GPU, where asking would synchronise."""
    is_read_at_once = values.device.type == "cpu" and type(values) is Tensor  # a fake tensor has no values
    return is_read_at_once and math.isfinite(torch.dot(values, values).item())


def _store(update: TensorUpdate, weight: Tensor, momentum: Tensor) -> None:
    """Stores weight and momentum, in the precision of the arithmetic, in place; overwrites `weight`."""
    random = update.random_bits()
    if update.param.dtype == torch.bfloat16:
        stored = weight if _are_known_finite(weight) else storage_formats.ordinary(weight)
        words = stored.view(torch.int32)
        storage_formats.store_words(words, update.param, update.weight_remainder, update.settings.weight_bits, random)
    else:
        update.param.copy_(weight)
    if update.exp_avg_scale is not None:
        levels, scale = storage_formats.quantize(momentum.float(), random)
        update.exp_avg.copy_(levels)
        update.exp_avg_scale[: scale.numel()].copy_(scale)
    else:
        update.exp_avg.copy_(momentum)


engine = EagerEngine()
