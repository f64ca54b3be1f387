"""How the eager engine serves telemetry on a CPU: copies of the observed blocks from before a step, looked at after it.

Updates of one kind with the same settings are looked at together, as an operation on a few elements costs as much as on
thousands. Their sums go to the row of the first: rows of one kind and the same settings are only read together.
"""

import dataclasses

import torch
from torch import Tensor

from lion_lightning.optim import telemetry
from lion_lightning.optim.kernels import rule, storage
from lion_lightning.optim.kernels.rule import TensorUpdate
from lion_lightning.optim.kernels.scratch import Scratch, add_product, is_moderate
from lion_lightning.optim.kernels.storage_formats import BLOCK_ELEMENTS

BLOCKS = 320
"""Looked at together: with what is computed of them they stay in the cache of two cores."""


class Observation:
    """Room for observed blocks of updates like the given one, which is the first."""

    def __init__(self, update: TensorUpdate, scratch: Scratch) -> None:
        assert update.statistics is not None
        self._sums, self._scratch = update.statistics, scratch
        self._blocks = self._elements = 0
        scale, low = update.exp_avg_scale, update.weight_remainder
        self._before = dataclasses.replace(
            update,
            param=_room(update.param),
            grad=_room(update.grad),
            exp_avg=_room(update.exp_avg),
            exp_avg_scale=None if scale is None else scale.new_empty(BLOCKS),
            weight_remainder=None if low is None else _room(low),
        )
        self._after = dataclasses.replace(
            self._before,
            param=_room(update.param),
            weight_remainder=None if low is None else _room(low),
        )

    def copy_before(self, update: TensorUpdate) -> None:
        """Keeps what a step overwrites."""
        blocks = _blocks(update)
        if self._blocks + blocks.numel() > BLOCKS:
            self.add_up()
        self._copy(update, self._before, ("param", "grad", "exp_avg", "weight_remainder"))
        scale = self._before.exp_avg_scale
        if scale is not None and update.exp_avg_scale is not None:
            scale[self._blocks : self._blocks + blocks.numel()] = update.exp_avg_scale[blocks]

    def copy_after(self, update: TensorUpdate) -> None:
        """Keeps what the step made of it."""
        self._copy(update, self._after, ("param", "weight_remainder"))
        self._blocks += _blocks(update).numel()
        self._elements += telemetry.observed_count(update.start, update.param.numel(), update.observed_below)

    def _copy(self, update: TensorUpdate, room: TensorUpdate, names: tuple[str, ...]) -> None:
        blocks = _blocks(update)
        for name in names:
            values, target = getattr(update, name), getattr(room, name)
            if values is not None and blocks.numel():
                start = self._blocks * BLOCK_ELEMENTS
                copy_blocks(values, blocks, target[start : start + blocks.numel() * BLOCK_ELEMENTS])

    def add_up(self) -> None:
        """Adds the sums of what was copied to the row, and forgets it."""
        count, settings, elements = self._blocks * BLOCK_ELEMENTS, self._before.settings, self._elements
        self._blocks = self._elements = 0
        if not count:
            return
        before = self._before.part(0, count)
        weight, momentum = storage.decode(before)
        factor = rule.gradient_factor(settings, weight.dtype)
        grad = torch.mul(before.grad, factor, out=self._scratch.grad[:count])
        direction = torch.mul(momentum, settings.beta1, out=self._scratch.change[:count])
        add_product(direction, grad, 1 - settings.beta1, self._scratch.one)
        new_momentum = torch.mul(momentum, settings.beta2, out=self._scratch.momentum[:count])
        add_product(new_momentum, grad, 1 - settings.beta2, self._scratch.one)
        direction.sign_()
        if settings.skip_nonfinite and not is_moderate(momentum, grad):
            finite = grad.isfinite()
            direction = torch.where(finite, direction, 0.0)
            new_momentum = torch.where(finite, new_momentum, momentum)
        stored = storage.decode(self._after.part(0, count))[0]
        telemetry.observe(self._sums, settings, elements, weight, grad, momentum, stored, new_momentum, direction)


def _blocks(update: TensorUpdate) -> Tensor:
    return telemetry.observed_blocks(update.start, update.param.numel(), update.observed_below)


def _room(values: Tensor) -> Tensor:
    return values.new_empty(BLOCKS * BLOCK_ELEMENTS)


def copy_blocks(values: Tensor, blocks: Tensor, target: Tensor) -> None:
    """Writes the blocks with these numbers one after the other; a shorter last one is filled up with zeros."""
    if blocks.numel() == 1:  # of most biases and norms: plain slices take a third of the time
        first = int(blocks) * BLOCK_ELEMENTS
        piece = values[first : first + BLOCK_ELEMENTS]
        if piece.numel() < BLOCK_ELEMENTS:
            target.zero_()
        target[: piece.numel()].copy_(piece)
        return
    whole, rest = divmod(values.numel(), BLOCK_ELEMENTS)
    rows = target.view(-1, BLOCK_ELEMENTS)
    if rest and blocks[-1] == whole:
        rows[-1].zero_()[:rest].copy_(values[whole * BLOCK_ELEMENTS :])
        blocks, rows = blocks[:-1], rows[:-1]
    torch.index_select(values[: whole * BLOCK_ELEMENTS].view(-1, BLOCK_ELEMENTS), 0, blocks, out=rows)
