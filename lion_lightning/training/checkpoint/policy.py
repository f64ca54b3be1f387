"""When a run is saved, which of its checkpoints are kept, and which one is `best` and `last`."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from typing_extensions import override

from lion_lightning import __version__
from lion_lightning.errors import ConfigError, check_number
from lion_lightning.training.checkpoint import files
from lion_lightning.training.checkpoint.files import (
    CheckpointFailed,
    DurableCheckpointIO,
    InvalidCheckpoint,
    step_files,
    step_path,
)
from lion_lightning.training.checkpoint.resume import (
    LOAD_FAILURES,
    convert_loop_counters,
    differences,
    expect_validation,
    restoring,
)
from lion_lightning.training.checkpoint.sharded_state import META_FILE
from lion_lightning.training.signals import StopFlag, TrainingInterrupted

log = logging.getLogger(__name__)
KEY = "lion_lightning"  # our part of a checkpoint: facts of the run, and the version that wrote it
_OPTIMIZERS, _SCHEDULES = "optimizer_states", "lr_schedulers"  # Lightning restores as many as both sides have


class RunCheckpoint(Checkpoint):
    """Saves a run as `step-000001200.ckpt`, with `last.ckpt` and `best.ckpt` as further names of such files.

    Saves after every validation, at intervals of steps and minutes, and when a signal ends the run. A callback of the
    Trainer whose method `is_healthy() -> bool` returns False keeps the run from being saved; one whose
    `has_restored() -> bool` returns True keeps the end from being the best, as it was not validated.

    Args:
        folder: where the checkpoints are.
        monitor: the metric that decides which one is best; None for no `best.ckpt`.
        mode: whether less (`min`) or more (`max`) of it is better.
        every_n_steps: optimizer steps between saves; None for only after validation.
        every_minutes: longest time without a save; None for no limit.
        keep: how many of the latest step files are kept.
        stop: checked after every step and every validation batch.
        facts: plain values that a resumed run must have again, kept in each checkpoint.
        settings: plain values that a resumed run may change, kept too; what has changed is logged.

    Raises:
        ValueError: an argument out of its range.
        CheckpointFailed: during training, on all ranks, when a file could not be written.
        TrainingInterrupted: during training, when a signal asked for it.
        ConfigError: when training starts, if the checkpoint to resume from does not fit.
    """

    def __init__(
        self,
        folder: Path,
        monitor: str | None = None,
        mode: str = "min",
        every_n_steps: int | None = None,
        every_minutes: float | None = None,
        keep: int = 2,
        stop: StopFlag | None = None,
        facts: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be one of min, max, got {mode!r}")
        check_number("checkpoint.every_n_steps", every_n_steps, "[1, inf)", whole=True, or_null=True)
        check_number("checkpoint.every_minutes", every_minutes, "(0, inf)", or_null=True)
        check_number("checkpoint.keep", keep, "[1, inf)", whole=True)
        self.folder, self.monitor, self.mode, self.keep = Path(folder), monitor, mode, keep
        self.goal = f"{mode} {monitor}"
        self.every_n_steps = every_n_steps
        self.every_seconds = math.inf if every_minutes is None else 60 * every_minutes
        self.stop, self.facts, self.settings = stop or StopFlag(), facts or {}, settings or {}
        self.best_path, self.last_path = self.folder / "best.ckpt", self.folder / "last.ckpt"
        self.best_score: float | None = None
        self.best_step: int | None = None
        self._io = DurableCheckpointIO()  # from `setup` on, that of the Trainer
        self.first_step = 0
        """Optimizer steps before this process began: those of the checkpoint that it resumed from."""
        self._step = self._saved_step = 0
        self._validated_step = -1
        self._has_begun = self._validation_due = self._warned_unhealthy = self._warned_monitor = False
        self._restored: dict[str, int] = {}  # optimizers and schedules in the checkpoint

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(trainer.strategy.checkpoint_io, DurableCheckpointIO):
            raise TypeError("RunCheckpoint needs Trainer(plugins=[DurableCheckpointIO()])")
        self._io = trainer.strategy.checkpoint_io
        self._io.model = pl_module
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            files.sweep_temporaries(self.folder)

    @contextmanager
    def resuming(self) -> Iterator[None]:
        """A context for `Trainer.fit`: `restoring` between reading a checkpoint and the first step."""
        try:
            yield
        except LOAD_FAILURES as error:
            if self._has_begun or self._io.loaded is None:
                raise
            with restoring(self._io.loaded):
                raise error

    def refuse_misfit(self, path: Path) -> None:
        """Raise ConfigError if the checkpoint at `path` is of a run with other facts, before anything has begun."""
        with restoring(path):
            kept = files.load(path / META_FILE if path.is_dir() else path, mmap=path.is_file())
            self._checked(kept[KEY])

    def _checked(self, kept: dict[str, Any]) -> dict[str, Any]:
        if differing := [text for name, value in self.facts.items() for text in differences(name, kept[name], value)]:
            raise ConfigError(f"resume: {'; '.join(differing)}; a resumed run keeps what it was")
        return kept

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        stateful = [each for each in callbacks if type(each).state_dict is not Callback.state_dict]
        fresh = [type(each).__name__ for each in stateful if each.state_key not in checkpoint["callbacks"]]
        if fresh and trainer.is_global_zero:
            log.warning("resume: the checkpoint has no state of %s, which start(s) afresh", ", ".join(fresh))
        self._restored = {name: len(checkpoint[name]) for name in (_OPTIMIZERS, _SCHEDULES) if name in checkpoint}
        kept = self._checked(checkpoint[KEY])
        before = {**self.settings, **kept.get("settings", {})}
        changed = [text for name, value in self.settings.items() for text in differences(name, before[name], value)]
        if changed and trainer.is_global_zero:
            log.warning("resume: %s", "; ".join(changed))
        convert_loop_counters(checkpoint, kept.get("accumulate_grad_batches"), trainer.accumulate_grad_batches)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, ours in ((_OPTIMIZERS, trainer.optimizers), (_SCHEDULES, trainer.lr_scheduler_configs)):
            if self._restored.get(name, len(ours)) != len(ours):
                raise ValueError(f"{name}: {self._restored[name]} in the checkpoint, {len(ours)} in this run")
        self._has_begun = True
        self.stop.install()
        self._step = self.first_step = trainer.global_step
        self._saved_step = self._step if step_path(self.folder, self._step).exists() else -1
        self._saved_at = time.monotonic()
        self._repair(trainer)
        signum, _ = self._agree(trainer)
        if signum:
            raise TrainingInterrupted(f"stopped by signal {signum} before the first step; nothing new to save", signum)

    def settle(self, trainer: Trainer) -> None:
        """After `Trainer.fit`: what `on_train_start` does, where the run was over already and there was no step."""
        if not self._has_begun:
            self.first_step = trainer.global_step
            self._repair(trainer)

    def _repair(self, trainer: Trainer) -> None:
        """Link `best` and `last` again after a kill between a step file and its names."""
        if not trainer.is_global_zero:
            return
        newest = step_path(self.folder, trainer.global_step)
        if newest.exists() and not _is_of(self.last_path, trainer.global_step):
            files.link_marked(newest, self.last_path)
        if self.best_step is None or _is_of(self.best_path, self.best_step):
            return
        best = step_path(self.folder, self.best_step)
        if best.exists():
            self._name_best(best)
        else:
            log.warning("the best checkpoint, of step %d, is gone: the next validation makes a new one", self.best_step)
            self.best_step = self.best_score = None

    def _name_best(self, path: Path) -> None:
        files.write_weights(files.weights_of(path), self.best_path.with_suffix(".safetensors"))
        files.link_marked(path, self.best_path)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self._step:
            return  # a micro-batch: the step is not done
        self._step = trainer.global_step
        signum, time_is_up = self._agree(trainer)
        validation_due = self._is_validation_due(trainer)
        if signum and not (validation_due and self._is_over(trainer)):
            self._end(trainer, signum, validation_due)
        periodic = self.every_n_steps is not None and self._step % self.every_n_steps == 0
        if (periodic or time_is_up) and not validation_due:
            self._save(trainer)

    def _is_validation_due(self, trainer: Trainer) -> bool:
        """As Lightning decides it with check_val_every_n_epoch=None, which counts micro-batches over the whole run."""
        if not trainer.enable_validation or not sum(trainer.num_val_batches):
            return False
        is_long_enough = trainer.global_step >= (trainer.min_steps or 0)  # `should_stop` stays set until then
        is_long_enough &= trainer.current_epoch >= (trainer.min_epochs or 0)
        interval = trainer.val_check_batch or math.inf
        return (trainer.should_stop and is_long_enough) or (trainer.fit_loop.total_batch_idx + 1) % interval == 0

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Ranks may differ in their number of batches; signals are compared in those that all have.
        self._shared_batches = -_largest(trainer, -sum(trainer.num_val_batches))[0]

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if trainer.state.fn != "fit" or self._is_over(trainer) or batch_idx >= self._shared_batches:
            return
        signum, _due = self._agree(trainer)
        if signum:
            self._end(trainer, signum, validation_due=True)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._validated_step = trainer.global_step
            self._save(trainer, best=self._is_best(trainer))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._saved_step == trainer.global_step:
            return
        # The guard's last word may be another than at the validation, and the weights may be others, too.
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        restored = any(callback.has_restored() for callback in callbacks if hasattr(callback, "has_restored"))
        is_validated = self._validated_step == trainer.global_step and not restored
        self._save(trainer, best=is_validated and self._is_best(trainer))

    def _is_over(self, trainer: Trainer) -> bool:
        """After the last step only its validation is left, which a resumed run would skip: a signal waits for it."""
        return 0 <= trainer.max_steps <= trainer.global_step

    def _end(self, trainer: Trainer, signum: int, validation_due: bool) -> None:
        self._validation_due = validation_due
        saved = self._saved_step == trainer.global_step or self._save(trainer)
        what = (
            f"saved in {self.folder}; resume=auto goes on with run_dir={self.folder.parent}"
            if saved
            else "not saved, because the guard reports a fault"
        )
        raise TrainingInterrupted(f"stopped by signal {signum} after step {trainer.global_step}: {what}", signum)

    def _agree(self, trainer: Trainer) -> tuple[int, bool]:
        """Share among all ranks: the signal (0 for none), and whether it is time to save."""
        time_is_up = trainer.is_global_zero and time.monotonic() - self._saved_at >= self.every_seconds
        signum, due = _largest(trainer, self.stop.signal, time_is_up)
        return signum, bool(due)

    def _is_best(self, trainer: Trainer) -> bool:
        if self.monitor is None or self.monitor not in trainer.callback_metrics:
            if self.monitor is not None and not self._warned_monitor and trainer.is_global_zero:
                self._warned_monitor = True
                names = ", ".join(sorted(name for name in trainer.callback_metrics if "/" in name))
                log.warning("%s is not measured, so no checkpoint is the best; measured are %s", self.monitor, names)
            return False
        score = float(trainer.callback_metrics[self.monitor])
        if not math.isfinite(score) or not self._is_healthy(trainer):
            return False
        sign = 1 if self.mode == "min" else -1
        if self.best_score is not None and sign * score >= sign * self.best_score:
            return False
        self.best_score, self.best_step = score, trainer.global_step
        return True

    def _save(self, trainer: Trainer, best: bool = False) -> bool:
        """Save this step unless the run is unhealthy; returns whether it did."""
        if not self._is_healthy(trainer):
            if not self._warned_unhealthy and trainer.is_global_zero:
                log.warning(
                    "step %d is not saved: the guard reports a fault; last and best stay as they are",
                    trainer.global_step,
                )
            self._warned_unhealthy = True
            return False
        path = step_path(self.folder, trainer.global_step)
        trainer.save_checkpoint(path, weights_only=False)
        if trainer.is_global_zero and self._io.error is None:
            self._io.attempt(lambda: self._name(path, best))
        if _largest(trainer, self._io.error is not None)[0]:
            error = self._io.error
            told = f"{type(error).__name__}: {error}" if error else "on another rank"
            raise CheckpointFailed(
                f"a checkpoint could not be written to {self.folder} ({told}); the ones before it are as they were"
            ) from error
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        return True

    def _name(self, path: Path, best: bool) -> None:
        """Make the checkpoint at `path` the last one, maybe the best, and remove those that it replaces.

        A run goes on from the newest whole one, so a later one that is whole is another run's, and stays.
        """
        for file in step_files(self.folder):
            if file.name > path.name:
                try:
                    files.verify(file)
                except InvalidCheckpoint:
                    files.remove_marked(file)
                else:
                    raise RuntimeError(f"another run has written {file.name}; each needs a run_dir of its own")
        if best:
            self._name_best(path)
        files.link_marked(path, self.last_path)
        for file in step_files(self.folder)[: -self.keep]:
            files.remove_marked(file)

    def _is_healthy(self, trainer: Trainer) -> bool:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        checks = [callback.is_healthy for callback in callbacks if hasattr(callback, "is_healthy")]
        return not _largest(trainer, not all(check() for check in checks))[0]

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        accumulate = {"accumulate_grad_batches": trainer.accumulate_grad_batches}
        checkpoint[KEY] = {**self.facts, **accumulate, "settings": self.settings, "version": __version__}
        if self._validation_due:
            expect_validation(checkpoint)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score, "best_step": self.best_step, "goal": self.goal}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        score, step, goal = state_dict["best_score"], state_dict["best_step"], state_dict.get("goal", self.goal)
        if goal == self.goal:
            self.best_score, self.best_step = score, step
        elif step is not None:
            log.warning("the best checkpoint was of %s; the next validation makes the first of %s", goal, self.goal)


def _is_of(path: Path, step: int) -> bool:
    try:
        return files.read_marker(path).global_step == step
    except InvalidCheckpoint as error:
        log.warning("%s", error)
        return False


def _largest(trainer: Trainer, *values: float) -> list[int]:
    """The largest of each value over all ranks."""
    if trainer.world_size == 1:
        return [int(value) for value in values]
    shared = torch.tensor([int(value) for value in values], device=trainer.strategy.root_device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return shared.tolist()
