"""The last numbers of a series and their median, without sorting them at every step."""

import bisect
import math
from array import array
from collections.abc import Sequence


class Window:
    """The last `size` numbers that were added, in order of arrival and of size.

    Args:
        size: how many are kept.
    """

    # Every step touches some of these objects when a model has taken all of the cache: fewer lines are read so.
    __slots__ = ("_ordered", "_ring", "count", "size")

    def __init__(self, size: int) -> None:
        self.size, self.count = size, 0
        """`count` is of all that were ever added."""
        self._ring, self._ordered = array("d"), array("d")

    def add(self, value: float) -> None:
        """Takes in a number, which must not be NaN; the oldest of a full window goes."""
        place = self.count % self.size
        if len(self._ring) == self.size:
            del self._ordered[bisect.bisect_left(self._ordered, self._ring[place])]
            self._ring[place] = value
        else:
            self._ring.append(value)
        bisect.insort(self._ordered, value)
        self.count += 1

    def __len__(self) -> int:
        return len(self._ring)

    def median(self) -> float:
        """The middle number, or the mean of the two; NaN while empty."""
        size = len(self._ordered)
        return (self._ordered[(size - 1) // 2] + self._ordered[size // 2]) / 2 if size else math.nan

    def spread(self) -> tuple[float, float]:
        """The lower median, and the lower median of the distances from it; NaN while empty."""
        ordered, middle = self._ordered, (len(self._ordered) - 1) // 2
        if not ordered:
            return math.nan, math.nan
        center = ordered[middle]
        # The numbers nearest to the center are neighbours in order: find where as many as the median takes begin.
        first, last = 0, len(ordered) - 1 - middle
        while first < last:
            half = (first + last) // 2
            if center - ordered[half] > ordered[half + middle] - center:
                first = half + 1
            else:
                last = half
        spread = max(center - ordered[first], ordered[first + middle] - center)
        if first:
            spread = min(spread, max(center - ordered[first - 1], ordered[first - 1 + middle] - center))
        return center, spread

    def values(self) -> list[float]:
        """The numbers, oldest first."""
        place = self.count % self.size
        return [*self._ring[place:], *self._ring[:place]] if len(self._ring) == self.size else self._ring.tolist()

    def load(self, values: Sequence[float]) -> None:
        """Starts anew with `values`, oldest first."""
        self._ring = array("d", values)[-self.size :]
        self.count = len(self._ring)
        self._ordered = array("d", sorted(self._ring))
