"""The eager engine: torch operations over chunks that stay in cache. Any device, no compiler."""

import math
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lion_lightning.optim.kernels import rule, storage_formats
from lion_lightning.optim.kernels.rule import TensorUpdate

CHUNK_ELEMENTS = 81_920
"""Largest chunk for each thread: its parameter, gradient and state fit in the 2 MB cache of a core."""


class Scratch(NamedTuple):
    """Buffers that stay in cache from one chunk to the next, in the dtype of the arithmetic, and the number one.

    Allocating them for each chunk costs more than the arithmetic.
    """

    weight: Tensor
    momentum: Tensor
    grad: Tensor
    change: Tensor
    one: Tensor


class EagerEngine:
    """Runs every update on every device; the fallback of the other engines."""

    name = "eager"

    def __init__(self) -> None:
        self._local = threading.local()  # several threads may step optimizers of their own

    def objection(self, update: TensorUpdate) -> str | None:
        return None

    def step(self, updates: Sequence[TensorUpdate], nonfinite: Tensor) -> None:
        limit = CHUNK_ELEMENTS * torch.get_num_threads()
        for update in updates:
            for chunk in chunks(update, limit):
                if not (_is_simple(chunk) and _step_simply(chunk, self._scratch(update.param.dtype, limit))):
                    _step_carefully(chunk, nonfinite)

    def _scratch(self, param_dtype: torch.dtype, elements: int) -> Scratch:
        known: dict[tuple[torch.dtype, int], Scratch] = self._local.__dict__.setdefault("scratch", {})
        dtype = torch.float64 if param_dtype == torch.float64 else torch.float32
        if (dtype, elements) not in known:
            weight, momentum, grad, change = (torch.empty(elements, dtype=dtype) for _ in range(4))
            known[dtype, elements] = Scratch(weight, momentum, grad, change, torch.ones((), dtype=dtype))
        return known[dtype, elements]


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


def _is_simple(update: TensorUpdate) -> bool:
    """Whether the short path serves unless a number is not finite; finding that out would synchronise a GPU."""
    settings = update.settings
    plain = not settings.cautious and settings.found_inf is None and update.statistics is None
    return plain and update.param.device.type == "cpu"


def _step_simply(update: TensorUpdate, scratch: Scratch) -> bool:
    """The rule in scratch memory. Returns False, with nothing changed, where a number is not finite or is huge."""
    settings = update.settings
    weight, momentum, grad = _decode_into(update, scratch)
    if not _is_moderate(momentum, grad):  # also fetches both, faster than one after the other
        return False
    change = torch.mul(momentum, settings.beta1, out=scratch.change[: update.param.numel()])
    _add_product(change, grad, 1 - settings.beta1, scratch.one)
    momentum *= settings.beta2  # before the weight needs room in the cache
    _add_product(momentum, grad, 1 - settings.beta2, scratch.one)
    change.sign_()
    _add_product(change, weight, settings.weight_decay, scratch.one)
    _add_product(weight, change, -float(settings.lr), scratch.one)
    if update.param.dtype == torch.bfloat16 and not _is_moderate(weight, weight):
        return False
    _encode(update, weight, momentum)
    return True


def _step_carefully(update: TensorUpdate, nonfinite: Tensor) -> None:
    """The rule with a mask of the elements that may change, caution and telemetry."""
    settings = update.settings
    weight, momentum = _decode(update)
    weight, momentum = weight.clone(), momentum.clone()
    grad = update.grad.to(weight.dtype) * rule.gradient_factor(settings, weight.dtype)
    mask = _update_mask(update, grad, nonfinite)
    new_weight, new_momentum, direction = rule.ruled(weight, grad, momentum, settings)
    new_weight = torch.where(mask, new_weight, weight)
    new_momentum = torch.where(mask, new_momentum, momentum)
    stored = storage_formats.ordinary(new_weight) if update.param.dtype == torch.bfloat16 else new_weight
    _encode(update, stored, new_momentum)
    if update.statistics is not None:
        direction = torch.where(mask, direction, 0.0)
        rule.observe(update, (weight, grad, momentum), (_decode(update)[0], new_momentum), direction)


def _update_mask(update: TensorUpdate, grad: Tensor, nonfinite: Tensor) -> Tensor:
    """Mask of the elements that may change; adds to the counts of gradients that are not finite."""
    found_inf = update.settings.found_inf
    finite = grad.isfinite()
    count = finite.logical_not().sum()
    nonfinite += count
    if update.statistics is not None:
        update.statistics[rule.NONFINITE] += count
    if not update.settings.skip_nonfinite:
        finite = torch.ones_like(finite)
    return finite if found_inf is None else finite & (found_inf == 0)


def _decode_into(update: TensorUpdate, scratch: Scratch) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, momentum and gradient in scratch memory, or the stored tensors themselves where they serve as they are.

    All three of a bf16 parameter are in scratch. A weight zeroed from outside may come out as a NaN.
    """
    weight = _widened(update.param, scratch.weight)
    if update.weight_remainder is not None:
        low = scratch.change[: weight.numel()].view(torch.int32).copy_(update.weight_remainder)
        if update.weight_remainder.dtype == torch.int8:
            low.bitwise_left_shift_(8)
        weight.view(torch.int32).add_(low)
    momentum = update.exp_avg
    if update.exp_avg_scale is not None:
        momentum = storage_formats.dequantize(momentum, update.exp_avg_scale)
    momentum = _widened(momentum, scratch.momentum, always=update.param.dtype == torch.bfloat16)
    grad = _widened(update.grad, scratch.grad)
    factor = rule.gradient_factor(update.settings, scratch.one.dtype)
    return weight, momentum, grad if factor == 1.0 else torch.mul(grad, factor, out=scratch.grad[: grad.numel()])


def _widened(stored: Tensor, buffer: Tensor, always: bool = False) -> Tensor:
    """The numbers in the dtype of `buffer`; copied into it where they are stored in another dtype, or `always`."""
    return stored if stored.dtype == buffer.dtype and not always else buffer[: stored.numel()].copy_(stored)


def _add_product(total: Tensor, values: Tensor, factor: float, one: Tensor) -> None:
    """Adds values * factor in one pass, the product rounded before it is added.

    torch multiplies by the factor first, and the product that it may fuse with the addition is the one with `one`,
    which is exact. `add_` with alpha, or a tensor in place of `one`, would fuse the product that has to be rounded.
    """
    total.addcmul_(values, one, value=factor)


def _is_moderate(left: Tensor, right: Tensor) -> bool:
    """Whether all numbers are finite and no product of two overflows: squares overflow far below bf16's largest."""
    return math.isfinite(torch.dot(left, right).item())


def _decode(update: TensorUpdate) -> tuple[Tensor, Tensor]:
    """Weight and momentum in the precision of the arithmetic; either may be the stored tensor itself."""
    weight = update.param
    if weight.dtype == torch.bfloat16:
        weight = storage_formats.join_weight(weight, update.weight_remainder)
    momentum = update.exp_avg
    if update.exp_avg_scale is not None:
        momentum = storage_formats.dequantize(momentum, update.exp_avg_scale)
    return weight, momentum.to(weight.dtype)


def _encode(update: TensorUpdate, weight: Tensor, momentum: Tensor) -> None:
    """Stores weight and momentum in place; overwrites a weight that is stored in bf16."""
    random = update.random_bits()
    if update.param.dtype == torch.bfloat16:
        words = weight.view(torch.int32)
        storage_formats.store_words(words, update.param, update.weight_remainder, update.settings.weight_bits, random)
    elif weight is not update.param:
        update.param.copy_(weight)
    if update.exp_avg_scale is not None:
        levels, scale = storage_formats.quantize(momentum.float(), random)
        update.exp_avg.copy_(levels)
        update.exp_avg_scale[: scale.numel()].copy_(scale)
    elif momentum is not update.exp_avg:
        update.exp_avg.copy_(momentum)


engine = EagerEngine()
