"""Data position as one integer: which sample comes when is a pure function of (seed, position).

A run sees one endless stream of samples: epoch after epoch, each a fresh permutation. Position 0 is the first sample
of the run, whatever the batch size, the number of ranks, the number of workers or how often the run was resumed; so a
resume needs no more than the count of the samples it has consumed. Batches run across the end of an epoch, so no
sample is ever dropped.
"""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class StreamBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (position, index) pairs: the sample's number in the run, and which item of the dataset it is.

    Global batch `b` holds positions `[b * batch_size * world_size, (b + 1) * batch_size * world_size)`; each rank takes
    its own consecutive part.

    Args:
        dataset_size: number of items in the dataset.
        batch_size: samples per batch on this rank.
        num_batches: batches on this rank from position 0 to the end of the run.
        seed: keys every permutation.
        rank, world_size: which part of each global batch is ours.
        start: samples of the whole run, over all ranks, that are already consumed.
    """

    def __init__(
        self,
        dataset_size: int,
        batch_size: int,
        num_batches: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> None:
        for name, value in (("dataset_size", dataset_size), ("batch_size", batch_size), ("num_batches", num_batches)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        if start < 0:
            raise ValueError(f"start must not be negative, got {start}")
        self.dataset_size, self.batch_size, self.num_batches, self.seed = dataset_size, batch_size, num_batches, seed
        self.rank, self.world_size, self.start = rank, world_size, start
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return max(0, self.num_batches - self.start // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.start + self.rank * self.batch_size
        for batch in range(len(self)):
            position = first + batch * self.batch_size * self.world_size
            yield [(p, self.index(p)) for p in range(position, position + self.batch_size)]

    def index(self, position: int) -> int:
        """The dataset item at `position` of the stream."""
        epoch, offset = divmod(position, self.dataset_size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order, self._epoch = torch.randperm(self.dataset_size, generator=generator), epoch
        return int(self._order[offset])
