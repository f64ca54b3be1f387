"""The eager engine: torch operations over chunks that stay in cache. Any device, no compiler."""

import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lion_lightning.optim import telemetry
from lion_lightning.optim.kernels import rule, storage, storage_formats
from lion_lightning.optim.kernels.observation import Observation
from lion_lightning.optim.kernels.rule import TensorUpdate
from lion_lightning.optim.kernels.scratch import Scratch, add_product, is_moderate

CHUNK_ELEMENTS = 81_920
"""At most, for each thread: so much of a tensor, with gradient and state, stays in the 2 MB of cache of a core."""

WATCHED_BLOCKS = 256
"""Observed at most between copies for telemetry: `Observation` has room for a few more."""


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


def is_simple(update: TensorUpdate) -> bool:
    """Whether nothing needs care unless a number is not finite, which only a CPU can tell without a wait."""
    settings = update.settings
    return not settings.cautious and settings.found_inf is None and update.param.device.type == "cpu"


def step_chunk(update: TensorUpdate, nonfinite: Tensor, scratch: Scratch) -> None:
    """One chunk, plainly where nothing needs care."""
    if is_simple(update) and step_plainly(update, scratch):
        return
    settings = update.settings
    weight, momentum = storage.decode(update)
    grad = update.grad.to(weight.dtype)
    factor = rule.gradient_factor(settings, weight.dtype)
    if isinstance(factor, Tensor) or factor != 1.0:
        grad = grad * factor
    step_carefully(update, weight.clone(), grad, momentum.clone(), nonfinite)


def step_plainly(update: TensorUpdate, scratch: Scratch) -> bool:
    """The rule without new tensors; returns False, and has changed nothing, where a number is not finite or is huge."""
    settings, count = update.settings, update.param.numel()
    weight, momentum, grad = decode_plainly(update, scratch)
    if not is_moderate(momentum, grad):  # which also fetches both, faster than one after the other
        return False
    change = torch.mul(momentum, settings.beta1, out=scratch.change[:count])
    add_product(change, grad, 1 - settings.beta1, scratch.one)
    momentum *= settings.beta2  # before the weight needs room in the cache
    add_product(momentum, grad, 1 - settings.beta2, scratch.one)
    change.sign_()
    telemetry.keep_signs(update, change)
    add_product(change, weight, settings.weight_decay, scratch.one)
    add_product(weight, change, -float(settings.lr), scratch.one)
    if update.param.dtype == torch.bfloat16 and not is_moderate(weight, weight):
        return False
    storage.encode(update, weight, momentum)
    return True


def decode_plainly(update: TensorUpdate, scratch: Scratch) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, momentum and gradient in scratch, but stored tensors themselves where they will do.

    Of a bf16 parameter all is in scratch. A weight zeroed from outside may come out as a NaN.
    """
    weight = widened(update.param, scratch.weight)
    if update.weight_remainder is not None:
        low = scratch.change[: weight.numel()].view(torch.int32).copy_(update.weight_remainder)
        if update.weight_remainder.dtype == torch.int8:
            low.bitwise_left_shift_(8)
        weight.view(torch.int32).add_(low)
    momentum = update.exp_avg
    if update.exp_avg_scale is not None:
        momentum = storage_formats.dequantize(momentum, update.exp_avg_scale)
    momentum = widened(momentum, scratch.momentum, always=update.param.dtype == torch.bfloat16)
    grad = widened(update.grad, scratch.grad)
    factor = rule.gradient_factor(update.settings, scratch.one.dtype)
    return weight, momentum, grad if factor == 1.0 else torch.mul(grad, factor, out=scratch.grad[: grad.numel()])


def widened(stored: Tensor, row: Tensor, always: bool = False) -> Tensor:
    """The numbers in the dtype of `row`, into which they are written where they are stored in another, or `always`."""
    return stored if stored.dtype == row.dtype and not always else row[: stored.numel()].copy_(stored)


def step_carefully(update: TensorUpdate, weight: Tensor, grad: Tensor, momentum: Tensor, nonfinite: Tensor) -> None:
    """One chunk with a mask of what may change, and with telemetry; weight and momentum are copies."""
    mask = kept(update, grad, nonfinite)
    new_weight, new_momentum, direction = rule.ruled(weight, grad, momentum, update.settings)
    new_weight = torch.where(mask, new_weight, weight)
    new_momentum = torch.where(mask, new_momentum, momentum)
    stored = storage_formats.ordinary(new_weight) if update.param.dtype == torch.bfloat16 else new_weight
    storage.encode(update, stored, new_momentum)
    if update.statistics is None:
        return
    direction = torch.where(mask, direction, 0.0)
    telemetry.keep_signs(update, direction.sign())
    if not is_simple(update):
        new_weight = storage.decode(update)[0]
        seen = telemetry.observed(update.start, weight.numel(), update.observed_below, weight.device)
        observed = [values[seen] for values in (weight, grad, momentum, new_weight, new_momentum, direction)]
        telemetry.observe(update.statistics, update.settings, observed[0].numel(), *observed)


class EagerEngine:
    """Runs every update anywhere; the fallback of the other engines."""

    name = "eager"

    def objection(self, update: TensorUpdate) -> str | None:
        return None

    def __init__(self) -> None:
        self._kept = threading.local()  # as many threads as like may step optimizers of their own

    def step(self, updates: Sequence[TensorUpdate], nonfinite: Tensor) -> None:
        watched = [update for update in updates if update.statistics is not None]
        for update in updates:
            if update.statistics is None:
                self._step(update, nonfinite)
        if watched:
            self._step_watched(watched, nonfinite)

    def _step(self, update: TensorUpdate, nonfinite: Tensor) -> None:
        limit = CHUNK_ELEMENTS * torch.get_num_threads()
        scratch = self._scratch(update, limit)
        for part in parts(update, limit):
            step_chunk(part, nonfinite, scratch)

    def _step_watched(self, updates: Sequence[TensorUpdate], nonfinite: Tensor) -> None:
        """Steps of a sample for telemetry."""
        observations: dict[tuple[object, ...], Observation] = {}
        signs = telemetry.joined_signs(updates)
        for update in updates:
            if is_simple(update):
                for part in parts(
                    update, (WATCHED_BLOCKS * storage_formats.BLOCK_ELEMENTS << 32) // max(1, update.observed_below)
                ):
                    observation = self._observation(observations, part)
                    observation.copy_before(part)
                    self._step(part, nonfinite)
                    observation.copy_after(part)
            else:
                self._step(update, nonfinite)
        for observation in observations.values():
            observation.add_up()
        telemetry.add_flips(updates, signs)

    def _observation(self, known: dict[tuple[object, ...], Observation], update: TensorUpdate) -> Observation:
        """The one that the update belongs to, with room for its blocks."""
        key = update.kind, id(update.settings), update.param.dtype, update.grad.dtype, update.exp_avg.dtype
        if key not in known:
            known[key] = Observation(update, self._scratch(update, CHUNK_ELEMENTS * torch.get_num_threads()))
        return known[key]

    def _scratch(self, update: TensorUpdate, elements: int) -> Scratch:
        kept: dict[tuple[torch.dtype, int], Scratch] = self._kept.__dict__.setdefault("scratch", {})
        dtype = torch.float64 if update.param.dtype == torch.float64 else torch.float32
        if (dtype, elements) not in kept:
            kept[dtype, elements] = Scratch.of(elements, dtype)
        return kept[dtype, elements]


def parts(update: TensorUpdate, limit: int) -> Iterator[TensorUpdate]:
    """The update in parts of the same number of elements, at most `limit`, up to a block."""
    count = update.param.numel()
    if count <= limit:
        yield update
        return
    blocks = -(-count // storage_formats.BLOCK_ELEMENTS)
    size = -(-blocks // -(-count // limit)) * storage_formats.BLOCK_ELEMENTS
    for start in range(0, count, size):
        yield update.part(start, min(start + size, count))


engine = EagerEngine()
