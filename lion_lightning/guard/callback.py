"""LionGuard, the Lightning callback: connects the hooks of a Trainer to monitors, rules and recovery."""

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lion_lightning.guard import preflight
from lion_lightning.guard.events import NOT_LOGGED, Event, EventLog, TelemetryReader, Trace, metrics, report
from lion_lightning.guard.preflight import MIN_BATCH_SIZE, ON_SMALL_BATCH, EffectiveBatch, NoiseScale, OnSmallBatch
from lion_lightning.guard.recovery import ON_DIVERGENCE, OnDivergence, Recovery, Remedy, Treated, Trial
from lion_lightning.guard.rules import RULES, Reading, Thresholds
from lion_lightning.guard.step_monitor import Losses, StepMonitor
from lion_lightning.guard.warmup import LinearWarmup, warmup_length
from lion_lightning.lightning import total_steps
from lion_lightning.optim import Lion

Manual = Literal["watch", "act"]
FORMAT = 4
"""Of the state in checkpoints."""
OnBadLoss = Literal["note", "skip", "ignore"]
ON_BAD_LOSS: tuple[OnBadLoss, ...] = ("note", "skip", "ignore")
WHAT_TO_DO = "Lower the learning rate, warm up for longer (warmup_steps), or look for bad samples near this step"
NO_GRADIENTS = (
    "there are no gradients when the optimizer steps (are they released in backward?): the guard sees the loss alone, "
    "and cannot gate steps"
)
UNSEEN_STEPS = (
    "the optimizer steps without Lightning's hook on_before_optimizer_step (a raw optimizer, as of "
    "self.optimizers(use_pl_optimizer=False)?): the guard does not see these steps; warm-up applies to them"
)

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
        warmup_steps: optimizer steps of linear warm-up, or below 1 a share of the run. None: long enough for the
            momentum to fill, `2 / (1 - beta2)` of Lion, or 1 % of the run if that is more, but never more than 10 % of
            the run. The same for every optimizer.
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
            that a rewind right after a resume goes back as far as it would have without.
        samples: from a batch to its number of samples, where its structure does not determine it.
        manual_optimization: under manual optimization, or with several optimizers, only "watch" and warn, or "act" too.
        trace: a CSV file for every step's readings, input of `scripts/replay_guard.py`; None for none.

    Raises:
        ValueError: an argument is not allowed.
        TrainingStopped: during training, when no remedy is left.
    """

    def __init__(
        self,
        warmup_steps: float | None = None,
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
            ("warmup_steps", warmup_steps or 0),
            ("telemetry_every", telemetry_every),
        ):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        choices: tuple[tuple[str, str, tuple[str, ...]], ...] = (
            ("on_small_batch", on_small_batch, ON_SMALL_BATCH),
            ("manual_optimization", manual_optimization, ("watch", "act")),
            ("on_bad_loss", on_bad_loss, ON_BAD_LOSS),
            ("on_divergence", on_divergence, ON_DIVERGENCE),
        )
        for name, choice, allowed in choices:
            if choice not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {choice!r}")
        if isinstance(disabled, str) or not set(disabled) <= RULES.keys():
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
        self._loaded: dict[str, Any] | None = None
        """A state that was loaded before there were optimizers."""
        self._reset()

    def _reset(self) -> None:
        self.is_off = False
        """Whether the guard has turned itself off."""
        self.warmup = LinearWarmup(0)  # of the first optimizer
        self.batch, self.noise, self.losses = EffectiveBatch(self.min_batch_size), NoiseScale(), Losses()
        self.recovery = Recovery(
            self.thresholds, self.on_divergence, acts=self.acts, gates=self.gates, disabled=self.disabled
        )
        self.event_log, self.steps = EventLog(), 0
        self._final: dict[str, Any] | None = None
        """The state at the end of training."""
        self._telemetry: TelemetryReader | None = None
        self._lion_metrics: dict[str, float] = {}
        self._latest = Reading()
        self._samples = self._micro_samples = 0
        self._stepped = self._loss_compares = False

    @property
    def events(self) -> list[Event]:
        """What was seen and done, in order."""
        return self.event_log.events

    def is_healthy(self) -> bool:
        """Whether the run may be saved as one to continue from."""
        return self.recovery.is_healthy()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settles the accumulation before optimizers, schedules and loaders are made from it."""
        self._stage = stage
        if stage != "fit":
            return
        self._reset()
        if self.on_small_batch != "warn":
            message = preflight.raise_accumulation(trainer, self.on_small_batch, self.min_batch_size)
            if message is not None:
                self._report_once(trainer, "accumulate", message)

    @override
    @harmless
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches to the optimizers; by now the data are there, and a resumed run has its state."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None and not loaded.get("monitors", loaded.get("watches")):
            loaded = None  # saved before training, as tuners do
        optimizers = [optimizer for optimizer in trainer.optimizers if any(g["params"] for g in optimizer.param_groups)]
        plain = len(optimizers) == 1 and pl_module.automatic_optimization
        acts = self.acts and (plain or self.manual_optimization == "act")
        self.recovery.acts = acts
        if loaded is None:
            length = warmup_length(self.warmup_steps, optimizers, total_steps(trainer))
            self.warmup = LinearWarmup(length)
            if trainer.global_step:
                self.steps = self.warmup.step = trainer.global_step
                report(
                    f"LionGuard starts at step {self.steps} without a state of its own, and with the warm-up behind it."
                )
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        # A GradScaler scales the loss; with several optimizers it is not known whose loss it is.
        self._loss_compares = not scaled and plain
        warmups = [self.warmup, *(LinearWarmup(self.warmup.warmup_steps) for _ in optimizers[1:])][: len(optimizers)]
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
            for optimizer, warmup in zip(optimizers, warmups, strict=True)
        ]
        lion = next((optimizer for optimizer in optimizers if isinstance(optimizer, Lion)), None)
        self._telemetry = TelemetryReader(lion, self.telemetry_every) if lion and self.telemetry_every else None
        foreign = {type(optimizer).__name__ for optimizer in optimizers if not isinstance(optimizer, Lion)}
        if foreign:
            left_out = "the rules of Lion's update are left out (stuck momentum, cosine, dead units, lion/* metrics)"
            report(f"LionGuard: {', '.join(sorted(foreign))}: {left_out}", logging.INFO)
        self.recovery.monitors, self.recovery.optimizers = self.monitors, optimizers
        self.recovery.module = pl_module
        if loaded is not None:
            self._restore(loaded)
            self._keep_given_warmup(warmup_length(self.warmup_steps, optimizers, total_steps(trainer)))
        elif self.monitors:
            self._preflight(trainer, optimizers)
        if self.monitors:
            self.recovery.keep(self.steps, trusted=True)

    def _keep_given_warmup(self, length: int) -> None:
        """After a resume: a number of `warmup_steps` that was given counts, even if the checkpoint has another."""
        if self.warmup_steps is None or self.warmup_steps < 1 or length == self.warmup.warmup_steps:
            return
        report(f"LionGuard: warmup_steps={length}, not {self.warmup.warmup_steps} as in the checkpoint.")
        for monitor in self.monitors:
            monitor.warmup.warmup.warmup_steps = length

    def _preflight(self, trainer: Trainer, optimizers: list[Optimizer]) -> None:
        settings = preflight.RunSettings(
            total_steps=total_steps(trainer),
            warmup_steps=self.warmup.warmup_steps,
            batch_size=preflight.batch_size(trainer),
            gradient_clip_val=trainer.gradient_clip_val,
            gate=self.gates,
            min_batch_size=self.min_batch_size,
        )
        for finding in [found for optimizer in optimizers for found in preflight.inspect(optimizer, settings)]:
            self._report_once(trainer, finding.name, finding.message)

    @override
    @harmless
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        for monitor in self.monitors:
            monitor.begin_batch()
        self._samples = self.samples(batch) if self.samples is not None else preflight.samples_in(batch)
        if not self.batch.pending:
            self._micro_samples = self._samples
        self.batch.pending += self._samples * trainer.world_size

    @override
    @harmless
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.losses.before_backward(loss, self._loss_compares, trainer.accumulate_grad_batches)

    @override
    @harmless
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures the gradient of the first of several micro-batches: with the whole one it gives the noise scale."""
        if not self.monitors:
            return
        several = trainer.accumulate_grad_batches > 1 and pl_module.automatic_optimization
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
            return
        if number == 0:
            self.batch.close()
            self.steps += 1
            self._stepped = True
            if self._telemetry is not None:
                self._telemetry.before_step(self.steps)
        by_norm = trainer.gradient_clip_algorithm in (None, "norm")
        clip_val = float(trainer.gradient_clip_val) if trainer.gradient_clip_val and by_norm else None
        facts = (self.steps, self.batch.last, self._micro_samples)
        if not self.monitors[number].before_step(self.losses, clip_val, facts):
            self._report_once(trainer, "no_gradients", NO_GRADIENTS)
        if number == len(self.monitors) - 1 or pl_module.automatic_optimization:
            self.losses = Losses()
        else:
            self.losses.nonfinite = 0.0  # counted for this optimizer, not for the next one

    @override
    @harmless
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if any(monitor.steps_unseen for monitor in self.monitors):
            self._report_once(trainer, "unseen_steps", UNSEEN_STEPS)
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self.losses.add(loss, self._samples or 1)
        if not self._stepped:
            return
        self._stepped = False
        self._read_telemetry(trainer)
        if self.batch.is_small:
            self._report_once(trainer, "batch_size", self.batch.advice())
        # Each step of a trial that fails is lost, so its loss is waited for.
        self._react(trainer, flush=self.recovery.trial is not None)
        self.recovery.keep(self.steps)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and self.steps % every == 0:  # 0 means never
            self._log_metrics(trainer)

    @override
    @harmless
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._react(trainer, flush=True)
        if self.trace is not None:
            self.trace.flush()
        for monitor in self.monitors:
            summary = monitor.rules.bad_loss_summary() if "bad_loss" not in self.disabled else None
            if summary is not None:
                report(f"LionGuard: {summary}.")
        streak = max((monitor.rules.nonfinite_in_a_row for monitor in self.monitors), default=0)
        may_stop = self.on_divergence in ("recover", "stop") and "nonfinite" not in self.disabled
        if streak >= self.thresholds.nonfinite_steps and may_stop:
            raise TrainingStopped(f"the last {streak} steps had no finite gradient: nothing was learned. {WHAT_TO_DO}")

    @override
    @harmless
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()
        self._stage = None

    @override
    @harmless
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detaches, as Lightning calls no teardown then."""
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
                    if reading.micro_batch_size < reading.batch_size:
                        small, large = reading.micro_norm**2, reading.grad_norm**2
                        self.noise.observe(small, reading.micro_batch_size, large, reading.batch_size)
                is_finite = lambda monitor=monitor: all_ranks(monitor.is_finite())  # noqa: E731
                for treated in self.recovery.process(monitor, reading, is_finite):
                    self._report(trainer, treated, reading.step)

    def _report(self, trainer: Trainer, treated: Treated, step: int) -> None:
        symptom = treated.symptom
        self.event_log.add(Event(step, symptom.kind, treated.said, symptom.message), trainer.loggers)
        if treated.remedy is Remedy.STOP and self.recovery.acts:
            raise TrainingStopped(f"{symptom.message}. {WHAT_TO_DO}")

    def _report_once(self, trainer: Trainer, kind: str, message: str) -> None:
        if kind not in self.recovery.ignored and all(event.kind != kind for event in self.events):
            self.event_log.add(Event(self.steps, kind, Remedy.NOTE.value, message), trainer.loggers)

    def _log_metrics(self, trainer: Trainer) -> None:
        """Passes metrics straight to the loggers, with Lightning's step: `log_dict` takes milliseconds for so many."""
        found = {
            **metrics(self.monitors, self._latest),
            **{name: value for name, value in self._lion_metrics.items() if name not in NOT_LOGGED},
            "guard/effective_batch_size": self.batch.last,
            "guard/events": len(self.events),
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

    def turn_off(self, reason: str) -> None:
        """Takes the guard off the run, which goes on without it.

        Args:
            reason: what it met.
        """
        self.is_off = True
        log.debug("LionGuard is off", exc_info=True)
        report(f"LionGuard is off for the rest of this run, which goes on: {reason}")
        with contextlib.suppress(Exception):
            self._detach()

    def _detach(self) -> None:
        """Leaves the optimizers as they were found, and keeps the state for `state_dict`."""
        if self.monitors:
            self._final = self.state_dict()
        if self._telemetry is not None:
            self._telemetry.remove()
        for monitor in self.monitors:
            monitor.remove()
        self.monitors = []

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have the settings and the state, but no hooks on anybody's optimizer."""
        lightnings = ("log", "log_dict")  # bound methods of the module
        state = {name: value for name, value in self.__dict__.items() if name not in lightnings}
        state |= {"monitors": [], "_telemetry": None, "losses": Losses()}
        state["_loaded"] = self.state_dict() if self.monitors else self._loaded
        state["recovery"] = Recovery(
            self.thresholds, self.on_divergence, acts=self.acts, gates=self.gates, disabled=self.disabled
        )
        return state

    @override
    def state_dict(self) -> dict[str, Any]:
        finished_or_loaded, trial = self._loaded or self._final, self.recovery.trial
        if finished_or_loaded is not None and not self.monitors:
            return finished_or_loaded
        return {
            "format": FORMAT,
            "steps": self.steps,
            "warmup": self.warmup.state_dict(),
            "monitors": [monitor.state_dict() for monitor in self.monitors],
            "batch": self.batch.state_dict(),
            "losses": self.losses.state_dict(),
            "noise": self.noise.state_dict(),
            "policy": self.recovery.policy.state_dict(),
            "events": self.event_log.state_dict(),
            "snapshots": self.recovery.ring.state_dict() if self.checkpoint_snapshots else [],
            "trial": trial.state_dict() if self.checkpoint_snapshots and trial is not None else None,
            "telemetry": None if self._telemetry is None else self._telemetry.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes effect when training starts. A state that is loaded for a test or a validation is ignored."""
        if self._stage not in (None, "fit"):
            return
        if self.monitors:
            self._restore(state_dict)
        else:
            self._loaded = state_dict

    def _restore(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.warmup.load_state_dict(state["warmup"])
        if state.get("format") != FORMAT or len(state["monitors"]) != len(self.monitors):
            report(
                "LionGuard takes over the step and the warm-up of the checkpoint; its rules start with new histories."
            )
            return
        for monitor, saved in zip(self.monitors, state["monitors"], strict=True):
            monitor.load_state_dict(saved)
        self.batch.load_state_dict(state["batch"])
        self.losses.load_state_dict(state["losses"])
        self.noise.load_state_dict(state["noise"])
        self.recovery.policy.load_state_dict(state["policy"])
        self.event_log.load_state_dict(state["events"])
        self.recovery.ring.load_state_dict(state["snapshots"])
        trial = state.get("trial")
        self.recovery.trial = None if trial is None else Trial.from_state(trial)
        if self._telemetry is not None and state["telemetry"] is not None:
            self._telemetry.load_state_dict(state["telemetry"])
