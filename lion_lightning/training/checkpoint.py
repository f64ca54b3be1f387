"""RunCheckpoint: when a run is saved, what becomes `best` and `last`, and how it ends when a signal asks it to."""

import logging
import math
import time
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from lion_lightning import __version__
from lion_lightning.errors import ConfigError
from lion_lightning.training import progress_state
from lion_lightning.training.checkpoint_io import CheckpointFailed, DurableCheckpointIO, Placement
from lion_lightning.training.durable import InvalidCheckpoint, link_marked, read_marker, sweep_temporaries
from lion_lightning.training.restoring import VERSION, check_counts, check_parts, counts, without_state
from lion_lightning.training.resume import step_files, step_path
from lion_lightning.training.signals import StopFlag, TrainingInterrupted, replace_lightnings_handlers

log = logging.getLogger(__name__)
MODES = ("min", "max")
SECONDS_PER_MINUTE = 60


class RunCheckpoint(Checkpoint):
    """Saves a run as `step-000001200.ckpt`, with `last.ckpt` and `best.ckpt` as further names of such files.

    Saves after every validation, every so many steps and minutes, and when a signal ends the run. A callback of the
    Trainer with a method `is_healthy() -> bool` that says False keeps the run from being saved at all.

    Args:
        folder: where the checkpoints are.
        monitor: the metric that decides which one is best; None for no `best.ckpt`.
        mode: whether less (`min`) or more (`max`) of it is better.
        every_n_steps: optimizer steps between saves; None for only after validation.
        every_minutes: at most so long without a save; None for no limit.
        keep: so many of the latest step files stay.
        stop: asked after every step and every validation batch.
        facts: plain values that a resumed run must have again, kept in each checkpoint.

    Raises:
        ValueError: an argument out of its range.
        CheckpointFailed: during training, on all ranks, when a file could not be written.
        TrainingInterrupted: during training, when a signal asked for it.
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
    ) -> None:
        _check(mode, every_n_steps, every_minutes, keep)
        self.folder, self.monitor, self.mode, self.keep = Path(folder), monitor, mode, keep
        self.every_n_steps, self.every_minutes = every_n_steps, every_minutes
        self.stop, self.facts = stop or StopFlag(), facts or {}
        self.best_score: float | None = None
        self.best_step: int | None = None
        self._step = self._saved_step = 0
        self._validation_due = self._told_sick = False
        self._restored_counts: dict[str, int] | None = None

    @property
    def best_path(self) -> Path:
        return self.folder / "best.ckpt"

    @property
    def last_path(self) -> Path:
        return self.folder / "last.ckpt"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(trainer.strategy.checkpoint_io, DurableCheckpointIO):
            raise TypeError("RunCheckpoint needs Trainer(plugins=[DurableCheckpointIO()])")
        self._io = trainer.strategy.checkpoint_io
        self._io.model = pl_module
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep_temporaries(self.folder)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        replace_lightnings_handlers(trainer, self.stop)
        if trainer.ckpt_path is not None:
            of_run: dict[str, Sized] = {
                "optimizer_states": trainer.optimizers,
                "lr_schedulers": trainer.lr_scheduler_configs,
            }
            check_counts(self._restored_counts, of_run)
        self._step = trainer.global_step
        self._saved_step = self._step if step_path(self.folder, self._step).exists() else -1
        self._saved_at = time.monotonic()
        if trainer.is_global_zero:
            self._repair_best()
        signum, _ = self._agree(trainer)
        if signum:
            raise TrainingInterrupted(f"stopped by signal {signum} before the first step; nothing new to save", signum)

    def _repair_best(self) -> None:
        """After a kill between a step file and its names: the state says which step was the best."""
        if self.best_step is None:
            return
        try:
            if read_marker(self.best_path).global_step == self.best_step:
                return
        except InvalidCheckpoint as error:
            log.warning("%s", error)
        if step_path(self.folder, self.best_step).exists():
            link_marked(step_path(self.folder, self.best_step), self.best_path)
        else:
            log.warning("the best checkpoint, of step %d, is gone: the next validation makes a new one", self.best_step)
            self.best_step = self.best_score = None

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self._step:
            return  # a micro-batch: the step is not done
        self._step = trainer.global_step
        signum, time_is_up = self._agree(trainer)
        validation_due = progress_state.validation_due(trainer)
        if signum and not (validation_due and self._is_over(trainer)):
            self._end(trainer, signum, validation_due)
        periodic = self.every_n_steps is not None and self._step % self.every_n_steps == 0
        if (periodic or time_is_up) and not validation_due:
            self._save(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = torch.tensor([-sum(trainer.num_val_batches)], device=trainer.strategy.root_device)
        self._shared_batches = -int(_largest(batches, trainer)[0])  # ranks may differ in how many they have

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
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._save(trainer, best=self._is_best(trainer))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._saved_step != trainer.global_step:
            self._save(trainer)
        self._io.wait()
        self._raise_failure(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if hasattr(self, "_io"):
            self._io.wait()

    def _is_over(self, trainer: Trainer) -> bool:
        """After the last step only its validation is left, and a resumed run would not get to it: it is waited for."""
        return 0 <= trainer.max_steps <= trainer.global_step

    def _end(self, trainer: Trainer, signum: int, validation_due: bool) -> None:
        self._validation_due = validation_due
        saved = self._saved_step == trainer.global_step or self._save(trainer)
        self._io.wait()
        self._raise_failure(trainer)
        what = f"saved in {self.folder}; resume=auto goes on" if saved else "not saved, because the guard calls it sick"
        raise TrainingInterrupted(f"stopped by signal {signum} after step {trainer.global_step}: {what}", signum)

    def _agree(self, trainer: Trainer) -> tuple[int, bool]:
        """What one rank knows, all know: the signal (0 for none), and whether it is time to save."""
        limit = math.inf if self.every_minutes is None else SECONDS_PER_MINUTE * self.every_minutes
        time_is_up = trainer.is_global_zero and time.monotonic() - self._saved_at >= limit
        known = [self.stop.signal, int(time_is_up), int(self._io.error is not None)]
        signum, due, failed = _largest(torch.tensor(known, device=trainer.strategy.root_device), trainer).tolist()
        if failed:
            self._fail()
        return signum, bool(due)

    def _raise_failure(self, trainer: Trainer) -> None:
        failed = torch.tensor([int(self._io.error is not None)], device=trainer.strategy.root_device)
        if int(_largest(failed, trainer)[0]):
            self._fail()

    def _fail(self) -> None:
        error = self._io.error
        told = f"{type(error).__name__}: {error}" if error else "another rank says so"
        raise CheckpointFailed(
            f"a checkpoint could not be written to {self.folder} ({told}); the ones before it are as they were"
        ) from error

    def _is_best(self, trainer: Trainer) -> bool:
        if self.monitor is None or self.monitor not in trainer.callback_metrics:
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
        """Save this step unless a callback calls it sick; says whether."""
        if not self._is_healthy(trainer):
            _tell_sick(self, trainer.global_step)
            return False
        path = step_path(self.folder, trainer.global_step)
        names = (self.best_path,) if best else ()
        placement = Placement(links=(self.last_path, *names), weights=names, remove=tuple(self._outdated(path)))
        trainer.save_checkpoint(path, weights_only=False, storage_options=placement)
        self._raise_failure(trainer)
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        return True

    def _outdated(self, path: Path) -> Sequence[Path]:
        """What goes when `path` is there: all but the `keep` latest, and what lies ahead, since it was not valid."""
        older = [file for file in step_files(self.folder) if file.name < path.name]
        ahead = [file for file in step_files(self.folder) if file.name > path.name]
        return [*older[: max(0, len(older) - self.keep + 1)], *ahead]

    def _is_healthy(self, trainer: Trainer) -> bool:
        asked = [callback.is_healthy for callback in _callbacks(trainer) if hasattr(callback, "is_healthy")]
        sick = torch.tensor([int(not all(ask() for ask in asked))], device=trainer.strategy.root_device)
        return not int(_largest(sick, trainer)[0])

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[progress_state.KEY] = {
            **self.facts,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            VERSION: __version__,
        }
        if self._validation_due:
            progress_state.expect_validation(checkpoint)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        check_parts(checkpoint, sharded=not trainer.strategy.lightning_restore_optimizer)
        self._restored_counts = counts(checkpoint)
        if trainer.is_global_zero and (fresh := without_state(checkpoint, _callbacks(trainer))):
            log.warning("resume: the checkpoint has no state of %s, which start(s) afresh", ", ".join(fresh))
        kept = checkpoint[progress_state.KEY]
        for name, value in self.facts.items():
            if kept[name] != value:
                raise ConfigError(f"resume: {name} was {kept[name]!r} and is now {value!r}; a resumed run keeps it")
        progress_state.recount(checkpoint, trainer.accumulate_grad_batches)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score, "best_step": self.best_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score, self.best_step = state_dict["best_score"], state_dict["best_step"]


def _largest(values: torch.Tensor, trainer: Trainer) -> torch.Tensor:
    """The largest of each value over all ranks."""
    if trainer.world_size > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def _callbacks(trainer: Trainer) -> list[Any]:
    return trainer.callbacks  # type: ignore[attr-defined]  # set by a connector


@rank_zero_only
def _tell_sick(checkpoint: RunCheckpoint, step: int) -> None:
    if not checkpoint._told_sick:
        log.warning("step %d is not saved: the guard calls the run sick; last and best stay as they are", step)
    checkpoint._told_sick = True


def _check(mode: str, every_n_steps: int | None, every_minutes: float | None, keep: int) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if every_n_steps is not None and (not isinstance(every_n_steps, int) or every_n_steps < 1):
        raise ValueError(f"every_n_steps must be a whole number of at least 1 or null, got {every_n_steps!r}")
    if every_minutes is not None and not (isinstance(every_minutes, int | float) and every_minutes > 0):
        raise ValueError(f"every_minutes must be a number above 0 or null, got {every_minutes!r}")
    if not isinstance(keep, int) or keep < 1:
        raise ValueError(f"keep must be a whole number of at least 1, got {keep!r}")
