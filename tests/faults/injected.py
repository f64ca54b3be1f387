"""The faults: each a callback that ruins a run in one way at a known step."""

from collections.abc import Container
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lion_lightning.optim import layout
from tests.faults.task import CLASSES


class NaNBatch(Callback):
    """Inputs that are not numbers: the loss is NaN, and with it every gradient.

    Args:
        steps: optimizer steps (from 0 on) that are hit.
        rank: None for all.
    """

    def __init__(self, steps: Container[int], rank: int | None = None) -> None:
        self.steps, self.rank = steps, rank

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step in self.steps and self.rank in (None, trainer.global_rank):
            batch[0].fill_(torch.nan)


class LabelNoise(Callback):
    """Every label is another one, always the same other one."""

    def __init__(self, steps: Container[int]) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step in self.steps:
            batch[1].copy_((batch[1] + 3) % CLASSES)


class Outlier(Callback):
    """A gradient many times its size, in a direction that is all wrong."""

    def __init__(self, step: int, factor: float) -> None:
        self.step, self.factor = step, factor

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self.step:
            for param in pl_module.parameters():
                assert param.grad is not None
                param.grad.mul_(-self.factor)


class InfElement(Callback):
    """One element of one gradient is infinite."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self.step:
            grad = next(pl_module.parameters()).grad
            assert grad is not None
            grad.view(-1)[3] = torch.inf


class NaNMomentum(Callback):
    """What a bit flip or another library's bug leaves behind: a NaN in the optimizer's state."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            state = trainer.optimizers[0].state[next(iter(pl_module.parameters()))]
            layout.local(state["exp_avg"]).view(-1)[3] = torch.nan


class ScaledWeights(Callback):
    """All weights become several times as large: what a wrong checkpoint or a careless script does."""

    def __init__(self, step: int, factor: float) -> None:
        self.step, self.factor = step, factor

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            for param in pl_module.parameters():
                param.data.mul_(self.factor)


def every(start: int) -> "range":
    """All steps from `start` on."""
    return range(start, 10**9)
