"""A task small enough to be ruined many times: a student network learns what a teacher network says.

One run takes about two seconds, ends near the same test loss whatever the seed, and feels a poisoned momentum.
"""

import logging
import warnings
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from lion_lightning import Lion, LionGuard
from lion_lightning.guard.callback import TrainingStopped
from lion_lightning.guard.events import Event
from lion_lightning.hyperparams import cosine

STEPS, BATCH, INPUTS, CLASSES = 1000, 64, 16, 8


def network(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(INPUTS, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, CLASSES)
    )


class Student(LightningModule):
    """Learns from labels that a fixed teacher draws.

    Args:
        optimizer: from parameters to an optimizer.
    """

    def __init__(self, optimizer: Any = None, steps: int = STEPS) -> None:
        super().__init__()
        self.net, self.steps = network(128), steps
        self.make_optimizer = optimizer or (lambda params: Lion(params, lr=5e-4, weight_decay=0.1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer: Optimizer = self.make_optimizer(self.parameters())
        schedule = LambdaLR(optimizer, cosine(self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass
class Outcome:
    """What came of a run: its test loss (NaN-proof: infinite where it is not a number), and the guard's diary."""

    loss: float
    steps: int
    events: list[Event] = field(default_factory=list)
    stopped: str | None = None
    model: Student | None = None
    losses: list[float] = field(default_factory=list)
    noticed: list[int] = field(default_factory=list)
    """Optimizer steps after which the events were there."""

    def first(self, kind: str, after: int = 0) -> tuple[Event, int] | None:
        """The first event of a kind about a later step, and the optimizer step after which it was there."""
        pairs = zip(self.events, self.noticed, strict=True)
        return next((pair for pair in pairs if pair[0].kind == kind and pair[0].step > after), None)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]


class Saver(Callback):
    """Writes `step-<n>.ckpt` into a folder after each of the given optimizer steps."""

    def __init__(self, folder: Path, steps: Container[int]) -> None:
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"step-{trainer.global_step}.ckpt")


class Recorder(Callback):
    """Losses of all steps, and the optimizer step after which each event of the guard was there."""

    def __init__(self, guard: LionGuard | None) -> None:
        self.guard = guard
        self.losses: list[float] = []
        self.noticed: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))
        self._note(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._note(trainer)

    def _note(self, trainer: Trainer) -> None:
        new = len(self.guard.events) - len(self.noticed) if self.guard is not None else 0
        self.noticed += [trainer.global_step] * new


def teacher_data(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Inputs (count, 16) and labels (count,), drawn by a teacher that is the same in every run."""
    teacher_dice, dice = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    teacher = network(32)
    with torch.no_grad():
        for param in teacher.parameters():
            param.copy_(torch.randn(param.shape, generator=teacher_dice) * (6 / max(1, param[0].numel())) ** 0.5)
        inputs = torch.randn(count, INPUTS, generator=dice)
        labels = torch.multinomial(teacher(inputs).softmax(-1), 1, generator=dice)
    return inputs, labels.squeeze(1)


def train(
    seed: int,
    guard: LionGuard | None,
    faults: Sequence[Callback] = (),
    optimizer: Any = None,
    steps: int = STEPS,
    saver: Saver | None = None,
    resume: tuple[Path, int] | None = None,
    callbacks_after: Sequence[Callback] = (),
    **options: Any,
) -> Outcome:
    """One run of the task; the same seed gives the same data, order and weights, with or without guard and faults.

    Args:
        resume: a checkpoint and the optimizer steps it was written after.
        callbacks_after: come after the guard, while faults come before it.
        options: of the Trainer.
    """
    _quiet()
    seed_everything(seed, verbose=False)
    model, recorder = Student(optimizer, steps), Recorder(guard)
    consumed = resume[1] * BATCH if resume is not None else 0
    train_set = TensorDataset(*(tensor[consumed:] for tensor in teacher_data(seed, STEPS * BATCH)))
    test = teacher_data(10_000, 4096)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*faults, *(one for one in (guard, saver) if one is not None), *callbacks_after, recorder],
        **{"log_every_n_steps": 50, **options},
    )
    stopped = None
    try:
        checkpoint = resume[0] if resume is not None else None
        trainer.fit(model, DataLoader(train_set, batch_size=BATCH), ckpt_path=checkpoint, weights_only=True)
    except TrainingStopped as stop:
        stopped = str(stop)
    with torch.no_grad():
        loss = float(cross_entropy(model.net(test[0]), test[1]))
    events = list(guard.events) if guard is not None else []
    loss = loss if loss == loss else float("inf")
    return Outcome(loss, trainer.global_step, events, stopped, model, recorder.losses, recorder.noticed)


def _quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
