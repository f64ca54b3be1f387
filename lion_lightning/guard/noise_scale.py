"""The gradient noise scale: the batch size at which noise and signal of a gradient are equal.

B_simple = tr(covariance of one sample's gradient) / |gradient|^2, estimated from the norms of gradients over two batch
sizes. Source: McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, arXiv:1812.06162, appendix A.1.
"""

import math
from typing import Any

from lion_lightning.guard.monitors import Average

HALF_LIFE_STEPS = 50.0


class NoiseScale:
    """Averages both parts over steps before it divides them: the estimate of one step is far too noisy."""

    def __init__(self) -> None:
        self._noise, self._signal = Average(HALF_LIFE_STEPS), Average(HALF_LIFE_STEPS)

    def observe(self, small_square: float, small_batch: int, large_square: float, large_batch: int) -> None:
        """Takes in squared norms of mean gradients over `small_batch` and `large_batch` samples.

        Values that are not finite, or equal sizes, say nothing and are left out.
        """
        if small_batch >= large_batch or not math.isfinite(small_square + large_square):
            return
        self._noise.add((small_square - large_square) / (1 / small_batch - 1 / large_batch))
        self._signal.add((large_batch * large_square - small_batch * small_square) / (large_batch - small_batch))

    @property
    def value(self) -> float:
        """B_simple in samples; NaN before it is known, infinite where the signal drowns."""
        if not self._noise.count:
            return math.nan
        return max(0.0, self._noise.value) / self._signal.value if self._signal.value > 0 else math.inf

    def state_dict(self) -> dict[str, Any]:
        return {"noise": self._noise.state_dict(), "signal": self._signal.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._noise.load_state_dict(state["noise"])
        self._signal.load_state_dict(state["signal"])
