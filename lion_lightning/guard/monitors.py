"""The rules that look at one run's readings, step by step: plain Python on numbers that are the same on every rank."""

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

from lion_lightning.guard.readings import Reading
from lion_lightning.guard.thresholds import Thresholds
from lion_lightning.guard.window import Window


@dataclass(frozen=True)
class Symptom:
    """Something that a rule has seen.

    Attributes:
        kind: outlier, bad_loss, nonfinite, poison, divergence, lock_in, dead, unmoved, near_bound or cosine.
        message: what was seen and why it matters, for people.
    """

    kind: str
    message: str


class Poison:
    """The momentum is poisoned: the sign of the update, which flips at a steady rate, freezes.

    A huge gradient in the momentum outweighs all that follow; the loss does not show it.
    """

    __slots__ = ("_rates", "low_steps", "thresholds")

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self._rates = Window(thresholds.window)
        self.low_steps = 0

    def observe(self, flip_rate: float) -> bool:
        """Takes in a step's flip rate; whether it is the one that tells."""
        if not math.isfinite(flip_rate):
            return False
        limits = self.thresholds
        armed = len(self._rates) >= limits.armed_after
        if armed and flip_rate < limits.poison_ratio * self._rates.median():
            self.low_steps += 1
        else:
            self.low_steps = 0
            self._rates.add(flip_rate)
        return self.low_steps == limits.poison_steps

    def recovered(self) -> None:
        """The momentum is new."""
        self.low_steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"rates": self._rates.values(), "low_steps": self.low_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rates.load(state["rates"])
        self.low_steps = state["low_steps"]


class Average:
    """Exponential moving average with a half-life in observations, without the bias of its start."""

    __slots__ = ("_keep", "_sum", "_weight", "count")

    def __init__(self, half_life: float) -> None:
        self._keep = 0.5 ** (1 / half_life)
        self.count, self._sum, self._weight = 0, 0.0, 0.0

    def add(self, value: float) -> float:
        self.count += 1
        self._sum = self._keep * self._sum + (1 - self._keep) * value
        self._weight = self._keep * self._weight + (1 - self._keep)
        return self.value

    @property
    def value(self) -> float:
        return self._sum / self._weight if self._weight else math.nan

    def state_dict(self) -> list[float]:
        return [self.count, self._sum, self._weight]

    def load_state_dict(self, state: list[float]) -> None:
        self.count, self._sum, self._weight = int(state[0]), state[1], state[2]


class Divergence:
    """The loss has left its best level for good: a fast average well above the best slow one, step after step.

    The noise of a step's loss is told from the differences of neighbours, which know nothing of the loss's way down,
    and by their median, which a few bad steps do not move.
    """

    __slots__ = ("_differences", "_last", "best", "fast", "high_steps", "slow", "thresholds")

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self.fast, self.slow = Average(thresholds.fast_half_life), Average(thresholds.slow_half_life)
        self._differences = Window(thresholds.window)
        self._last = math.nan
        self.best = math.inf
        self.high_steps = 0

    @property
    def limit(self) -> float:
        """What the fast average may not stay above, never below `best`; infinite until there is a best average."""
        if not (math.isfinite(self.best) and self._differences):
            return math.inf
        deviation = NORMAL_FROM_MEDIAN_DIFFERENCE * self._differences.median()
        limits = self.thresholds
        return self.best + max(limits.divergence_sigmas * deviation, limits.divergence_share * abs(self.best))

    def observe(self, loss: float, skipped: bool = False) -> bool:
        """Takes in a step's loss; whether it is the one that tells.

        A loss that is not finite says nothing here. One of a skipped step tells of the data, not of the run: it counts
        as high, and leaves the averages alone.
        """
        if not math.isfinite(loss):
            return False
        if skipped:
            self.high_steps += 1
            return self.high_steps == self.thresholds.divergence_steps
        fast, last, self._last = self.fast.add(loss), self._last, loss
        # A few huge losses keep the fast average up for long: a step that is as good as the best is no sign of it.
        if loss > self.best and fast > self.best and fast > self.limit:
            self.high_steps += 1
        else:
            self.high_steps = 0
            if math.isfinite(last):
                self._differences.add(abs(loss - last))
            slow = self.slow.add(loss)
            if self.slow.count >= self.thresholds.slow_half_life:
                self.best = min(self.best, slow)
        return self.high_steps == self.thresholds.divergence_steps

    def state_dict(self) -> dict[str, Any]:
        return {
            "fast": self.fast.state_dict(),
            "slow": self.slow.state_dict(),
            "differences": self._differences.values(),
            "last": self._last,
            "best": self.best,
            "high_steps": self.high_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.fast.load_state_dict(state["fast"])
        self.slow.load_state_dict(state["slow"])
        self._differences.load(state["differences"])
        self._last, self.best, self.high_steps = state["last"], state["best"], state["high_steps"]


NORMAL_FROM_MEDIAN_DIFFERENCE = 1.4826 / math.sqrt(2)
"""Standard deviation of independent normal values over the median absolute difference of neighbours."""


GAUGES = {
    "dead": "{value:.0%} of the sampled weights move though their gradient is exactly 0: units are dead, or most "
    "inputs are; the learning rate may be too high",
    "unmoved": "{value:.0%} of the weights do not move in a step: the step is smaller than their precision; train with "
    "weight_bits=32, or let the schedule end earlier",
    "near_bound": "{value:.0%} of the decayed weights are beyond 0.9 / weight_decay, the bound that Lion's decay sets "
    "them: lower weight_decay",
    "cosine": "the cosine between update and gradient is {value:.3f}, where 0.1 to 0.2 is healthy: the run sits on a "
    "plateau; the learning rate is probably too high",
}


class Gauges:
    """Slow averages that only warn, each once."""

    __slots__ = ("_averages", "_told", "thresholds")

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self._averages = {name: Average(thresholds.gauge_half_life) for name in GAUGES}
        self._told: set[str] = set()

    def observe(self, name: str, value: float) -> Symptom | None:
        """Takes in a value; a symptom when its average has left its limit, after as many values as its window has."""
        if not math.isfinite(value):
            return None
        average, limit = self._averages[name], getattr(self.thresholds, name)
        mean = average.add(value)
        beyond = mean < limit if name == "cosine" else mean > limit
        if name in self._told or not beyond or average.count < self.thresholds.window:
            return None
        self._told.add(name)
        return Symptom(name, GAUGES[name].format(value=mean))

    def value(self, name: str) -> float:
        """The average; NaN before the first value."""
        return self._averages[name].value

    def state_dict(self) -> dict[str, Any]:
        averages = {name: average.state_dict() for name, average in self._averages.items()}
        return {"averages": averages, "told": sorted(self._told)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, average in self._averages.items():
            average.load_state_dict(state["averages"][name])
        self._told = set(state["told"])


class LockIn:
    """A gate that rejects step after step while the loss is quiet: the gradients have changed for good."""

    __slots__ = ("_rejected", "thresholds")

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self._rejected: deque[bool] = deque(maxlen=thresholds.lock_in_window)

    def observe(self, rejected: bool, quiet: bool) -> bool:
        """Takes in a step; whether the gate should start a new history."""
        self._rejected.append(rejected)
        if not quiet or sum(self._rejected) < self.thresholds.lock_in_rejections:
            return False
        self._rejected.clear()
        return True

    def state_dict(self) -> list[bool]:
        return list(self._rejected)

    def load_state_dict(self, state: list[bool]) -> None:
        self._rejected = deque(state, maxlen=self.thresholds.lock_in_window)


class Monitors:
    """All rules over the readings of one optimizer."""

    __slots__ = ("clipped", "divergence", "gauges", "lock_in", "nonfinite_in_a_row", "poison", "skipped", "thresholds")

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self.poison, self.divergence = Poison(thresholds), Divergence(thresholds)
        self.gauges, self.lock_in = Gauges(thresholds), LockIn(thresholds)
        self.nonfinite_in_a_row = 0
        self.clipped = self.skipped = 0

    def observe(self, reading: Reading) -> list[Symptom]:
        """What the rules see in the next step's reading; in the order in which they should be acted on."""
        is_finite, gated = reading.is_finite, reading.factor > 1 or reading.skipped
        if is_finite:
            self.nonfinite_in_a_row = 0
        symptoms = self._gate(reading) if gated or not is_finite else []
        if self.poison.observe(reading.flip_rate):
            symptoms.append(Symptom("poison", POISON.format(rate=reading.flip_rate)))
        if self.divergence.observe(reading.level, reading.skipped):
            symptoms.append(Symptom("divergence", DIVERGENCE.format(level=reading.level, rule=self.divergence)))
        # Quiet, or loud for so long that the ladder, if it was to act, would have acted.
        quiet = not 0 < self.divergence.high_steps <= self.thresholds.divergence_steps
        if self.lock_in.observe(is_finite and gated, quiet):
            symptoms.append(Symptom("lock_in", LOCK_IN.format(norm=reading.grad_norm)))
        for name, value in (("dead", reading.dead), ("cosine", reading.cosine)):
            if symptom := self.gauges.observe(name, value):
                symptoms.append(symptom)
        return symptoms

    def _gate(self, reading: Reading) -> list[Symptom]:
        """What the gate has done to a step that it did not let pass, for the record."""
        self.skipped += reading.skipped
        self.clipped += reading.factor > 1
        if not reading.is_finite:
            self.nonfinite_in_a_row += 1
            ranks = ", ".join(map(str, reading.bad_ranks))
            where = f", with a loss that is not finite on rank {ranks}" if ranks else ""
            return [Symptom("nonfinite", NONFINITE.format(where=where))]
        if reading.skipped:
            return [Symptom("bad_loss", BAD_LOSS.format(reading=reading))]
        return [Symptom("outlier", OUTLIER.format(reading=reading))]

    def is_suspicious(self, ignore_divergence: bool = False) -> bool:
        """Whether a rule is on its way to a verdict: not the time for a snapshot or a checkpoint."""
        diverges = bool(self.divergence.high_steps) and not ignore_divergence
        return bool(self.nonfinite_in_a_row or self.poison.low_steps) or diverges

    def state_dict(self) -> dict[str, Any]:
        rules = {name: getattr(self, name).state_dict() for name in RULES}
        counts = {name: getattr(self, name) for name in COUNTS}
        return {"rules": rules, "counts": counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in RULES:
            getattr(self, name).load_state_dict(state["rules"][name])
        for name in COUNTS:
            setattr(self, name, state["counts"][name])


RULES = ("poison", "divergence", "gauges", "lock_in")
COUNTS = ("nonfinite_in_a_row", "clipped", "skipped")
NONFINITE = "the gradient is not finite{where}: one such step would stay in the momentum for ever"
OUTLIER = (
    "the gradient norm {reading.grad_norm:.3g} is an outlier (robust z {reading.norm_z:.0f}): in the momentum it would "
    "set the direction for hundreds of steps"
)
BAD_LOSS = (
    "the loss {reading.backward_loss:.4g} is far out of line (robust z {reading.loss_z:.0f}): the batch would teach "
    "something else than all others"
)
POISON = (
    "the sign of the update has nearly stopped flipping (rate {rate:.4f}): an outlier sits in the momentum, the "
    "weights move one way whatever the gradients say"
)
DIVERGENCE = "the loss has risen to {level:.4g} and stayed above {rule.limit:.4g} (best average {rule.best:.4g})"
LOCK_IN = (
    "half of the latest steps were clipped or skipped though the run does not diverge: norms of {norm:.3g} are the new "
    "normal, so norms and losses are measured afresh"
)
