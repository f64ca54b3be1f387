"""The position in the data is one integer: which sample comes when is a pure function of (seed, position).

A run sees one endless stream of samples: epoch after epoch, each a fresh permutation. Position 0 is the first sample
of the run, whatever the batch size, the number of ranks or workers, or how often the run was resumed. A resume
therefore needs only the count of consumed samples. Batches run across the end of an epoch, so no sample is dropped.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise

import torch
from torch.utils.data import Sampler

from lion_lightning.errors import check_number

MAX_TURNS = 10_000  # weights of several sources are rounded to this precision
MAX_SOURCES = 100


@dataclass(frozen=True)
class StepValues:
    """A whole number for each step that changes at a few of them.

    Attributes:
        changes: (first step, value), the first one from step 0 on.

    Raises:
        ValueError: the steps do not start at 0 and increase, or a value is below 1.
    """

    changes: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        steps = [step for step, _ in self.changes]
        if not steps or steps[0] != 0 or any(later <= step for step, later in pairwise(steps)):
            raise ValueError(f"the steps must begin with 0 and rise, got {steps}")
        for step, value in self.changes:
            check_number("every step", step, "[0, inf)", whole=True)
            check_number("every value", value, "[1, inf)", whole=True)

    @property
    def last(self) -> int:
        return self.changes[-1][1]

    def at(self, step: int) -> int:
        """The value of `step`."""
        return next(value for first, value in reversed(self.changes) if first <= step)

    def before(self, step: int) -> int:
        """The sum of the values of all steps before `step`."""
        total = 0
        for first, value in reversed(self.changes):
            total += value * max(0, step - first)
            step = min(step, first)
        return total

    def steps_in(self, total: int) -> int:
        """The largest number of steps whose values sum to at most `total`."""
        return bisect_right(range(total + 2), total, key=self.before) - 1


class SourceTurns:
    """Which of several sources supplies each position of a stream that they share by weights.

    The turns repeat in a fixed pattern; within it every stretch is as close to the weights as possible.

    Args:
        weights: of the sources, above 0; they are rounded to whole turns out of at most 10,000.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not 1 <= len(weights) <= MAX_SOURCES:
            raise ValueError(f"there must be 1 to {MAX_SOURCES} weights, got {len(weights)}")
        if not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"weights must be numbers above 0, got {list(weights)}")
        self.counts = _turns(weights)
        self.pattern: list[tuple[int, int]] = []  # the source of each turn, and the turns that it has had before
        taken = [0] * len(self.counts)
        total = sum(self.counts)
        for turn in range(1, total + 1):
            owed = [count * turn - total * had for count, had in zip(self.counts, taken, strict=True)]
            source = owed.index(max(owed))
            self.pattern.append((source, taken[source]))
            taken[source] += 1

    def at(self, position: int) -> tuple[int, int]:
        """The source at `position`, and how many turns it has had before."""
        cycle, offset = divmod(position, len(self.pattern))
        source, earlier = self.pattern[offset]
        return source, cycle * self.counts[source] + earlier


def _turns(weights: Sequence[float]) -> list[int]:
    shares = [Fraction(str(weight)) for weight in weights]
    exact = [share / min(shares) for share in shares]
    scale = next((n for n in range(1, 101) if all((share * n).denominator == 1 for share in exact)), None)
    if scale is not None and sum(exact) * scale <= MAX_TURNS:
        return [int(share * scale) for share in exact]
    return [max(1, round(MAX_TURNS * share / sum(shares))) for share in shares]


class StreamOrder:
    """Which item comes at which position: of one dataset, or of several laid end to end and drawn by weights.

    Args:
        sizes: items of each source.
        seed: keys every permutation.
        weights: share of the stream that each source has; None for equal shares.
    """

    def __init__(self, sizes: Sequence[int], seed: int, weights: Sequence[float] | None = None) -> None:
        if min(sizes) < 1:
            raise ValueError(f"every source must have at least 1 item, got {list(sizes)}")
        self.sizes, self.seed = list(sizes), seed
        self.turns = SourceTurns([1.0] * len(self.sizes) if weights is None else weights)
        self.begins = [0, *accumulate(self.sizes)]
        self._orders = [(-1, torch.empty(0, dtype=torch.int64)) for _ in self.sizes]

    def index(self, position: int) -> int:
        """The dataset item at `position` of the stream."""
        source, ordinal = self.turns.at(position)
        epoch, offset = divmod(ordinal, self.sizes[source])
        if epoch != self._orders[source][0]:
            key = self.seed * 1_000_003 + epoch + (source << 56)
            order = torch.randperm(self.sizes[source], generator=torch.Generator().manual_seed(key))
            self._orders[source] = epoch, order
        return self.begins[source] + int(self._orders[source][1][offset])


class StreamBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (position, index) pairs: the sample's number in the run, and which item of the dataset it is.

    Each rank takes its own consecutive part of each global batch: with one batch size, global batch `b` holds positions
    `[b * batch_size * world_size, (b + 1) * batch_size * world_size)`.

    Args:
        order: which item comes at which position.
        batch_sizes: samples of each batch on this rank.
        num_batches: batches on this rank from position 0 to the end of the run.
        rank, world_size: which part of each global batch belongs to this rank.
        start: samples of the whole run, over all ranks, that are already consumed.
    """

    def __init__(
        self,
        order: StreamOrder,
        batch_sizes: StepValues,
        num_batches: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> None:
        if num_batches < 1:
            raise ValueError(f"num_batches must be at least 1, got {num_batches}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        if start < 0:
            raise ValueError(f"start must not be negative, got {start}")
        self.order, self.batch_sizes = order, batch_sizes
        self.num_batches, self.rank, self.world_size, self.start = num_batches, rank, world_size, start
        self.first_batch = self.batch_sizes.steps_in(start // world_size)  # batches of this rank already consumed

    def __len__(self) -> int:
        return max(0, self.num_batches - self.first_batch)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        position = self.start
        for batch in range(self.first_batch, self.num_batches):
            size = self.batch_sizes.at(batch)
            mine = position + self.rank * size
            yield [(p, self.order.index(p)) for p in range(mine, mine + size)]
            position += size * self.world_size


class FixedBatches(Sampler[list[tuple[int, int]]]):
    """Every item once, in order, each rank its share; an item's position is its index, so all passes are alike.

    All ranks have the same number of batches, since sharded models wait for each other in each. A rank with too few
    items for that cuts its last batch in two.

    Args:
        size: number of items, at least `world_size`.
        batch_size: items per batch, at least 2 with several ranks.
        rank, world_size: this rank takes the items `rank`, `rank + world_size`, ...
    """

    def __init__(self, size: int, batch_size: int, rank: int, world_size: int) -> None:
        indices = range(rank, size, world_size)
        most = len(range(0, size, world_size))
        ends = [min(end, len(indices)) for end in range(batch_size, most + batch_size, batch_size)]
        if len(ends) > 1 and ends[-1] == ends[-2]:
            ends[-2] -= 1
        self.batches = [indices[start:end] for start, end in pairwise([0, *ends])]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.batches:
            yield [(index, index) for index in batch]
