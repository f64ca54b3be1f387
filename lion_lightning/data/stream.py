"""StreamDataModule: what the data modules of all recipes share."""

import logging
import signal
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader, Dataset

from lion_lightning.data.sampler import FixedBatches, StepValues, StreamBatchSampler, StreamOrder
from lion_lightning.errors import ConfigError, check_number

log = logging.getLogger(__name__)
VAL_BATCH_FACTOR = 2  # validation keeps no gradients, so twice the batch fits
WORKER_GRACE_SECONDS = 20


class StreamDataModule(pl.LightningDataModule):
    """Batches from a training stream whose only position is the number of samples consumed, and a fixed validation set.

    A subclass sets `train_set` and `val_set` in `setup`: datasets with `__getitems__(pairs)`, where a pair is (position
    in the run, index of the item) and the result is a finished batch. The position seeds whatever is random about a
    sample, so that nothing depends on workers, ranks or resumes. `train_labels` is set where samples have classes.

    Args:
        batch_size: samples per micro-batch and rank.
        num_workers: processes that load; 0 loads in the main process, the fastest for memory-mapped data.
        seed: keys the order of the training samples.
        limit_train_samples: train on only this many samples, the first ones; None for all.
        batch_schedule: (first optimizer step, samples per micro-batch and rank) from step 0 on, up to `batch_size`;
            None for `batch_size` from the start.
    """

    train_set: Dataset
    val_set: Dataset
    train_labels: np.ndarray | None = None
    neighbours = 1
    """Training samples in a row that may belong together, such as the blocks of a document."""

    def __init__(
        self,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 1,
        limit_train_samples: int | None = None,
        batch_schedule: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        check_number("data.batch_size", batch_size, "[1, inf)", whole=True)
        check_number("data.num_workers", num_workers, "[0, inf)", whole=True)
        check_number("data.seed", seed, "[0, inf)", whole=True)
        check_number("data.limit_train_samples", limit_train_samples, "[1, inf)", whole=True, or_null=True)
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.limit_train_samples = limit_train_samples
        self.batch_schedule = read_schedule("batch_schedule", batch_schedule, "batch_size", batch_size)

    @property
    def num_train_samples(self) -> int:
        """How many different samples are trained on; known after `setup`."""
        size = len(self.train_set)  # type: ignore[arg-type]
        return min(size, self.limit_train_samples or size)

    def check_samples(self, effective_batch_size: int) -> None:
        """ConfigError if an optimizer step wants more samples than there are.

        Warns of a limit above their number, and of one that leaves out classes.
        """
        if self.limit_train_samples is not None and self.limit_train_samples > self.num_train_samples:
            rank_zero_only(log.warning)(
                "data.limit_train_samples=%d is more than the training set has: all %d samples are used",
                self.limit_train_samples,
                self.num_train_samples,
            )
        if self.train_labels is not None:
            first = self.train_labels[: self.num_train_samples]
            kept, classes = (np.unique(labels).size for labels in (first, self.train_labels))
            if kept < classes:
                rank_zero_only(log.warning)(
                    "data.limit_train_samples=%d: the first samples have %d of the %d classes; is the data sorted?",
                    self.limit_train_samples,
                    kept,
                    classes,
                )
        if effective_batch_size > self.num_train_samples:
            raise ConfigError(
                f"the effective batch of {effective_batch_size} samples is larger than the training set of "
                f"{self.num_train_samples}; lower data.batch_size={self.batch_size} or give more data"
            )

    def samples_before(self, step: int) -> int:
        """Samples that all ranks have consumed before optimizer step `step`."""
        trainer = self._trainer()
        return self.batch_schedule.before(step) * trainer.accumulate_grad_batches * trainer.world_size

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must find again: how many samples there are. A subclass adds what they mean."""
        counts = {"training samples": len(self.train_set), "validation samples": len(self.val_set)}  # type: ignore[arg-type]
        return {**counts, "limit_train_samples": self.limit_train_samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """ConfigError if the data is not that of the run."""
        pairs = {name: (state_dict.get(name, value), value) for name, value in self.state_dict().items()}
        if changed := [f"{name} was {was} and is now {now}" for name, (was, now) in pairs.items() if was != now]:
            raise ConfigError(
                f"resume: the data is not that of the run: {'; '.join(changed)}; a resumed run keeps its data, and "
                "resume=null in another run_dir= starts afresh"
            )

    def hold_out(self, is_held: np.ndarray) -> None:
        """Validate on some of the training samples, and train on the others.

        Args:
            is_held: bool (training samples,).
        """
        whole = self.train_set
        self.train_set, self.val_set = (Picked(whole, np.flatnonzero(part)) for part in (~is_held, is_held))
        if self.train_labels is not None:
            self.train_labels = self.train_labels[~is_held]

    def samples_in(self, batch: Any) -> int:
        """How many training samples a batch has."""
        return extract_batch_size(batch)

    def train_dataloader(self) -> Any:
        trainer = self._trainer()
        num_batches = trainer.max_steps * trainer.accumulate_grad_batches
        sampler = StreamBatchSampler(
            self._order(),
            self._batch_sizes(),
            num_batches,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            start=self.samples_before(trainer.global_step),  # above 0 when a run is resumed
        )
        return StreamLoader(self.train_set, batch_sampler=sampler, num_batches=num_batches, **self._options())

    def _batch_sizes(self) -> StepValues:
        """Samples of each micro-batch of a rank."""
        accumulate = self._trainer().accumulate_grad_batches
        return StepValues(tuple((step * accumulate, size) for step, size in self.batch_schedule.changes))

    def _order(self) -> StreamOrder:
        return StreamOrder([self.num_train_samples], self.seed)

    def val_dataloader(self) -> DataLoader:
        trainer = self._trainer()
        size, ranks = len(self.val_set), trainer.world_size  # type: ignore[arg-type]
        if ranks > 1 and size < ranks:
            raise ConfigError(f"{size} validation samples are too few for {ranks} processes; each needs at least one")
        batches = FixedBatches(size, VAL_BATCH_FACTOR * self.batch_size, trainer.global_rank, ranks)
        return DataLoader(self.val_set, batch_sampler=batches, **self._options())

    def _options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "collate_fn": _unchanged,
            "pin_memory": self._trainer().strategy.root_device.type == "cuda",
            "persistent_workers": self.num_workers > 0,
            "worker_init_fn": outlive_stop_signals,
        }

    def _trainer(self) -> pl.Trainer:
        if self.trainer is None:
            raise RuntimeError("the data module belongs to no Trainer yet; pass it to Trainer.fit(..., datamodule=...)")
        return self.trainer


class Picked(Dataset):
    """Some samples of a recipe's data set.

    Args:
        whole: takes lists of (position in the run, index).
        indices: int64 (samples,) of those in this one.
    """

    def __init__(self, whole: Any, indices: np.ndarray) -> None:
        self.whole, self.indices = whole, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, pairs: list[tuple[int, int]]) -> Any:
        return self.whole.__getitems__([(position, int(self.indices[index])) for position, index in pairs])


class StreamLoader(DataLoader):
    """A loader whose length is that of the whole run, also where it starts in the middle.

    Lightning counts the batches of a resumed run from its beginning, restores a loader that has a state, and warns
    about one that has none. The position of this one follows from the Trainer's step count, so its state is empty.
    """

    def __init__(self, *arguments: Any, num_batches: int, **options: Any) -> None:
        self.num_batches = num_batches
        super().__init__(*arguments, **options)

    def __len__(self) -> int:
        return self.num_batches

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            raise ValueError(f"the checkpoint's loader is not a StreamLoader: its state has {', '.join(state_dict)}")


def read_schedule(name: str, changes: Sequence[Sequence[int]] | None, end: str, value: int) -> StepValues:
    """Read a schedule setting.

    Args:
        name: of the setting below `data.`.
        changes: its value, a list of [first step, value]; None for `value` at every step.
        end: the setting below `data.` whose value the schedule must end with.
        value: the value of `end`.

    Raises:
        ConfigError: not a list of [step, value] that starts at step 0, increases, and ends with `value`.
    """
    if changes is None:
        return StepValues(((0, value),))
    try:
        schedule = StepValues(tuple((step, at) for step, at in changes))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"data.{name}={changes} must be a list like [[0, 16], [200, 64]]: {error}") from error
    if schedule.last != value:
        raise ConfigError(f"data.{name}={changes} must end with data.{end}={value}")
    return schedule


def outlive_stop_signals(worker: int) -> None:
    """Let a loader worker ignore signals to the whole process group, since the main process still needs it.

    The main process ends its workers with SIGTERM when it exits itself, so SIGTERM ends a worker after a delay.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "SIGUSR1"):  # Windows, which sends no signals to groups and has no alarm
        return
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, frame: signal.alarm(WORKER_GRACE_SECONDS))


def _unchanged(batch: Any) -> Any:
    """The datasets return finished batches; a function of a module, since spawned workers pickle it."""
    return batch
