"""One kind of healthy training, and how a run of it is made with and without the guard.

A kind looks sick to a rule that judges by loss or gradient norm alone: its loss rises on purpose, a rare batch has a
large loss, gradients have heavy tails. Left alone it ends well, so a guard must leave it alone.
"""

import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from lion_lightning import Lion, LionGuard
from lion_lightning.guard.callback import TrainingStopped

Batch = Any
Schedule = Callable[[int], Callable[[int], float]]
OPTIMIZERS = ("lion", "adamw")
HELD_OUT_SEED = 10_000


def cosine_to_a_tenth(steps: int) -> Callable[[int], float]:
    """Factors of the learning rate that fall from 1 to 0.1 over `steps` steps."""
    return lambda step: 0.55 + 0.45 * float(torch.cos(torch.tensor(3.14159 * min(1.0, step / steps))))


def constant(steps: int) -> Callable[[int], float]:
    """The full learning rate at every step."""
    return lambda step: 1.0


class HealthyModule(LightningModule):
    """Base of all modules of the zoo: counts batches and takes optimizer and schedule from the kind.

    Attributes:
        steps: batches of the whole run.
        batches: batches seen so far, the present one not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.batches = 1, 0
        self.make_optimizer: Callable[[Iterable[Tensor]], Optimizer] = Lion
        self.schedule: Schedule = cosine_to_a_tenth

    @property
    def progress(self) -> float:
        """Share of the run that is over, in [0, 1)."""
        return self.batches / self.steps

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches += 1

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.make_optimizer([param for param in self.parameters() if param.requires_grad])
        schedule = LambdaLR(optimizer, self.schedule(self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass(frozen=True)
class Kind:
    """One kind of healthy training.

    Attributes:
        name: of the kind, unique.
        looks_sick: what a naive rule would take for a fault.
        make_module: builds the module under the run's seed.
        make_data: from seed and number of batches to the batches of one epoch.
        metric: of the trained module, on held-out data.
        metric_name: what the metric is.
        higher_is_better: whether a higher metric is better.
        steps: batches of the run, all epochs together.
        epochs: over the same batches.
        lion_lr, adamw_lr: learning rates.
        lion_betas: of Lion; adversaries need a short momentum.
        schedule: factor of the learning rate at each optimizer step.
        callbacks: makes the callbacks that this kind of training uses, besides the guard.
        trainer: further options of the Trainer.
    """

    name: str
    looks_sick: str
    make_module: Callable[[], HealthyModule]
    make_data: Callable[[int, int], Sequence[Batch]]
    metric: Callable[[Any], float]
    metric_name: str
    higher_is_better: bool = False
    steps: int = 600
    epochs: int = 1
    lion_lr: float = 1e-3
    adamw_lr: float = 3e-3
    lion_betas: tuple[float, float] = (0.9, 0.99)
    schedule: Schedule = cosine_to_a_tenth
    callbacks: Callable[[], Sequence[Callback]] = tuple
    trainer: dict[str, Any] = field(default_factory=dict)

    def optimizer(self, name: str) -> Callable[[Iterable[Tensor]], Optimizer]:
        """Makes "lion" or "adamw" over parameters, with weight decay in the ratio of the learning rates."""
        if name == "lion":
            return lambda params: Lion(params, lr=self.lion_lr, betas=self.lion_betas, weight_decay=0.1)
        return lambda params: AdamW(params, lr=self.adamw_lr, weight_decay=0.02)


@dataclass(frozen=True)
class Outcome:
    """What came of one run.

    Attributes:
        metric: of the kind, on held-out data.
        steps: optimizer steps asked for by the Trainer.
        skipped: of these, steps that left every parameter as it was.
        clipped: steps that the guard says it has clipped.
        rewinds: events in which the guard went back to a snapshot.
        unsaved: steps after which the guard would have kept a checkpoint from being written.
        unsaved_at_end: whether the guard would have kept the end of the run from being saved: the result would be lost.
        ended: message of the guard that ended the run, or the error that came with the guard alone, or None.
        events: kinds of the guard's events after the start, with their numbers.
        messages: the guard's messages after the start, the first of each kind.
        seconds: wall time.
    """

    metric: float
    steps: int
    skipped: int
    clipped: int
    rewinds: int
    unsaved: int
    unsaved_at_end: bool
    ended: str | None
    events: dict[str, int]
    messages: list[str]
    seconds: float


class StepCounter(Callback):
    """Counts optimizer steps: all that are asked for, those that move a parameter, those not fit to be saved."""

    def __init__(self, guard: LionGuard | None) -> None:
        self.guard = guard
        self.asked = self.moved = self.unsaved = 0
        self.unsaved_at_end = False
        self._before: dict[int, list[Tensor]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(self._remember)
            optimizer.register_step_post_hook(self._compare)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.asked += 1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.unsaved += self.guard is not None and not self.guard.is_healthy()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The guard comes before this in the list of callbacks.
        self.unsaved_at_end = self.guard is not None and not self.guard.is_healthy()

    def _remember(self, optimizer: Optimizer, *_: Any) -> None:
        self._before[id(optimizer)] = [param.detach().clone() for param in _parameters(optimizer)]

    def _compare(self, optimizer: Optimizer, *_: Any) -> None:
        pairs = zip(self._before[id(optimizer)], _parameters(optimizer), strict=True)
        self.moved += any(not torch.equal(before, param) for before, param in pairs)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


class LastMetrics(DummyLogger):
    """Keeps the latest value of everything that is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.values.update(metrics)


def train(kind: Kind, optimizer: str, seed: int, guard: LionGuard | None) -> Outcome:
    """One run; the same seed gives the same data, order and initial weights with and without the guard.

    Args:
        kind: of training.
        optimizer: "lion" or "adamw".
        seed: of data, weights and noise.
        guard: a new one, or None.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    started = time.perf_counter()
    batches = kind.make_data(seed, kind.steps // kind.epochs)
    seed_everything(seed, verbose=False)
    module, counter, logged, ended = kind.make_module(), StepCounter(guard), LastMetrics(), None
    module.steps, module.make_optimizer, module.schedule = kind.steps, kind.optimizer(optimizer), kind.schedule
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=kind.epochs,
        logger=logged,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=20,
        callbacks=[*kind.callbacks(), *([] if guard is None else [guard]), counter],
        **kind.trainer,
    )
    try:
        trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    except TrainingStopped as stop:
        ended = str(stop)
    except Exception as error:
        if guard is None:
            raise
        ended = f"the guard raised {type(error).__name__}: {error}"  # the same run without it did not
    events = [] if guard is None else [event for event in guard.events if event.step > 0]
    first = {event.kind: f"{event.kind} at {event.step}: {event.message}; {event.remedy}" for event in events[::-1]}
    with torch.no_grad():
        seed_everything(HELD_OUT_SEED, verbose=False)  # for metrics that draw samples
        metric = kind.metric(module.eval())
    return Outcome(
        metric=metric,
        steps=counter.asked,
        skipped=counter.asked - counter.moved,
        clipped=int(logged.values.get("guard/clipped_steps", 0)),
        rewinds=sum("snapshot" in event.remedy or "rewind" in event.remedy for event in events),
        unsaved=counter.unsaved,
        unsaved_at_end=counter.unsaved_at_end,
        ended=ended,
        events=dict(Counter(event.kind for event in events)),
        messages=list(first.values())[::-1],
        seconds=time.perf_counter() - started,
    )


def dice(seed: int) -> torch.Generator:
    """A generator of its own, so that data do not depend on what else draws random numbers."""
    return torch.Generator().manual_seed(seed)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with GELU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def teacher(seed: int, *widths: int) -> nn.Sequential:
    """A fixed random network that defines a task; the same in every run."""
    network, generator = mlp(*widths), dice(seed)
    with torch.no_grad():
        for param in network.parameters():
            scale = 2.5 / param.shape[1] ** 0.5 if param.ndim > 1 else 0.5
            param.copy_(torch.randn(param.shape, generator=generator) * scale)
    return network.requires_grad_(False)


INPUTS, CLASSES = 16, 8
CLASSIFICATION_TEACHER = teacher(7, INPUTS, 32, CLASSES)


def labelled(generator: torch.Generator, count: int, sharpness: float = 3.0) -> tuple[Tensor, Tensor]:
    """Inputs (count, 16) and labels (count,) in 0 ... 7 that a fixed teacher draws."""
    inputs = torch.randn(count, INPUTS, generator=generator)
    chances = (sharpness * CLASSIFICATION_TEACHER(inputs)).softmax(-1)
    return inputs, torch.multinomial(chances, 1, generator=generator).squeeze(1)


def labelled_batches(seed: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    """`steps` batches of 64 labelled samples."""
    inputs, labels = labelled(dice(seed), 64 * steps)
    return list(zip(inputs.split(64), labels.split(64), strict=True))
