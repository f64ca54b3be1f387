"""When a kind of healthy training counts as harmed by the guard."""

import statistics
from dataclasses import dataclass

from tests.healthy.kind import Kind, Outcome

SHARE_WITH_ONE_SEED, SHARE_IN_RECOVER_MODE = 0.05, 0.01


@dataclass(frozen=True)
class Row:
    """A kind with one optimizer: runs without and with the guard, paired by seed.

    Attributes:
        recovers: whether the guard had `on_divergence="recover"`: a stricter limit holds.
    """

    kind: Kind
    optimizer: str
    without: list[Outcome]
    guarded: list[Outcome]
    recovers: bool = False

    @property
    def mean_without(self) -> float:
        return statistics.fmean(outcome.metric for outcome in self.without)

    @property
    def mean_guarded(self) -> float:
        return statistics.fmean(outcome.metric for outcome in self.guarded)

    @property
    def spread(self) -> float:
        """Range of the metric over the seeds without the guard; with one seed, a share of the metric."""
        metrics = [outcome.metric for outcome in self.without]
        return max(metrics) - min(metrics) if len(metrics) > 1 else SHARE_WITH_ONE_SEED * abs(metrics[0])

    @property
    def loss(self) -> float:
        """By how much the mean of the metric is worse with the guard; negative if it is better."""
        gain = self.mean_guarded - self.mean_without
        return -gain if self.kind.higher_is_better else gain

    @property
    def ended(self) -> int:
        """Runs that the guard ended."""
        return sum(outcome.ended is not None for outcome in self.guarded)

    @property
    def is_identical(self) -> bool:
        """Whether every run with the guard ended with the same metric, bit for bit."""
        return all(a.metric == b.metric for a, b in zip(self.without, self.guarded, strict=True))

    @property
    def is_harmed(self) -> bool:
        allowed = SHARE_IN_RECOVER_MODE * abs(self.mean_without) if self.recovers else self.spread
        is_lost = any(outcome.unsaved_at_end for outcome in self.guarded)
        return bool(self.ended) or is_lost or not self.loss <= allowed  # a metric that is not a number is harm, too

    @property
    def verdict(self) -> str:
        return "harmed" if self.is_harmed else "identical" if self.is_identical else "no harm"
