"""LionGuard, the Lightning callback: connects the hooks of a Trainer to monitors, rules and recovery."""

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lion_lightning.errors import check_flag, check_number
from lion_lightning.guard import preflight
from lion_lightning.guard.events import NOT_LOGGED, Event, EventLog, TelemetryReader, Trace, metrics, report
from lion_lightning.guard.gate import clip_norm
from lion_lightning.guard.lr_warmup import LinearWarmup, WarmupHook, warmup_length
from lion_lightning.guard.preflight import MIN_BATCH_SIZE, EffectiveBatch, NoiseScale, OnSmallBatch
from lion_lightning.guard.reading import Reading
from lion_lightning.guard.recovery import OnDivergence, Recovery, Remedy, Treated
from lion_lightning.guard.rules import RULES, StuckMomentum, Thresholds
from lion_lightning.guard.step_monitor import Losses, StepMonitor
from lion_lightning.lightning import total_steps
from lion_lightning.optim import Lion

Manual = Literal["watch", "act"]
FORMAT = 4
"""Of the state in checkpoints."""
OnBadLoss = Literal["note", "skip", "ignore"]
WHAT_TO_DO = "Lower the learning rate, warm up for longer (warmup_steps), or look for bad samples near this step"

log = logging.getLogger(__name__)


class TrainingStopped(RuntimeError):
    """The guard ended a run that could not go on. The message says what was seen and what to do.

    A command line may exit with `exit_code`.
    """

    exit_code = 42


Hook = TypeVar("Hook", bound=Callable[..., Any])


def harmless(hook: Hook) -> Hook:
    """Turns the guard off, with one message, when a hook of it meets what it did not expect: training goes on.

    `TrainingStopped` passes. With several processes every error passes: one of them alone would leave the others
    waiting in the sum over ranks.
    """

    @functools.wraps(hook)
    def call(self: "LionGuard", trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if failure := next((monitor.failure for monitor in self.monitors if monitor.failure), None):
            self.turn_off(failure)
        if self.is_off:
            return
        try:
            hook(self, trainer, *args, **kwargs)
        except TrainingStopped:
            raise
        except Exception as error:
            if trainer.world_size > 1:
                raise
            self.turn_off(f"{hook.__name__}: {type(error).__name__}: {error}")

    return cast(Hook, call)


class LionGuard(Callback):
    """Checks settings, warms up, counts the effective batch, gates faulty steps, detects divergence and recovers.

    Works with any torch optimizer, so that a control run gets the same treatment; rules that are special to Lion's
    update are left out for others. The gate acts within each step, on the device. All other rules look at readings that
    reach the host a step late, so nothing waits for them; every rank decides from the same sums.

    Example::

        Trainer(callbacks=[LionGuard()])

    Args:
        warmup_steps: optimizer steps of linear warm-up of any optimizer, or below 1 a share of the run; 0 leaves the
            learning rate alone. None: 30 % of the run, at most 2,000 steps (docs/experiments.md#warm_up).
            The same for every optimizer.
        min_batch_size: samples that an optimizer step should have.
        on_small_batch: below it, "warn" once, "accumulate" more micro-batches, or "error".
        on_bad_loss: steps whose loss is far above the others are counted ("note"), and skipped if isolated ("skip");
            "ignore" ignores them.
        on_divergence: "recover" (rewind, rewind at half the learning rate, stop), "stop", "warn" or "ignore".
        gate: whether outliers are clipped and non-finite steps skipped.
        disabled: rules that neither act nor report, of `rules.RULES`: "nonfinite", "outlier", "bad_loss",
            "stuck_momentum", "divergence", "dead", "cosine", "unmoved", "near_bound", "batch_size", "settings".
        dry_run: report what would be done and do nothing; warm-up stays on.
        thresholds: limits of all rules.
        telemetry_every: optimizer steps between `lion/*` samples; 0 for none.
        checkpoint_snapshots: whether checkpoints include the snapshots (a model and its optimizer state each), so
            that a rewind right after a resume goes back as far as it would have without; never of sharded parameters.
        samples: a function from a batch to its number of samples, for batches whose structure does not tell.
        manual_optimization: under manual optimization, or with several optimizers, only "watch" and warn, or "act" too.
        trace: a CSV file for every step's readings, input of `lion-replay-guard`; None for none.

    Raises:
        ValueError: an argument is not allowed.
        TrainingStopped: during training, when no remedy is left.
    """

    def __init__(
        self,
        warmup_steps: float | None = 0,
        min_batch_size: int = MIN_BATCH_SIZE,
        on_small_batch: OnSmallBatch = "warn",
        on_bad_loss: OnBadLoss = "note",
        on_divergence: OnDivergence = "warn",
        gate: bool = True,
        disabled: Sequence[str] = (),
        dry_run: bool = False,
        thresholds: Thresholds | None = None,
        telemetry_every: int = 100,
        checkpoint_snapshots: bool = False,
        trace: str | Path | None = None,
        samples: Callable[[Any], int] | None = None,
        manual_optimization: Manual = "watch",
    ) -> None:
        for name, value in (
            ("min_batch_size", min_batch_size),
            ("warmup_steps", 0 if warmup_steps is None else warmup_steps),
            ("telemetry_every", telemetry_every),
        ):
            check_number(name, value, "[0, inf)")
        choices: tuple[tuple[str, str, Any], ...] = (
            ("on_small_batch", on_small_batch, OnSmallBatch),
            ("manual_optimization", manual_optimization, Manual),
            ("on_bad_loss", on_bad_loss, OnBadLoss),
            ("on_divergence", on_divergence, OnDivergence),
        )
        for name, choice, literal in choices:
            if choice not in get_args(literal):
                raise ValueError(f"{name} must be one of {', '.join(get_args(literal))}, got {choice!r}")
        for name, flag in (("gate", gate), ("dry_run", dry_run), ("checkpoint_snapshots", checkpoint_snapshots)):
            check_flag(name, flag)
        if thresholds is not None and not isinstance(thresholds, Thresholds):
            raise ValueError(f"thresholds must be a lion_lightning.guard.rules.Thresholds, got {thresholds!r}")
        if samples is not None and not callable(samples):
            raise ValueError(f"samples must be a function from a batch to its number of samples, got {samples!r}")
        if isinstance(disabled, str) or not isinstance(disabled, Collection) or not set(disabled) <= RULES.keys():
            raise ValueError(f"disabled must be a list of rules of {', '.join(RULES)}, got {disabled!r}")
        self.disabled = frozenset(disabled) | ({"bad_loss"} if on_bad_loss == "ignore" else set())
        self.warmup_steps, self.min_batch_size, self.on_small_batch = warmup_steps, min_batch_size, on_small_batch
        self.on_bad_loss, self.on_divergence, self.gates, self.acts = on_bad_loss, on_divergence, gate, not dry_run
        self.thresholds = thresholds or Thresholds()
        self.telemetry_every, self.checkpoint_snapshots = telemetry_every, checkpoint_snapshots
        self.trace = None if trace is None else Trace(trace)
        self.samples, self.manual_optimization = samples, manual_optimization
        self.monitors: list[StepMonitor] = []
        self._stage: str | None = None
        self._loaded: dict[str, Any] | None = None  # before there were optimizers
        self._reset()

    def _reset(self) -> None:
        self.is_off = False  # whether the guard has turned itself off
        self.warmup = LinearWarmup(0)  # of the first optimizer
        self.batch, self.noise, self.losses = EffectiveBatch(self.min_batch_size), NoiseScale(), Losses()
        self.recovery = self._new_recovery()
        self.event_log, self.steps = EventLog(), 0
        self._final: dict[str, Any] | None = None  # at the end of training
        self._telemetry: TelemetryReader | None = None
        self._warming: list[WarmupHook] = []  # of a guard that is off
        self._lion_metrics: dict[str, float] = {}  # not logged yet
        self._latest = Reading()
        self._samples = self._micro_samples = 0
        self._stepped = self._loss_compares = self._was_small = self._losses_are_read = self._keeps_anew = False

    def _new_recovery(self) -> Recovery:
        return Recovery(self.thresholds, self.on_divergence, acts=self.acts, gates=self.gates, disabled=self.disabled)

    @property
    def events(self) -> list[Event]:
        """What was seen and done, in order."""
        return self.event_log.events

    def is_healthy(self) -> bool:
        """Whether the run may be saved as one to continue from; a guard that is off has no say."""
        return self.is_off or self.recovery.is_healthy()

    def has_restored(self) -> bool:
        """Whether weights were put back since the last validation began, which measured others."""
        return self.recovery.has_restored

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settles the accumulation before optimizers, schedules and loaders are made from it."""
        self._stage = stage
        if stage != "fit":
            return
        self._reset()
        if self.on_small_batch != "warn" and self.acts and "batch_size" not in self.disabled:
            message = preflight.raise_accumulation(trainer, self.on_small_batch, self.min_batch_size)
            if message is not None:
                self._report_once(trainer, "accumulate", message)

    @override
    @harmless
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches to the optimizers; by now the data are there, and a resumed run has its state."""
        loaded, self._loaded = self._loaded, None
        optimizers = [optimizer for optimizer in trainer.optimizers if any(g["params"] for g in optimizer.param_groups)]
        steps = total_steps(trainer)
        length = warmup_length(self.warmup_steps, steps)
        self.steps = trainer.global_step
        self._watch(trainer, pl_module, optimizers, length)
        if loaded is not None and self._restore(loaded):
            self._catch_up(trainer, length)
        elif self.monitors:
            if loaded is None and self.steps:
                report(f"LionGuard starts at step {self.steps} without a state of its own; warm-up counts from step 0.")
            size, clip = preflight.batch_size(trainer), trainer.gradient_clip_val
            run = preflight.RunSettings(steps, self.warmup.warmup_steps, size, clip, self.gates, self.min_batch_size)
            for finding in [found for optimizer in optimizers for found in preflight.inspect(optimizer, run)]:
                self._report_once(trainer, finding.kind, finding.message)
        if self.monitors:
            self.recovery.keep(self.steps, trusted=True)

    def _watch(
        self, trainer: Trainer, pl_module: LightningModule, optimizers: Sequence[Optimizer], warmup_steps: int
    ) -> None:
        """Makes a monitor for each optimizer, and gives the recovery what it restores."""
        plain = len(optimizers) == 1 and pl_module.automatic_optimization
        acts = self.acts and (plain or self.manual_optimization == "act")
        warmups = [LinearWarmup(warmup_steps) for _ in optimizers] or [LinearWarmup(warmup_steps)]
        self.warmup = warmups[0]
        for each in warmups:
            each.step = self.steps
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        # A GradScaler scales the loss; with several optimizers it is not known whose loss it is.
        self._loss_compares = not scaled and plain
        self.monitors = [
            StepMonitor(
                optimizer,
                self.thresholds,
                warmup,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
                reduce=partial(trainer.strategy.reduce, reduce_op="sum") if trainer.world_size > 1 else None,
                acts=acts and self.gates,
                scaled=scaled,
                skips_bad_losses=self.on_bad_loss == "skip",
                disabled=self.disabled,
                contains_errors=trainer.world_size == 1,
            )
            for optimizer, warmup in zip(optimizers, warmups, strict=False)
        ]
        lion = next((optimizer for optimizer in optimizers if isinstance(optimizer, Lion)), None)
        self._telemetry = TelemetryReader(lion, self.telemetry_every) if lion and self.telemetry_every else None
        foreign = {type(optimizer).__name__ for optimizer in optimizers if not isinstance(optimizer, Lion)}
        if foreign:
            left_out = "the rules of Lion's update are left out (stuck momentum, cosine, dead units, lion/* metrics)"
            report(f"LionGuard: {', '.join(sorted(foreign))}: {left_out}", logging.INFO)
        self.recovery.acts = acts
        self.recovery.monitors, self.recovery.optimizers = self.monitors, optimizers
        self.recovery.module = pl_module

    def _catch_up(self, trainer: Trainer, warmup_steps: int) -> None:
        """After a resume: brings a state that is older than the run up to it, and the warm-up to what is asked for."""
        if len(self.monitors) == 1:  # the state of a guard that was off is older than the run
            missed = max(0, trainer.global_step - self.steps)
            self.steps, self.warmup.step = self.steps + missed, self.warmup.step + missed
        # A number of steps that was given counts, even if the checkpoint has another.
        is_number = self.warmup_steps is not None and not 0 < self.warmup_steps < 1
        if is_number and warmup_steps != self.warmup.warmup_steps:
            report(f"LionGuard: warmup_steps={warmup_steps}, not {self.warmup.warmup_steps} as in the checkpoint.")
            for monitor in self.monitors:
                monitor.rate.warmup_steps = warmup_steps

    @override
    @harmless
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        for monitor in self.monitors:
            monitor.begin_batch()
        if self._keeps_anew:
            self._keeps_anew = False
            self.recovery.keep(self.steps, trusted=True)
        if self._telemetry is not None:
            self._telemetry.before_step(self.steps + 1)  # gradient release steps inside backward
        self._samples = int(self.samples(batch)) if self.samples is not None else preflight.samples_in(batch)
        if not self.batch.pending:
            self._micro_samples = self._samples
        self.batch.pending += self._samples * trainer.world_size

    @override
    @harmless
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if not pl_module.training:
            self._report_once(trainer, "eval_mode", preflight.EVAL_MODE)
        self.losses.before_backward(loss, self._loss_compares, trainer.accumulate_grad_batches)

    @override
    @harmless
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the gradient of the first of several micro-batches: with the whole one it gives the noise scale."""
        if not self.monitors:
            return
        several = trainer.accumulate_grad_batches > 1 and pl_module.automatic_optimization and self._samples > 0
        if several and self._samples * trainer.world_size == self.batch.pending and self.monitors[0].measures_noise:
            self.losses.micro_square = self.monitors[0].squared_norm() * trainer.accumulate_grad_batches**2

    @override
    @harmless
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not any(group["params"] for group in optimizer.param_groups):
            return  # Lightning's stand-in where configure_optimizers returned None
        if all(monitor.optimizer is not optimizer for monitor in self.monitors):  # set up again in the middle of a run
            self._loaded = None if not self.monitors else self.state_dict()
            self._detach()
            self.on_train_start(trainer, pl_module)
        number = [monitor.optimizer for monitor in self.monitors].index(optimizer)
        if self.monitors[number].is_measured:  # LBFGS and SAM evaluate the loss several times for one step
            self.losses = Losses()
            # They compare these gradients with each other: one alone must not be made smaller.
            self.monitors[number].gate.clips_outliers = False
            return
        if number == 0:
            self.batch.close()
            self.steps += 1
            self._stepped = True
            if self._telemetry is not None:
                self._telemetry.before_step(self.steps)
        clip_val = clip_norm(trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
        facts = (self.steps, self.batch.last, self._micro_samples, self.monitors[number].scheduled_rate())
        # Without a backward, as where `training_step` returned None, nobody misses the gradients.
        if not self.monitors[number].before_step(self.losses, clip_val, facts) and self.losses.share:
            self._report_once(trainer, "no_gradients", preflight.NO_GRADIENTS)
        if number == len(self.monitors) - 1 or pl_module.automatic_optimization:
            self.losses = Losses()
        else:
            self.losses.nonfinite = 0.0  # counted for this optimizer, not for the next one
            self._losses_are_read = True

    @override
    @harmless
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if any(monitor.steps_unseen for monitor in self.monitors):
            self._report_once(trainer, "unseen_steps", preflight.UNSEEN_STEPS)
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if self._losses_are_read:  # by an optimizer of this batch
            self.losses, self._losses_are_read = Losses(), False
        if isinstance(loss, Tensor):
            # Lightning divides the loss of automatic optimization by the number of micro-batches.
            parts = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self.losses.add(loss * parts, self._samples or 1)
        if not self._stepped:
            if len(self.monitors) > 1:  # the others may step alone
                self._react(trainer, flush=False)
            return
        self._stepped = False
        self._read_telemetry(trainer)
        was_small, self._was_small = self._was_small, self.batch.is_small
        if was_small and self._was_small:  # one alone is the rest of an epoch
            self._report_once(trainer, "batch_size", self.batch.advice())
        # Each step of a trial that fails is lost, so its loss is waited for.
        self._react(trainer, flush=self.recovery.trial is not None)
        self.recovery.keep(self.steps)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and self.steps % every == 0:  # 0 means never
            self._log_metrics(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.recovery.has_restored = False

    @override
    @harmless
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.recovery.is_ending = True
        self._react(trainer, flush=True)
        for treated in self.recovery.end(self.steps):
            self._report(trainer, treated, self.steps)
        if self.trace is not None:
            self.trace.flush()
        for monitor in self.monitors:
            if "bad_loss" not in self.disabled and (summary := monitor.rules.bad_loss_summary()) is not None:
                report(f"LionGuard: {summary}.")
        # A GradScaler finds its scale by steps that overflow.
        streak = max((monitor.rules.nonfinite_in_a_row for monitor in self.monitors if not monitor.scaled), default=0)
        may_stop = self.on_divergence in ("recover", "stop") and "nonfinite" not in self.disabled and self.recovery.acts
        if streak >= self.thresholds.nonfinite_steps and may_stop:
            message = f"the last {streak} steps had no finite gradient"
            is_sick = not trainer.strategy.reduce_boolean_decision(all(each.is_finite() for each in self.monitors))
            if is_sick or any(monitor.rules.is_lost for monitor in self.monitors if not monitor.scaled):
                raise TrainingStopped(f"{message}: nothing was learned. {WHAT_TO_DO}")
            report(f"LionGuard: {message}; they were skipped.")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave(trainer)
        if stage == "fit" and self._loaded is not None:  # the run was over: no later one begins with its state
            self._final, self._loaded = self._loaded, None
        self._stage = None

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detaches, as Lightning calls no teardown then. A state loaded for this run is not of the next one."""
        if self._stage == "fit":
            self._loaded = None
        self._leave(trainer)

    def _leave(self, trainer: Trainer) -> None:
        """Leaves the optimizers, and lets go of the snapshots, which are copies of the run."""
        try:
            self._stop_watching(trainer)
        finally:
            self._end_warmups()
            self.recovery.forget()

    @harmless
    def _stop_watching(self, trainer: Trainer) -> None:
        if self.trace is not None:
            self.trace.flush()  # what follows may wait for a device that is broken
            for number, monitor in enumerate(self.monitors):
                for reading in monitor.unread():  # a run that is resumed reads them once more
                    self.trace.add(number, reading)
            self.trace.flush()
        self._detach()

    def _react(self, trainer: Trainer, flush: bool) -> None:
        """Lets the rules look at the readings that have arrived, and carries out the remedies."""
        all_ranks = trainer.strategy.reduce_boolean_decision
        for number, monitor in enumerate(self.monitors):
            while (reading := monitor.read(flush)) is not None:
                if self.trace is not None:
                    self.trace.add(number, reading)
                if number == 0:
                    self._latest = reading
                    small, large = reading.micro_norm * reading.micro_norm, reading.grad_norm * reading.grad_norm
                    self.noise.observe(small, reading.micro_batch_size, large, reading.batch_size)
                is_finite = lambda monitor=monitor: all_ranks(monitor.is_finite())  # noqa: E731
                for treated in self.recovery.process(monitor, reading, is_finite):
                    self._report(trainer, treated, reading.step)
                streak = monitor.rules.nonfinite_in_a_row
                if (
                    streak == self.thresholds.nonfinite_steps
                    and not monitor.scaled
                    and self._module_changes_gradients()
                ):
                    monitor.defers = True
                    monitor.gate.forget()  # the norms were those of other gradients
                    self._report_once(trainer, "late_gradients", preflight.LATE_GRADIENTS)

    def _module_changes_gradients(self) -> bool:
        """Whether the module has hooks that run after the guard's and may change the gradients."""
        hooks = ("on_before_optimizer_step", "configure_gradient_clipping")
        return any(is_overridden(hook, self.recovery.module) for hook in hooks)

    def _report(self, trainer: Trainer, treated: Treated, step: int) -> None:
        symptom = treated.symptom
        self.event_log.add(Event(step, symptom.kind, treated.said, symptom.message), trainer.loggers)
        if treated.remedy is Remedy.STOP and self.recovery.acts:
            raise TrainingStopped(f"{symptom.message}. {WHAT_TO_DO}")

    def _report_once(self, trainer: Trainer, kind: str, message: str) -> None:
        if kind not in self.recovery.ignored and all(event.kind != kind for event in self.events):
            self.event_log.add(Event(self.steps, kind, Remedy.NOTE.value, message), trainer.loggers)

    def _log_metrics(self, trainer: Trainer) -> None:
        """Passes metrics straight to the loggers, with Lightning's step: `log_dict` takes milliseconds for them."""
        found = {
            **metrics(self.monitors, self._latest),
            **{name: value for name, value in self._lion_metrics.items() if name not in NOT_LOGGED},
            "guard/effective_batch_size": self.batch.last,
            "guard/events": sum(event.step > 0 for event in self.events),  # a note on settings is not of a step
            "guard/recoveries": self.recovery.policy.level,
        }
        if math.isfinite(self.noise.value):
            found["guard/gradient_noise_scale"] = self.noise.value
        for logger in trainer.loggers:
            logger.log_metrics({name: float(value) for name, value in found.items()}, step=self.steps - 1)
        self._lion_metrics = {}

    def _read_telemetry(self, trainer: Trainer) -> None:
        if self._telemetry is None or not (found := self._telemetry.read(self.steps)):
            return
        self._lion_metrics |= found
        first = self.monitors[0]
        for name in ("unmoved", "near_bound"):
            symptom = first.rules.averages.observe(name, found.get(f"lion/{name}", math.nan))
            if symptom is not None and name not in self.disabled:
                self._report(trainer, self.recovery.treat(symptom, self.steps, first), self.steps)

    def new_level(self) -> None:
        """For code that changes weights or task on purpose, such as a reset of layers or pruning.

        The loss is compared with its new level from now on, and no rewind goes back to before.
        """
        for monitor in self.monitors:
            monitor.rules.divergence.take_level()
            monitor.rules.stuck_momentum = StuckMomentum(self.thresholds)
        self.recovery.forget()

    def turn_off(self, reason: str) -> None:
        """Takes the guard off the run, which goes on with its warm-up alone; `reason` says what it met."""
        self.is_off = True
        log.debug("LionGuard is off", exc_info=True)
        report(f"LionGuard is off for the rest of this run, which goes on: {reason}")
        with contextlib.suppress(Exception):
            self._warming = [monitor.warmup for monitor in self.monitors if monitor.failure is None]
            self._detach()
            self.recovery.forget()

    def _detach(self) -> None:
        """Leaves the optimizers as they were found but for warm-ups to go on, and keeps the state for `state_dict`."""
        if self.monitors:
            self._final = self.state_dict()
        if self._telemetry is not None:
            self._telemetry.remove()
        for monitor in self.monitors:
            monitor.remove(but_warmup=monitor.warmup in self._warming)
        self.monitors = []

    def _end_warmups(self) -> None:
        for hook in self._warming:
            hook.remove()
        self._warming = []

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have the settings and the state, but no hooks on anybody's optimizer."""
        # Lightning sets "log" and "log_dict", bound methods of the module.
        state = {name: value for name, value in self.__dict__.items() if name not in ("log", "log_dict")}
        state |= {
            "monitors": [],
            "_warming": [],
            "_telemetry": None,
            "losses": Losses(),
            "recovery": self._new_recovery(),
        }
        state["_loaded"] = self.state_dict() if self.monitors else self._loaded
        return state

    def _parts(self) -> dict[str, Any]:
        return dict(warmup=self.warmup, batch=self.batch, losses=self.losses, noise=self.noise, events=self.event_log)

    @override
    def state_dict(self) -> dict[str, Any]:
        finished_or_loaded = self._loaded or self._final
        if finished_or_loaded is not None and not self.monitors:
            return finished_or_loaded
        return {
            "format": FORMAT,
            "steps": self.steps,
            **{name: part.state_dict() for name, part in self._parts().items()},
            "monitors": [monitor.state_dict() for monitor in self.monitors],
            **self.recovery.state_dict(snapshots=self.checkpoint_snapshots),
            "telemetry": None if self._telemetry is None else self._telemetry.state_dict(),
            "lion_metrics": self._lion_metrics,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes effect when training starts. A state that is loaded for a test or a validation is ignored.

        One that is not of this guard, or damaged, is reported, and the guard starts afresh.
        """
        if self._stage not in (None, "fit"):
            return
        if self.monitors:  # a tuner puts the run back
            self._restore(state_dict)
            for monitor in self.monitors:
                monitor.steps_unseen = 0
            self._keeps_anew = True  # later: Lightning restores the optimizers after its callbacks
        elif not isinstance(state_dict, dict):
            report(f"LionGuard starts afresh: its state in the checkpoint is a {type(state_dict).__name__}.")
        elif state_dict.get("monitors") != []:
            self._loaded = state_dict  # others were saved before training, as tuners do

    def _restore(self, state: dict[str, Any]) -> bool:
        """Takes over a state. If it does not fit, reports that, puts the guard back as it was and returns False."""
        before = self.state_dict()
        try:
            self._take_over(state)
        except Exception as error:  # whatever somebody's checkpoint holds
            self._take_over(before)
            report(
                f"LionGuard starts afresh at step {self.steps}; its warm-up counts from step 0. Its state "
                f"in the checkpoint does not fit ({type(error).__name__}: {error})."
            )
            return False
        return True

    def _take_over(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])
        for warmup in [monitor.rate for monitor in self.monitors] or [self.warmup]:
            warmup.load_state_dict(state["warmup"])
        is_ours = state.get("format") == FORMAT
        if is_ours and not isinstance(state["monitors"], list):
            raise TypeError(f"monitors are a {type(state['monitors']).__name__}")
        if not is_ours or len(state["monitors"]) != len(self.monitors):
            report("LionGuard takes over step and warm-up of the checkpoint; its rules start with new histories.")
            return
        self.recovery.load_state_dict(state)
        for monitor, saved in zip(self.monitors, state["monitors"], strict=True):
            monitor.load_state_dict(saved)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        if self._telemetry is not None and state["telemetry"] is not None:
            self._telemetry.load_state_dict(state["telemetry"])
        self._lion_metrics = {name: float(value) for name, value in state.get("lion_metrics", {}).items()}
