"""What a Lion user needs to see, summed up in the pass that updates the weights and read without a wait for the device.

An engine adds to a row of sums per tensor (`observe` says what); `Telemetry` decides when, keeps the rows of the last
sample and turns them into named figures.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lion_lightning.optim.kernels import storage_formats
from lion_lightning.optim.kernels.rule import Settings, TensorUpdate

UNMOVED, ZERO, AGREE, MOMENTUM_SQUARED, WEIGHT_SQUARED, NEAR_BOUND, DECAY, NONFINITE, FLIPPED = range(9)
STATISTICS = 9
"""Length of a row; the order is that of the enumeration in cpu.c."""

BOUND_SHARE = 0.9
"""Lion solves min f with |p| <= 1/weight_decay; weights beyond this share of the bound are counted."""

SAMPLED_SIGNS = 65_536
"""Signs of u kept from one sample to the next, spread evenly over all parameters, to tell how many flipped."""

OBSERVED_ELEMENTS = 1 << 19
"""Of all elements so many are observed, or a sixteenth if that is fewer, and the first block of each tensor."""

KINDS = ("scalar", "vector", "matrix")
"""Kinds of parameters by their number of dimensions, the last for two and more."""


def observed_below(elements: int) -> int:
    """The share of the blocks that are observed in a model of so many elements, of 2^32."""
    return min(1 << 28, (OBSERVED_ELEMENTS << 32) // max(1, elements))


def is_observed(block: Tensor, below: int) -> Tensor:
    """Whether the sums are to have a block of 256 elements, told by its place in the tensor; int64 to bool.

    Multiples of the golden ratio spread the observed blocks evenly, whatever the width of the matrix, and take the
    first. All of them would cost a third of the time of a step on a CPU, or twice all of it in the eager engine.
    """
    return (block * storage_formats.GOLDEN & storage_formats.WORD_MASK) < below


def observed(start: int, count: int, below: int, device: torch.device) -> Tensor:
    """Mask of the observed elements among `count` of a tensor, from `start` on, a multiple of 256; bool (count,)."""
    first, last = start // storage_formats.BLOCK_ELEMENTS, -(-(start + count) // storage_formats.BLOCK_ELEMENTS)
    blocks = is_observed(torch.arange(first, last, device=device), below)
    return blocks.repeat_interleave(storage_formats.BLOCK_ELEMENTS)[:count]


@functools.lru_cache(maxsize=4096)
def observed_count(start: int, count: int, below: int) -> int:
    """How many of `count` elements of a tensor are observed, from `start` on, a multiple of 256."""
    blocks = observed_blocks(start, count, below)
    missing = -count % storage_formats.BLOCK_ELEMENTS
    last = blocks.numel() > 0 and int(blocks[-1]) == (count - 1) // storage_formats.BLOCK_ELEMENTS
    return blocks.numel() * storage_formats.BLOCK_ELEMENTS - missing * last


@functools.lru_cache(maxsize=4096)
def observed_blocks(start: int, count: int, below: int) -> Tensor:
    """Places of the observed blocks of 256 among `count` elements of a tensor, from `start` on; int64 on the CPU."""
    first, last = start // storage_formats.BLOCK_ELEMENTS, -(-(start + count) // storage_formats.BLOCK_ELEMENTS)
    return is_observed(torch.arange(first, last), below).nonzero().flatten()


def keep_signs(update: TensorUpdate, direction: Tensor) -> None:
    """Refreshes the sampled signs of an update from those of its u, which are 0 where an element was skipped."""
    if update.signs is not None and update.signs.numel():
        update.signs.copy_(direction[update.sign_start :: update.sign_stride])


def joined_signs(updates: Sequence[TensorUpdate]) -> dict[torch.device, Tensor]:
    """A copy of all sampled signs on each device."""
    signs: dict[torch.device, list[Tensor]] = {}
    for update in updates:
        if update.signs is not None:
            signs.setdefault(update.signs.device, []).append(update.signs)
    return {device: torch.cat(several) for device, several in signs.items()}


def add_flips(updates: Sequence[TensorUpdate], before: dict[torch.device, Tensor]) -> None:
    """Adds to the rows how many sampled signs are not what they were, those of all updates to the first's.

    Args:
        before: what `joined_signs` gave before the step.
    """
    for device, after in joined_signs(updates).items():
        first = next(update for update in updates if update.signs is not None and update.signs.device == device)
        assert first.statistics is not None
        first.statistics[FLIPPED] += (before[device] * after < 0).sum()


def observe(
    sums: Tensor,
    settings: Settings,
    elements: int,
    weight: Tensor,
    grad: Tensor,
    momentum: Tensor,
    stored: Tensor,
    new_momentum: Tensor,
    direction: Tensor,
) -> None:
    """Adds observed elements to a row of sums: what engines do in their own pass. Overwrites all tensors but `grad`.

    Fresh memory and comparisons would each take several times as long as the arithmetic on a CPU: elements are counted
    by their signs. A NaN counts as a zero.

    Args:
        sums: the row. Non-finite gradients and flipped signs are the caller's.
        settings: of the step.
        elements: how many are observed, fewer than 2^24; blocks may be filled up with zeros.
        weight: before the step, shape (n,).
        grad: unscaled, with the sign to descend along.
        momentum: before the step.
        stored: the weight after the step, as it reads back from storage.
        new_momentum: after the step.
        direction: u, after caution; 0 where the element was skipped.
    """
    momentum_squared, weight_squared = torch.dot(new_momentum, new_momentum), torch.dot(weight, weight)
    signs = new_momentum
    decrease = torch.sub(weight, stored, out=stored)
    moved = _not_zero(torch.sign(decrease, out=signs))
    stepped = _not_zero(torch.sign(direction, out=signs))
    decay = torch.dot(decrease.sub_(direction.mul_(settings.lr)), weight)
    shared = momentum.mul_(grad).sign_()
    agree = (_not_zero(shared) + shared.sum()) / 2
    near_bound = torch.zeros_like(decay)
    if settings.weight_decay > 0:
        bound = BOUND_SHARE / settings.weight_decay
        near_bound = _not_zero(torch.clamp(weight, -bound, bound, out=signs).sub_(weight).sign_())
    row = [elements - moved, elements - stepped, agree, momentum_squared, weight_squared, near_bound, decay]
    sums[: len(row)] += torch.stack(row)


def _not_zero(signs: Tensor) -> Tensor:
    """How many signs are not 0."""
    return torch.dot(signs, signs)


@dataclass(frozen=True)
class _Sample:
    """What the figures need of one update; not the update itself, which would keep its gradient alive."""

    sums: Tensor
    elements: int
    """How many were observed."""
    signs: int
    kind: str
    settings: Settings


class Telemetry:
    """Samples every `every`-th step of one optimizer; 0 never.

    The memory it takes is one sign for each of about 65,536 elements.
    """

    def __init__(self) -> None:
        self.every = 0
        self._steps = 0
        self._samples = 0
        self._signs: dict[int, Tensor] = {}
        self._rows: list[_Sample] = []

    def attach(self, updates: list[TensorUpdate]) -> None:
        """Gives the updates of a step that is to be sampled a row of sums and their sampled signs."""
        self._steps += 1
        if not self.every or (self._steps - 1) % self.every:
            return
        elements = sum(update.param.numel() for update in updates)
        stride = max(1, elements // SAMPLED_SIGNS) | 1  # odd, so as not to visit the same columns of every matrix
        known, below = bool(self._signs), observed_below(elements)
        self._rows = []
        for device in {update.param.device for update in updates}:
            here = [update for update in updates if update.param.device == device]
            dtype = torch.float32 if device.type == "mps" else torch.float64
            sums = torch.zeros(len(here), STATISTICS, dtype=dtype, device=device)
            for update, row in zip(here, sums, strict=True):
                self._attach_one(update, row, stride, below)
        self._samples = self._samples + 1 if known else 1

    def _attach_one(self, update: TensorUpdate, row: Tensor, stride: int, below: int) -> None:
        length = -(-update.param.numel() // stride)
        signs = self._signs.get(update.index)
        if signs is None or signs.numel() != length or signs.device != update.param.device:
            signs = self._signs[update.index] = torch.zeros(length, dtype=torch.int8, device=update.param.device)
        update.statistics, update.observed_below = row, below
        update.signs, update.sign_stride = signs, stride
        count = observed_count(0, update.param.numel(), below)
        self._rows.append(_Sample(row, count, length, update.kind, update.settings))

    def summary(self) -> dict[str, Tensor]:
        """Figures of the last sample as 0-d tensors under `lion/`; empty before the first.

        Shares are of the observed elements of this process (`OBSERVED_ELEMENTS`). Local shards of DTensors count
        alone: reduce over ranks outside.
        """
        if not self._rows:
            return {}
        device = self._rows[0].sums.device
        sums = torch.stack([sample.sums.to(device, non_blocking=True) for sample in self._rows])
        total = sums.sum(0)
        elements = sum(sample.elements for sample in self._rows)
        figures = {
            "lion/unmoved": total[UNMOVED] / elements,
            "lion/zero_update": total[ZERO] / elements,
            "lion/sign_agreement": total[AGREE] / elements,
            "lion/momentum_rms": (total[MOMENTUM_SQUARED] / elements).sqrt(),
            "lion/nonfinite": total[NONFINITE],
        }
        if self._samples > 1:
            figures["lion/flip_rate"] = total[FLIPPED] / sum(sample.signs for sample in self._rows)
        return figures | self._ratios(sums) | self._decay(sums)

    def _ratios(self, sums: Tensor) -> dict[str, Tensor]:
        """lr / RMS(p) for each kind of parameter: the alpha_0 of Amos (arXiv:2210.11693), healthy at about 1e-3."""
        ratios = {}
        for kind in KINDS:
            rows = [index for index, sample in enumerate(self._rows) if sample.kind == kind]
            if not rows:
                continue
            elements = sum(self._rows[row].elements for row in rows)
            lr = sum(self._rows[row].settings.lr * self._rows[row].elements for row in rows) / elements
            ratios[f"lion/step_ratio_{kind}"] = lr / (sums[rows][:, WEIGHT_SQUARED].sum() / elements).sqrt()
        return ratios

    def _decay(self, sums: Tensor) -> dict[str, Tensor]:
        """Of parameters with decay: the share near the bound, and the decay that happened over the one asked for."""
        rows = [index for index, sample in enumerate(self._rows) if sample.settings.weight_decay > 0]
        if not rows:
            return {}
        elements = sum(self._rows[row].elements for row in rows)
        asked: Any = 0.0
        for row in rows:
            settings = self._rows[row].settings
            asked = asked + sums[row, WEIGHT_SQUARED] * settings.lr * settings.weight_decay
        return {
            "lion/near_bound": sums[rows][:, NEAR_BOUND].sum() / elements,
            "lion/realised_decay": sums[rows][:, DECAY].sum() / asked,
        }
