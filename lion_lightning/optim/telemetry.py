"""Telemetry of Lion's updates, summed up in the pass that updates the weights and read without a wait for the device.

An engine adds to a row of sums per tensor (`rule.observe` defines them). `Telemetry` decides which steps are sampled,
keeps the rows of the last sample and turns them into named metrics.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lion_lightning.optim.kernels import rule
from lion_lightning.optim.kernels.rule import Settings, TensorUpdate
from lion_lightning.optim.kernels.storage_formats import BLOCK_ELEMENTS

SAMPLED_SIGNS = 65_536
"""Signs of u kept from one sample to the next, spread evenly over all parameters, for the flip rate."""

OBSERVED_ELEMENTS = 1 << 19
"""So many of all elements are observed, at most a sixteenth of them, and the first block of each tensor."""

KINDS = ("scalar", "vector", "matrix")


@dataclass(frozen=True)
class Outline:
    """What telemetry needs of an update; not the update itself, which would keep its gradient alive."""

    index: int
    elements: int
    device: torch.device
    kind: str
    settings: Settings

    @classmethod
    def of(cls, update: TensorUpdate) -> "Outline":
        """The outline of one update."""
        return cls(update.index, update.param.numel(), update.param.device, update.kind, update.settings)


class _Row(NamedTuple):
    """The sums of one tensor, and what they are sums of."""

    sums: Tensor
    signs: Tensor
    observed: int
    kind: str
    settings: Settings


def observed_count(count: int, below: int) -> int:
    """How many elements are observed of a tensor.

    Args:
        count: elements of the tensor.
        below: share of its blocks that are observed, of 2^32.
    """
    blocks = rule.is_observed(torch.arange(-(-count // BLOCK_ELEMENTS)), below)
    missing = -count % BLOCK_ELEMENTS if count and blocks[-1] else 0
    return int(blocks.sum()) * BLOCK_ELEMENTS - missing


class Telemetry:
    """Samples every `every`-th step of one optimizer; 0 never.

    It takes the memory of one sign for each of about 65,536 elements.
    """

    def __init__(self) -> None:
        self.every = 0
        self._steps = 0
        self._samples = 0
        self._rows: dict[int, _Row] = {}
        self._signs: dict[int, Tensor] = {}
        self._counts: dict[tuple[int, int], int] = {}
        self._stride = 1
        self._below = 0
        self._is_open = False

    def is_due(self) -> bool:
        """Counts a step; whether it is to be sampled."""
        self._steps += 1
        return self.every > 0 and (self._steps - 1) % self.every == 0

    def begin(self, outlines: list[Outline]) -> None:
        """Begins a sample of one step.

        Args:
            outlines: of all updates of the step; none is empty.
        """
        elements = sum(outline.elements for outline in outlines)
        self._stride = max(1, elements // SAMPLED_SIGNS) | 1  # odd: a power of two would visit few columns of a matrix
        self._below = min(1 << 28, (OBSERVED_ELEMENTS << 32) // max(1, elements))
        self._samples = self._samples + 1 if self._signs else 1
        self._rows, self._is_open = {}, True
        for outline in outlines:
            index, count, device = outline.index, outline.elements, outline.device
            length = -(-count // self._stride)
            signs = self._signs.get(index)
            if signs is None or signs.numel() != length or signs.device != device:
                signs = self._signs[index] = torch.zeros(length, dtype=torch.int8, device=device)
            if (count, self._below) not in self._counts:
                self._counts[count, self._below] = observed_count(count, self._below)
            dtype = torch.float32 if device.type == "mps" else torch.float64
            sums = torch.zeros(rule.STATISTICS, dtype=dtype, device=device)
            self._rows[index] = _Row(sums, signs, self._counts[count, self._below], outline.kind, outline.settings)

    def attach(self, update: TensorUpdate) -> None:
        """Gives an update of a sampled step its row of sums and its sampled signs."""
        if self._is_open and update.index in self._rows:
            row = self._rows[update.index]
            update.statistics, update.observed_below = row.sums, self._below
            update.signs, update.sign_stride = row.signs, self._stride

    def end(self) -> None:
        """Ends the step."""
        self._is_open = False

    def summary(self) -> dict[str, Tensor]:
        """Metrics of the last sample as tensors of shape () under `lion/`; empty before the first.

        Shares are of the observed elements of this process (`OBSERVED_ELEMENTS`), of DTensors those of the local
        shards. The caller reduces over ranks.
        """
        if not self._rows:
            return {}
        rows = list(self._rows.values())
        device = rows[0].sums.device
        sums = torch.stack([row.sums.to(device, non_blocking=True) for row in rows])
        total = sums.sum(0)
        elements = sum(row.observed for row in rows)
        metrics = {
            "lion/unmoved": total[rule.UNMOVED] / elements,
            "lion/zero_update": total[rule.ZERO] / elements,
            "lion/sign_agreement": total[rule.AGREE] / elements,
            "lion/momentum_rms": (total[rule.MOMENTUM_SQUARED] / elements).sqrt(),
            "lion/nonfinite": total[rule.NONFINITE],
        }
        if self._samples > 1:
            metrics["lion/flip_rate"] = total[rule.FLIPPED] / sum(row.signs.numel() for row in rows)
        return metrics | self._ratios(rows, sums) | self._decay(rows, sums)

    def _ratios(self, rows: list[_Row], sums: Tensor) -> dict[str, Tensor]:
        """lr / RMS(p) for each kind of parameter: the alpha_0 of Amos (arXiv:2210.11693), healthy at about 1e-3."""
        ratios = {}
        for kind in KINDS:
            numbers = [number for number, row in enumerate(rows) if row.kind == kind]
            if numbers:
                elements = sum(rows[number].observed for number in numbers)
                lr = sum(rows[number].settings.lr * rows[number].observed for number in numbers) / elements
                mean_square = sums[numbers][:, rule.WEIGHT_SQUARED].sum() / elements
                ratios[f"lion/step_ratio_{kind}"] = lr / mean_square.sqrt()
        return ratios

    def _decay(self, rows: list[_Row], sums: Tensor) -> dict[str, Tensor]:
        """Of parameters with decay: the share near the bound, and the decay that happened over the one requested."""
        numbers = [number for number, row in enumerate(rows) if row.settings.weight_decay > 0]
        if not numbers:
            return {}
        requested: Any = 0.0
        for number in numbers:
            settings = rows[number].settings
            requested = requested + sums[number, rule.WEIGHT_SQUARED] * settings.lr * settings.weight_decay
        return {
            "lion/near_bound": sums[numbers][:, rule.NEAR_BOUND].sum() / sum(rows[n].observed for n in numbers),
            "lion/realised_decay": sums[numbers][:, rule.DECAY].sum() / requested,
        }
