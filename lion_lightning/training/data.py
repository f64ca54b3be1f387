"""StreamDataModule: what the data modules of all recipes share."""

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader, Dataset, Sampler

from lion_lightning.training.errors import ConfigError
from lion_lightning.training.sampler import StreamBatchSampler

VAL_BATCH_FACTOR = 2  # validation keeps no gradients, so twice the batch fits


class StreamDataModule(pl.LightningDataModule):
    """Batches from a training stream whose only position is the number of samples consumed, and a fixed validation set.

    A subclass sets `train_set` and `val_set` in `setup`: datasets with `__getitems__(pairs)`, where a pair is (position
    in the run, index of the item) and the result is a finished batch. The position seeds whatever is random about a
    sample, so that nothing depends on workers, ranks or resumes.

    Args:
        batch_size: samples per micro-batch and rank.
        num_workers: processes that load; 0 loads in the main process, the fastest for memory-mapped data.
        seed: keys the order of the training samples.
        limit_train_samples: train on the first so many samples only; None for all.
    """

    train_set: Dataset
    val_set: Dataset

    def __init__(
        self, batch_size: int, num_workers: int = 0, seed: int = 1, limit_train_samples: int | None = None
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigError(f"data.batch_size must be at least 1, got {batch_size}")
        if num_workers < 0:
            raise ConfigError(f"data.num_workers must be at least 0, got {num_workers}")
        if limit_train_samples is not None and limit_train_samples < 1:
            raise ConfigError(f"data.limit_train_samples must be at least 1, got {limit_train_samples}")
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.limit_train_samples = limit_train_samples

    @property
    def num_train_samples(self) -> int:
        """How many different samples are trained on; known after `setup`."""
        size = len(self.train_set)  # type: ignore[arg-type]
        return min(size, self.limit_train_samples or size)

    def check_batch_fits(self, effective_batch_size: int) -> None:
        """ConfigError if an optimizer step wants more samples than the training set has."""
        if effective_batch_size > self.num_train_samples:
            raise ConfigError(
                f"the effective batch of {effective_batch_size} samples is larger than the training set of "
                f"{self.num_train_samples}; lower data.batch_size={self.batch_size} or give more data"
            )

    def train_dataloader(self) -> DataLoader:
        trainer = self._trainer()
        sampler = StreamBatchSampler(
            dataset_size=self.num_train_samples,
            batch_size=self.batch_size,
            num_batches=trainer.max_steps * trainer.accumulate_grad_batches,
            seed=self.seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        return self._loader(self.train_set, sampler)

    def val_dataloader(self) -> DataLoader:
        trainer = self._trainer()
        size = len(self.val_set)  # type: ignore[arg-type]
        return self._loader(
            self.val_set,
            FixedBatches(size, VAL_BATCH_FACTOR * self.batch_size, trainer.global_rank, trainer.world_size),
        )

    def _loader(self, dataset: Dataset, batches: Sampler[list[tuple[int, int]]]) -> DataLoader:
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            pin_memory=self._trainer().strategy.root_device.type == "cuda",
            persistent_workers=self.num_workers > 0,
        )

    def _trainer(self) -> pl.Trainer:
        if self.trainer is None:
            raise RuntimeError("the data module belongs to no Trainer yet; pass it to Trainer.fit(..., datamodule=...)")
        return self.trainer


class FixedBatches(Sampler[list[tuple[int, int]]]):
    """Every item once, in order, each rank its share; an item's position is its index, so each pass treats it alike."""

    def __init__(self, size: int, batch_size: int, rank: int, world_size: int) -> None:
        self.indices = range(rank, size, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(index, index) for index in self.indices[start : start + self.batch_size]]


def _as_it_is(batch: Any) -> Any:
    return batch
