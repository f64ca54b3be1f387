"""Telemetry of Lion's updates: metrics of every n-th step, computed on the device without a synchronisation.

A sampled step runs the engine on one parameter at a time. `Telemetry` copies some blocks of the parameter and of its
state before the engine runs, compares them with what the engine stored, and recomputes u by the functions of `rule`.
A sampled step is therefore slower than others, by these copies and by some twenty torch operations per parameter.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lion_lightning.optim.kernels import rule
from lion_lightning.optim.kernels.rule import TensorUpdate
from lion_lightning.optim.kernels.select import Engine
from lion_lightning.optim.kernels.storage_formats import BLOCK_ELEMENTS, GOLDEN, WORD_MASK

OBSERVED_BLOCKS = 64
"""Blocks of 256 elements that are observed of a larger tensor; a smaller one is observed whole."""

BOUND_SHARE = 0.9
"""Lion solves min f with |p| <= 1/weight_decay; weights beyond this share of the bound are counted."""

UNMOVED, ZERO, AGREE, FLIPPED, NEAR_BOUND, MOMENTUM_SQUARED, WEIGHT_SQUARED, DECAY, REQUESTED, LR = range(10)


class _Row(NamedTuple):
    """The sums over one tensor, estimated from its observed elements."""

    sums: Tensor
    """Shape (10,), in the order of the enumeration above; float64, or float32 on a device without it."""
    nonfinite: Tensor
    """int64 of shape (): gradient elements of the whole tensor that were not finite."""
    elements: int
    kind: str
    """"scalar", "vector" or "matrix"."""
    has_decay: bool
    has_flips: bool
    """Whether an earlier sample had signs to compare with."""


class Telemetry:
    """Samples every `every`-th step of one optimizer; 0 never.

    It keeps the signs of u of the observed elements from one sample to the next, one byte each.
    """

    def __init__(self) -> None:
        self.every = 0
        self._steps = 0
        self._is_sampled = False
        self._collected: dict[int, _Row] = {}
        self._rows: list[_Row] = []
        self._signs: dict[int, Tensor] = {}

    def begin_step(self) -> None:
        """Counts a step, and begins a sample if one is due."""
        self._is_sampled = self.every > 0 and self._steps % self.every == 0
        self._steps += 1
        self._collected = {}

    def end_step(self) -> None:
        """Ends the step; a sample becomes the one that `summary` describes."""
        if self._is_sampled:
            self._rows = [row for _, row in sorted(self._collected.items())]
        self._is_sampled, self._collected = False, {}

    def run(self, engine: Engine, updates: Sequence[TensorUpdate], nonfinite: Tensor) -> None:
        """Runs updates by an engine, and observes each of them in a sampled step.

        Args:
            engine: supports all updates.
            updates: of one device; none is empty.
            nonfinite: int64 of shape () on the device, which the engine adds to.
        """
        if not self._is_sampled:
            engine.step(updates, nonfinite)
            return
        for update in updates:
            blocks = observed_blocks(update)
            before, count = copy_of(update, blocks), nonfinite.clone()
            engine.step([update], nonfinite)
            self._collected[update.index] = self._row(update, before, copy_of(update, blocks), nonfinite - count)

    def _row(self, update: TensorUpdate, before: TensorUpdate, after: TensorUpdate, nonfinite: Tensor) -> _Row:
        """The sums of one update, from its observed elements before and after the engine ran."""
        settings = update.settings
        weight, momentum = rule.decode(before)
        new_weight, new_momentum = rule.decode(after)
        grad = before.grad.to(weight.dtype) * rule.gradient_factor(settings, weight.dtype)
        direction = rule.ruled(weight, grad, momentum, settings)[2]
        direction = torch.where(rule.update_mask(grad, settings), direction, 0.0)
        signs = direction.sign().to(torch.int8)
        last_signs = self._signs.get(update.index)
        if last_signs is not None and (last_signs.shape, last_signs.device) != (signs.shape, signs.device):
            last_signs = None  # the parameter has been resharded or moved
        self._signs[update.index] = signs
        bound = BOUND_SHARE / settings.weight_decay if settings.weight_decay > 0 else torch.inf
        square = weight * weight
        terms = (
            new_weight == weight,
            direction == 0,
            momentum * grad > 0,
            torch.zeros_like(signs) if last_signs is None else last_signs * signs < 0,
            weight.abs() > bound,
            new_momentum * new_momentum,
            square,
            (weight - new_weight - direction * settings.lr) * weight,
            square * settings.lr * settings.weight_decay,
            torch.ones_like(weight) * settings.lr,
        )
        dtype = torch.float32 if weight.device.type == "mps" else torch.float64
        sums = torch.stack([term.sum(dtype=dtype) for term in terms])  # each too small to wait for other threads
        elements = update.param.numel()
        sums *= elements / weight.numel()
        return _Row(sums, nonfinite, elements, update.kind, settings.weight_decay > 0, last_signs is not None)

    def summary(self) -> dict[str, Tensor]:
        """See `Lion.telemetry`. Shares are of the elements of this process; the caller reduces over ranks.

        The ratios of lr and RMS(p) are the alpha_0 of Amos (arXiv:2210.11693).
        """
        if not (rows := self._rows):
            return {}
        device = rows[0].sums.device
        means = _means(rows, device)
        metrics = {
            "lion/unmoved": means[UNMOVED],
            "lion/zero_update": means[ZERO],
            "lion/sign_agreement": means[AGREE],
            "lion/momentum_rms": means[MOMENTUM_SQUARED].sqrt(),
            "lion/nonfinite": torch.stack([row.nonfinite.to(device, non_blocking=True) for row in rows]).sum(),
        }
        if compared := [row for row in rows if row.has_flips]:
            metrics["lion/flip_rate"] = _means(compared, device)[FLIPPED]
        for kind in ("scalar", "vector", "matrix"):
            if alike := [row for row in rows if row.kind == kind]:
                means = _means(alike, device)
                metrics[f"lion/step_ratio_{kind}"] = means[LR] / means[WEIGHT_SQUARED].sqrt()
        if decaying := [row for row in rows if row.has_decay]:
            means = _means(decaying, device)
            metrics["lion/near_bound"] = means[NEAR_BOUND]
            metrics["lion/realised_decay"] = means[DECAY] / means[REQUESTED]
        return metrics


def _means(rows: list[_Row], device: torch.device) -> Tensor:
    """The sums of some rows, divided by the number of their elements: shape (10,)."""
    total = torch.stack([row.sums.to(device, non_blocking=True) for row in rows]).sum(0)
    return total / sum(row.elements for row in rows)


def observed_blocks(update: TensorUpdate) -> Tensor | None:
    """Numbers of the blocks that telemetry observes, int64 on the device; None if it observes every element.

    Of a tensor of more than OBSERVED_BLOCKS blocks, these are as many whole blocks, at multiples of the golden ratio,
    which spreads them evenly over the rows and columns of a matrix.
    """
    blocks = update.param.numel() // BLOCK_ELEMENTS
    if blocks <= OBSERVED_BLOCKS:
        return None
    multiples = torch.arange(OBSERVED_BLOCKS, device=update.param.device) * GOLDEN & WORD_MASK
    return multiples * blocks >> 32


def copy_of(update: TensorUpdate, blocks: Tensor | None) -> TensorUpdate:
    """A copy of some blocks of an update, or of all of it.

    Args:
        update: is not changed.
        blocks: their numbers, int64 on the device of the update; None copies every element.
    """

    def copied(tensor: Tensor, block_elements: int = BLOCK_ELEMENTS) -> Tensor:
        if blocks is None:
            return tensor.clone()
        whole = update.param.numel() // BLOCK_ELEMENTS
        return tensor[: whole * block_elements].view(-1, block_elements).index_select(0, blocks).view(-1)

    scale, remainder = update.exp_avg_scale, update.weight_remainder
    return replace(
        update,
        param=copied(update.param),
        grad=copied(update.grad),
        exp_avg=copied(update.exp_avg),
        exp_avg_scale=None if scale is None else copied(scale, block_elements=1),
        weight_remainder=None if remainder is None else copied(remainder),
    )
