"""What a Lion user needs to see, summed up in the pass that updates the weights and read without a wait for the device.

An engine adds to a row of sums per tensor (`observe` says what); `Telemetry` decides when, keeps the rows of the last
sample and turns them into named figures.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lion_lightning.optim import bits
from lion_lightning.optim.rule import Settings, TensorUpdate

UNMOVED, ZERO, AGREE, MOMENTUM_SQUARED, WEIGHT_SQUARED, NEAR_BOUND, DECAY, NONFINITE, FLIPPED = range(9)
STATISTICS = 9
"""Length of a row; the order is that of the enumeration in cpu.c."""

BOUND_SHARE = 0.9
"""Lion solves min f with |p| <= 1/weight_decay; weights beyond this share of the bound are counted."""

SAMPLED_SIGNS = 65_536
"""Signs of u kept from one sample to the next, spread evenly over all parameters, to tell how many flipped."""

OBSERVED_BELOW = 1 << 30
"""Of 2^32: a quarter of all blocks is observed."""

KINDS = ("scalar", "vector", "matrix")
"""Kinds of parameters by their number of dimensions, the last for two and more."""


def is_observed(block: Tensor) -> Tensor:
    """Whether the sums are to have a block of 256 elements, told by its place in the tensor; int64 to bool.

    Multiples of the golden ratio spread the observed blocks evenly, whatever the width of the matrix, and take the
    first. All of them would cost a third of the step's time on a CPU.
    """
    return (block * bits.GOLDEN & bits.WORD_MASK) < OBSERVED_BELOW


def observed(start: int, count: int, device: torch.device) -> Tensor:
    """Mask of the observed elements among `count` of a tensor, from `start` on, a multiple of 256; bool (count,)."""
    first, last = start // bits.BLOCK_ELEMENTS, -(-(start + count) // bits.BLOCK_ELEMENTS)
    blocks = is_observed(torch.arange(first, last, device=device))
    return blocks.repeat_interleave(bits.BLOCK_ELEMENTS)[:count]


@functools.lru_cache(maxsize=4096)
def observed_count(count: int) -> int:
    """How many elements of a tensor of `count` are observed."""
    blocks = is_observed(torch.arange(-(-count // bits.BLOCK_ELEMENTS)))
    missing = -count % bits.BLOCK_ELEMENTS
    return int(blocks.sum()) * bits.BLOCK_ELEMENTS - missing * int(blocks[-1])


def observe(
    update: TensorUpdate,
    weight: Tensor,
    grad: Tensor,
    momentum: Tensor,
    stored: Tensor,
    new_momentum: Tensor,
    direction: Tensor,
) -> None:
    """Adds the observed blocks to a tensor's sums and refreshes its sampled signs: what engines do in their own pass.

    Args:
        update: whose `statistics` (sums) and `signs` are written. The count of non-finite gradients is the caller's.
        weight: before the step, shape (n,).
        grad: unscaled, with the sign to descend along.
        momentum: before the step.
        stored: the weight after the step, as it reads back from storage.
        new_momentum: after the step.
        direction: u, after caution; 0 where the element was skipped.
    """
    sums, settings = update.statistics, update.settings
    assert sums is not None
    if update.signs is not None and update.signs.numel():
        signs = direction[update.sign_start :: update.sign_stride].sign().to(torch.int8)
        sums[FLIPPED] += (signs * update.signs < 0).sum()
        update.signs.copy_(signs)
    seen = observed(update.start, weight.numel(), weight.device)
    weight, grad, momentum, stored = weight[seen], grad[seen], momentum[seen], stored[seen]
    new_momentum, direction = new_momentum[seen], direction[seen]
    sums[UNMOVED] += (stored == weight).sum()
    sums[ZERO] += (direction == 0).sum()
    sums[AGREE] += (momentum * grad > 0).sum()
    sums[MOMENTUM_SQUARED] += new_momentum.square().sum(dtype=torch.float32)
    sums[WEIGHT_SQUARED] += weight.square().sum()
    sums[DECAY] += ((weight - stored - direction * settings.lr) * weight).sum()
    if settings.weight_decay > 0:
        sums[NEAR_BOUND] += (weight.abs() > BOUND_SHARE / settings.weight_decay).sum()


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
        known = bool(self._signs)
        self._rows = []
        for device in {update.param.device for update in updates}:
            here = [update for update in updates if update.param.device == device]
            dtype = torch.float32 if device.type == "mps" else torch.float64
            sums = torch.zeros(len(here), STATISTICS, dtype=dtype, device=device)
            for update, row in zip(here, sums, strict=True):
                self._attach_one(update, row, stride)
        self._samples = self._samples + 1 if known else 1

    def _attach_one(self, update: TensorUpdate, row: Tensor, stride: int) -> None:
        length = -(-update.param.numel() // stride)
        signs = self._signs.get(update.index)
        if signs is None or signs.numel() != length or signs.device != update.param.device:
            signs = self._signs[update.index] = torch.zeros(length, dtype=torch.int8, device=update.param.device)
        update.statistics, update.signs, update.sign_stride = row, signs, stride
        self._rows.append(_Sample(row, observed_count(update.param.numel()), length, update.kind, update.settings))

    def summary(self) -> dict[str, Tensor]:
        """Figures of the last sample as 0-d tensors under `lion/`; empty before the first.

        Shares are of the observed elements of this process, a quarter of all. Local shards of
        DTensors count alone: reduce over ranks outside.
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
