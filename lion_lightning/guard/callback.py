"""LionGuard: the Lightning callback. It feeds the policies of this folder and does what they say."""

import math
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lion_lightning.guard import preflight
from lion_lightning.guard.arguments import check_choice, check_count
from lion_lightning.guard.batch_size import MIN_BATCH_SIZE, ON_SMALL_BATCH, EffectiveBatch, OnSmallBatch
from lion_lightning.guard.events import Diary, Event, remark
from lion_lightning.guard.figures import TelemetryReader, guard_figures, learning_rates
from lion_lightning.guard.micro_batch import loss_of, samples_in
from lion_lightning.guard.monitors import Symptom
from lion_lightning.guard.noise_scale import NoiseScale
from lion_lightning.guard.readings import Reading
from lion_lightning.guard.recovery import ON_DIVERGENCE, OnDivergence, Remedy
from lion_lightning.guard.thresholds import Thresholds
from lion_lightning.guard.trace import Trace
from lion_lightning.guard.trainer import clip_norm, run_settings, sees_final_gradients, settle_batch, warmup_length
from lion_lightning.guard.treatment import Treatment
from lion_lightning.guard.warmup import LinearWarmup
from lion_lightning.guard.watch import Losses, OptimizerWatch
from lion_lightning.optim import Lion

WHAT_TO_DO = (
    "Lower the learning rate, warm up for longer (guard.warmup_steps), or look for bad samples near this step; "
    "train.py has written no checkpoint since the run looked sick"
)
NO_GRADIENTS = (
    "no gradients are there when the optimizer steps (are they released in backward?): the guard sees the loss alone, "
    "and cannot gate steps"
)


class TrainingStopped(RuntimeError):
    """The guard ended a run that could not go on. The message says what was seen and what to do.

    `train.py` exits with `exit_code` when it meets one.
    """

    exit_code = 42


class LionGuard(Callback):
    """Check the settings, warm up, count the real batch, gate bad steps, notice sickness, and recover from it.

    Works with any torch optimizer, so that a control run gets the same treatment; what is special to Lion's update is
    left out for others::

        Trainer(callbacks=[LionGuard()])

    The gate acts within each step, on the device. All other rules look at readings that reach the host a step late, so
    nothing waits for it, and at several together where nothing is going on (`thresholds.look_every`); every rank
    decides from the same sums.

    Args:
        warmup_steps: optimizer steps of linear warm-up, or below 1 a share of the run. None: long enough for the
            momentum to fill, `2 / (1 - beta2)` of Lion, or 1 % of the run if that is more, but never more than 10 % of
            the run. The same for every optimizer.
        min_batch_size: samples that an optimizer step should have.
        on_small_batch: below it, "warn" once, "accumulate" more micro-batches, or "error".
        on_divergence: "recover" (rewind, rewind at half the rate, stop), "stop" or "warn".
        gate: whether outliers are clipped and non-finite steps skipped.
        dry_run: note what would be done and do nothing; warm-up stays on.
        thresholds: of all rules.
        telemetry_every: optimizer steps between `lion/*` samples; 0 for none.
        checkpoint_snapshots: whether checkpoints hold the snapshots too (a model and its optimizer state each), so
            that a rewind right after a resume goes back as far as it would have without.
        trace: a CSV file for every step's readings, which `scripts/replay_guard.py` takes; None for none.

    Raises:
        ValueError: an argument is not allowed.
        TrainingStopped: during training, when the ladder ends.
    """

    def __init__(
        self,
        warmup_steps: float | None = None,
        min_batch_size: int = MIN_BATCH_SIZE,
        on_small_batch: OnSmallBatch = "warn",
        on_divergence: OnDivergence = "recover",
        gate: bool = True,
        dry_run: bool = False,
        thresholds: Thresholds | None = None,
        telemetry_every: int = 100,
        checkpoint_snapshots: bool = False,
        trace: str | Path | None = None,
    ) -> None:
        check_count("min_batch_size", min_batch_size)
        if warmup_steps is not None:
            check_count("warmup_steps", warmup_steps)
        check_count("telemetry_every", telemetry_every)
        check_choice("on_small_batch", on_small_batch, ON_SMALL_BATCH)
        check_choice("on_divergence", on_divergence, ON_DIVERGENCE)
        self.warmup_steps, self.on_small_batch, self.acts = warmup_steps, on_small_batch, not dry_run
        self.gates, self.telemetry_every, self.checkpoint_snapshots = gate, telemetry_every, checkpoint_snapshots
        self.thresholds = limits = thresholds or Thresholds()
        self._may_wait = min(limits.look_every, limits.poison_steps, limits.divergence_steps)
        """Readings; with more, a rule that tells from so few steps in a row would be late."""
        self.min_batch_size, self.on_divergence = min_batch_size, on_divergence
        self.trace = None if trace is None else Trace(trace)
        self.watches: list[OptimizerWatch] = []
        self._restored: dict[str, Any] | None = None
        """A state that waits for the optimizers."""
        self._start_afresh()

    def _start_afresh(self) -> None:
        self.warmup = LinearWarmup(0)  # of the first optimizer
        self.batch, self.noise, self.losses = EffectiveBatch(self.min_batch_size), NoiseScale(), Losses()
        self.treatment = Treatment(self.thresholds, self.on_divergence, acts=self.acts, gates=self.gates)
        self.diary, self.steps = Diary(), 0
        self._final: dict[str, Any] | None = None
        """The state at the end of training."""
        self._telemetry: TelemetryReader | None = None
        self._lion_figures: dict[str, float] = {}
        self._latest = Reading()
        self._samples = self._micro_samples = 0
        self._loss: Tensor | float | None = None
        """What backward was called on, where it is what `training_step` returned: read once, not twice."""
        self._stepped = self._judges_loss = False
        self._alert = True
        """Whether a rule was on its way to a verdict at the last look."""

    @property
    def events(self) -> list[Event]:
        """What was seen and done, in order."""
        return self.diary.events

    def is_healthy(self) -> bool:
        """Whether the run may be saved as one to go on from."""
        return self.treatment.is_healthy()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settles the accumulation before optimizers, schedules and loaders are made from it."""
        if stage != "fit":
            return
        self._start_afresh()
        if self.on_small_batch != "warn":
            message = settle_batch(trainer, self.on_small_batch, self.batch.min_batch_size)
            if message is not None:
                self._tell_once(trainer, "accumulate", message)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        restored, self._restored = self._restored, None
        if restored is None:
            steps = trainer.estimated_stepping_batches
            self.warmup = LinearWarmup(warmup_length(self.warmup_steps, trainer.optimizers, steps))
        warmups = [self.warmup, *(LinearWarmup(self.warmup.warmup_steps) for _ in trainer.optimizers[1:])]
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        # With a GradScaler the loss comes scaled; with several optimizers nobody knows whose it is.
        self._judges_loss = not scaled and len(trainer.optimizers) == 1 and pl_module.automatic_optimization
        self.watches = [
            OptimizerWatch(
                optimizer,
                self.thresholds,
                warmup,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
                reduce=partial(trainer.strategy.reduce, reduce_op="sum") if trainer.world_size > 1 else None,
                acts=self.acts and self.gates,
                scaled=scaled,
                joins_step=self._judges_loss and trainer.world_size == 1 and sees_final_gradients(trainer, self),
            )
            for optimizer, warmup in zip(trainer.optimizers, warmups, strict=True)
        ]
        lion = next((optimizer for optimizer in trainer.optimizers if isinstance(optimizer, Lion)), None)
        self._telemetry = TelemetryReader(lion, self.telemetry_every) if lion and self.telemetry_every else None
        foreign = {type(optimizer).__name__ for optimizer in trainer.optimizers if not isinstance(optimizer, Lion)}
        if foreign:
            remark(
                f"{', '.join(sorted(foreign))}: no rule of Lion's update (poison, cosine, dead units, lion/* figures)"
            )
        self.treatment.watches, self.treatment.module = self.watches, pl_module
        if restored is not None:
            self._restore(restored)
        else:
            self._preflight(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run has its optimizer state by now."""
        self.treatment.keep(self.steps, trusted=True)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._samples = samples_in(batch)
        if not self.batch.pending:
            self._micro_samples = self._samples
        self.batch.add(self._samples * trainer.world_size)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        accumulate = trainer.accumulate_grad_batches
        value = self.losses.before_backward(loss, self._judges_loss, accumulate)
        self._loss = value if self._judges_loss and accumulate == 1 else None

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first micro-batch of several: its gradient beside the whole one gives the noise scale."""
        many = trainer.accumulate_grad_batches > 1 and pl_module.automatic_optimization
        if many and self._samples * trainer.world_size == self.batch.pending and self.watches[0].measures_noise:
            self.losses.micro_square = self.watches[0].squared_norm() * trainer.accumulate_grad_batches**2

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        number = 0
        while self.watches[number].optimizer is not optimizer:
            number += 1
        if number == 0:
            self.batch.close()
            self.steps += 1
            self._stepped = True
            if self._telemetry is not None:
                self._telemetry.before_step(self.steps)
        facts = (self.steps, self.batch.last, self._micro_samples)
        if not self.watches[number].before_step(self.losses, clip_norm(trainer), facts):
            self._tell_once(trainer, "no_gradients", NO_GRADIENTS)
        if number == len(self.watches) - 1 or pl_module.automatic_optimization:
            self.losses = Losses()
        else:
            self.losses.nonfinite = 0.0  # it is this optimizer's, not the next one's

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = loss_of(outputs)
        if loss is not None:
            self.losses.add(loss if self._loss is None else self._loss, self._samples)
        if not self._stepped:
            return
        self._stepped = False
        self._read_telemetry(trainer)
        if self.batch.is_small:
            self._tell_once(trainer, "batch_size", self.batch.advice())
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        logs = bool(every) and self.steps % every == 0  # 0 is Lightning's word for never
        if logs or self._has_news() or self.treatment.ring.is_due(self.steps):
            self._react(trainer, flush=False)
            self._alert = any(watch.monitors.is_suspicious() for watch in self.watches)
            self.treatment.keep(self.steps)
        if logs:
            self._log(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._react(trainer, flush=True)
        if self.trace is not None:
            self.trace.flush()
        streak = max(watch.monitors.nonfinite_in_a_row for watch in self.watches)
        if streak >= self.thresholds.nonfinite_steps:
            raise TrainingStopped(f"the last {streak} steps had no finite gradient: nothing was learned. {WHAT_TO_DO}")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lightning tears nothing down then."""
        if self.trace is not None:
            self.trace.flush()  # what follows may wait for a device that is broken
            for number, watch in enumerate(self.watches):
                for reading in watch.unread():  # a run that is resumed reads them once more
                    self.trace.add(number, reading)
            self.trace.flush()
        self._detach()

    def _has_news(self) -> bool:
        """Whether the rules should look now: many readings wait, the gate has acted, or a rule is on its way.

        So a verdict comes when it would have come had they looked at every step; on a GPU one about gated steps may be
        late, as nobody knows of the gate before the reading is there. In a cold cache a look at five readings takes
        little longer than at one.
        """
        return self._alert or any(watch.mailbox.should_be_read(self._may_wait) for watch in self.watches)

    def _react(self, trainer: Trainer, flush: bool) -> None:
        """Lets the rules look at the readings that have arrived, and does what the ladder says."""
        for number, watch in enumerate(self.watches):
            while (reading := watch.read(flush)) is not None:
                self._observe(number, reading)
                symptoms = watch.monitors.observe(reading)
                if not reading.is_finite:
                    symptoms += self.treatment.examine(watch, trainer.strategy.reduce_boolean_decision)
                for symptom in symptoms:
                    self._act(trainer, watch, symptom, reading.step)

    def _observe(self, number: int, reading: Reading) -> None:
        if number == 0:
            self._latest = reading
            if reading.micro_batch_size < reading.batch_size:
                small, large = reading.micro_norm**2, reading.grad_norm**2
                self.noise.observe(small, reading.micro_batch_size, large, reading.batch_size)
        if self.trace is not None:
            self.trace.add(number, reading)

    def _act(self, trainer: Trainer, watch: OptimizerWatch, symptom: Symptom, step: int) -> None:
        remedy, said = self.treatment.treat(symptom, step, watch)
        self.diary.note(Event(step, symptom.kind, said, symptom.message), trainer.loggers)
        if remedy is Remedy.STOP and self.acts:
            raise TrainingStopped(f"{symptom.message}. {WHAT_TO_DO}")

    def _log(self, trainer: Trainer) -> None:
        """Straight to the loggers, with Lightning's step: `log_dict` takes milliseconds for so many figures."""
        figures: dict[str, float | Tensor] = {
            **guard_figures(self.watches[0], self._latest),
            **learning_rates([watch.warmup for watch in self.watches]),
            **self._lion_figures,
            "guard/effective_batch_size": float(self.batch.last),
            "guard/events": float(len(self.events)),
            "guard/rung": float(self.treatment.ladder.rung),
        }
        if math.isfinite(self.noise.value):
            figures["guard/noise_scale"] = self.noise.value
        for logger in trainer.loggers:
            logger.log_metrics({name: float(value) for name, value in figures.items()}, step=trainer.global_step - 1)
        self._lion_figures = {}

    def _read_telemetry(self, trainer: Trainer) -> None:
        """The first Lion's."""
        if self._telemetry is None or not (figures := self._telemetry.read(self.steps)):
            return
        self._lion_figures |= figures
        for name in ("unmoved", "near_bound"):
            gauges = self.watches[0].monitors.gauges
            if symptom := gauges.observe(name, figures.get(f"lion/{name}", math.nan)):
                self._act(trainer, self.watches[0], symptom, self.steps)

    def _preflight(self, trainer: Trainer) -> None:
        settings = run_settings(trainer, self.warmup.warmup_steps, self.gates, self.batch.min_batch_size)
        for watch in self.watches:
            for finding in preflight.inspect(watch.optimizer, settings):
                self._tell_once(trainer, finding.name, finding.message)

    def _tell_once(self, trainer: Trainer, kind: str, message: str) -> None:
        if all(event.kind != kind for event in self.events):
            self.diary.note(Event(self.steps, kind, Remedy.NOTE.value, message), trainer.loggers)

    def _detach(self) -> None:
        """Leaves the optimizers alone, and remembers the state for whoever asks later."""
        if self.watches:
            self._final = self.state_dict()
        if self._telemetry is not None:
            self._telemetry.remove()
        for watch in self.watches:
            watch.remove()
        self.watches = []

    @override
    def state_dict(self) -> dict[str, Any]:
        finished_or_loaded = self._restored or self._final
        if finished_or_loaded is not None and not self.watches:
            return finished_or_loaded
        ring = self.treatment.ring.state_dict() if self.checkpoint_snapshots else []
        return {
            "steps": self.steps,
            "warmup": self.warmup.state_dict(),
            "watches": [watch.state_dict() for watch in self.watches],
            "batch": self.batch.state_dict(),
            "losses": self.losses.state_dict(),
            "noise": self.noise.state_dict(),
            "ladder": self.treatment.ladder.state_dict(),
            "events": self.diary.state_dict(),
            "snapshots": ring,
            "telemetry": None if self._telemetry is None else self._telemetry.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes effect when the optimizers are there: before `on_fit_start`, or after it under FSDP2."""
        if self.watches:
            self._restore(state_dict)
        else:
            self._restored = state_dict

    def _restore(self, state: dict[str, Any]) -> None:
        self.steps, self._alert = state["steps"], True
        self.warmup.load_state_dict(state["warmup"])
        for watch, saved in zip(self.watches, state["watches"], strict=True):
            watch.load_state_dict(saved)
        self.batch.load_state_dict(state["batch"])
        self.losses.load_state_dict(state["losses"])
        self.noise.load_state_dict(state["noise"])
        self.treatment.ladder.load_state_dict(state["ladder"])
        self.diary.load_state_dict(state["events"])
        self.treatment.ring.load_state_dict(state["snapshots"])
        if self._telemetry is not None and state["telemetry"] is not None:
            self._telemetry.load_state_dict(state["telemetry"])
