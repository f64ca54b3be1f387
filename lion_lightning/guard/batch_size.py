"""The batch an optimizer step really used: counted, not computed from settings."""

from dataclasses import dataclass
from typing import Literal

# Lion's advantage over AdamW was measured at batches of 64 and more (Chen et al., 2023, arXiv:2302.06675, section 5).
MIN_BATCH_SIZE = 64

OnSmallBatch = Literal["warn", "accumulate", "error"]
ON_SMALL_BATCH: tuple[OnSmallBatch, ...] = ("warn", "accumulate", "error")


def accumulation(batch_size: int, accumulate: int, min_batch_size: int) -> int:
    """Micro-batches per step, at least `accumulate`, that make `min_batch_size` of `batch_size` samples each.

    Args:
        batch_size: samples of one micro-batch over all ranks.
    """
    return max(accumulate, -(-min_batch_size // batch_size))


@dataclass(slots=True)
class EffectiveBatch:
    """Counts the samples that go into each optimizer step: every micro-batch, every rank, short tails as they are.

    Attributes:
        min_batch_size: below it `is_small` is true.
        last: samples of the last finished optimizer step; 0 before the first.
        pending: samples of the step that is under way.
    """

    min_batch_size: int = MIN_BATCH_SIZE
    last: int = 0
    pending: int = 0

    def add(self, samples: int) -> None:
        """A micro-batch of `samples`, over all ranks, has started."""
        self.pending += samples

    def close(self) -> None:
        """The optimizer has stepped on what was added since the last time."""
        self.last, self.pending = self.pending, 0

    @property
    def is_small(self) -> bool:
        return 0 < self.last < self.min_batch_size

    def advice(self) -> str:
        """One line: what was seen, why it matters, what to do."""
        accumulate = -(-self.min_batch_size // max(1, self.last))
        return (
            f"the effective batch is {self.last} samples, below {self.min_batch_size}: Lion's sign makes small batches "
            f"noisier, and its published advantage over AdamW starts at {self.min_batch_size}; accumulate "
            f"{accumulate} times as many batches or raise the batch size"
        )

    def state_dict(self) -> dict[str, int]:
        return {"last": self.last, "pending": self.pending}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.last, self.pending = state["last"], state["pending"]
