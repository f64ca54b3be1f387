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
    """Buffers of the chunks, in the dtype of the arithmetic, and the number one.

    They stay in cache from one chunk to the next. Allocating them for each chunk would cost more than the arithmetic.
    """

    weight: Tensor
    momentum: Tensor
    grad: Tensor
    change: Tensor
    one: Tensor


class EagerEngine:
    """Supports every update on every device; the fallback if no other engine supports it."""

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
            weight, momentum, grad, change = (torch.empty(elements, dtype=dtype, device="cpu") for _ in range(4))
            known[dtype, elements] = Scratch(weight, momentum, grad, change, torch.ones((), dtype=dtype, device="cpu"))
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
    """Whether the short path may be tried; on a GPU, its test for numbers that are not finite would synchronise."""
    settings = update.settings
    masked = settings.cautious or settings.cautious_decay
    return not masked and settings.found_inf is None and update.param.device.type == "cpu"


def _step_simply(update: TensorUpdate, scratch: Scratch) -> bool:
    """Runs the rule in scratch memory. Returns False, with nothing changed, if a number is not finite or is huge."""
    settings = update.settings
    weight, momentum, grad = _decode_into(update, scratch)
    if not _is_moderate(momentum, grad):  # this also fetches both, faster than one after the other
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
    """The rule with a mask of the elements that may change, and caution; adds to the count of `nonfinite`."""
    weight, momentum = rule.decode(update)
    grad = update.grad.to(weight.dtype) * rule.gradient_factor(update.settings, weight.dtype)
    nonfinite += grad.isfinite().logical_not().sum()
    mask = rule.update_mask(grad, update.settings)
    new_weight, new_momentum, _ = rule.ruled(weight, grad, momentum, update.settings)
    new_weight = torch.where(mask, new_weight, weight)
    new_momentum = torch.where(mask, new_momentum, momentum)
    stored = storage_formats.ordinary(new_weight) if update.param.dtype == torch.bfloat16 else new_weight
    _encode(update, stored, new_momentum)


def _decode_into(update: TensorUpdate, scratch: Scratch) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, momentum and gradient in the precision of the arithmetic.

    Tensors that are stored in another precision, and all three of a bf16 parameter, are in scratch memory; others are
    the stored tensors. A weight that was set to zero outside the optimizer may become a NaN.
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
    """The numbers in the dtype of `buffer`, copied into it if they have another dtype, or if `always` is set."""
    return stored if stored.dtype == buffer.dtype and not always else buffer[: stored.numel()].copy_(stored)


def _add_product(total: Tensor, values: Tensor, factor: float, one: Tensor) -> None:
    """Adds values * factor in one pass, and rounds the product before the addition.

    torch multiplies by the factor first. It may fuse only the product with `one`, which is exact, with the addition.
    `add_` with alpha, or a tensor in place of `one`, would fuse the product that has to be rounded.
    """
    total.addcmul_(values, one, value=factor)


def _is_moderate(left: Tensor, right: Tensor) -> bool:
    """Whether all numbers are finite and so small that their dot product does not overflow."""
    return math.isfinite(torch.dot(left, right).item())


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
