"""The rules of the guard: their limits, and when each of them reports a symptom in a reading.

Plain Python on numbers that are the same on every rank: a decision is a function of the readings and the saved state.
"""

import math
import statistics
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from typing_extensions import override

from lion_lightning.errors import check_number
from lion_lightning.guard.reading import Reading


@dataclass(frozen=True)
class Thresholds:
    """Limits of the rules (docs/guard.md; docs/guard/evidence.md has how often the defaults are wrong).

    Steps are optimizer steps. Raises ValueError for a limit that is not above 0.
    """

    window: int = 128
    """Steps over which the medians of gradient norm, loss and flip rate are taken."""
    armed_after: int = 32
    """Steps seen before a rule that compares with a median may act."""
    outlier_z: float = 8.0
    """Robust z of the log norm (median, median absolute deviation) beyond which a step is clipped ..."""
    outlier_ratio: float = 3.0
    """... if the norm is also above this multiple of the median norm, to which it is clipped."""
    loss_z: float = 10.0
    """Robust z of a step's loss beyond which the step is skipped."""
    nonfinite_steps: int = 4
    """Skipped steps in a row after which the weights themselves are checked."""
    nonfinite_limit: int = 64
    """Skipped steps in a row after which the run stops, though its weights are healthy."""
    poison_ratio: float = 0.25
    """Share of its median that the flip rate of the update's sign has to fall below ..."""
    poison_steps: int = 5
    """... for this many steps in a row to conclude that the momentum is stuck."""
    fast_half_life: float = 10.0
    slow_half_life: float = 100.0
    """Half-lives of the two averages of the loss, in steps."""
    divergence_sigmas: float = 4.0
    divergence_share: float = 0.1
    """The fast average diverges above the best slow one by the larger of these deviations and this share of it ..."""
    divergence_steps: int = 20
    """... for this many steps in a row."""
    divergence_norm_z: float = 3.0
    """Mean robust z of the log norm over those steps, up or down, from which the gradients have changed as well."""
    snapshot_every: int = 100
    snapshots: int = 3
    """Spacing in steps and number of the snapshots kept in host memory."""
    proven_after: int = 100
    """Healthy steps after a snapshot before a run may be rewound to it."""
    trial_steps: int = 10
    """At most this many steps after a rewind tell, by their median loss, whether the loss has returned."""
    horizon: int = 1000
    """Healthy steps after which earlier recoveries are forgotten."""
    dead: float = 0.10
    """Share of elements that move without a gradient."""
    unmoved: float = 0.50
    """Share of weights that a step does not change."""
    near_bound: float = 0.05
    """Share of weights beyond 0.9 / weight_decay."""
    cosine: float = 0.05
    """Least cosine between update and gradient."""
    gauge_half_life: float = 50.0
    """Half-life of the averages compared with the last four limits, in samples of each."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            name, value = f"thresholds.{entry.name}", getattr(self, entry.name)
            if entry.type is int:
                check_number(name, value, "[1, inf)", whole=True)
            elif value != math.inf:
                check_number(name, value, "(0, inf)")


@dataclass(frozen=True)
class Symptom:
    """Something that a rule has seen.

    Attributes:
        kind: its name; docs/how-to/guard-messages.md lists all.
        message: what was seen and why it matters.
    """

    kind: str
    message: str


RULES: dict[str, tuple[str, ...]] = {
    "nonfinite": ("nonfinite", "nonfinite_loss", "nonfinite_limit", "sick_weights", "sick_buffers"),
    "outlier": ("outlier",),
    "bad_loss": ("bad_loss", "bad_losses"),
    "stuck_momentum": ("poison", "low_flip_rate"),
    "divergence": ("divergence", "raised_loss"),
    "dead": ("dead",),
    "cosine": ("cosine",),
    "unmoved": ("unmoved",),
    "near_bound": ("near_bound",),
    "batch_size": ("batch_size",),
    "settings": ("lr", "decay", "warmup", "bf16", "betas", "clipping", "eval_mode"),
}
"""Rules that can be turned off by name, and the kinds of symptom that each reports."""


class Stateful:
    """State of plain types, restored exactly: the attributes named in `STATE`.

    These are numbers, lists, windows (deques of numbers), or Stateful themselves; None is allowed for `OPTIONAL` ones.
    """

    STATE: ClassVar[tuple[str, ...]] = ()
    OPTIONAL: ClassVar[tuple[str, ...]] = ()

    def state_dict(self) -> dict[str, Any]:
        found = {}
        for name in self.STATE:
            value = getattr(self, name)
            is_list = isinstance(value, (list, deque))
            found[name] = value.state_dict() if isinstance(value, Stateful) else list(value) if is_list else value
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises KeyError, TypeError or ValueError for what `state_dict` does not return."""
        for name in self.STATE:
            current, value = getattr(self, name), state[name]
            if isinstance(current, Stateful):
                current.load_state_dict(value)
            elif isinstance(current, deque):
                setattr(self, name, deque(map(float, value), current.maxlen))
            elif isinstance(current, list):
                setattr(self, name, list(value))
            elif isinstance(value, (int, float)) or (value is None and name in self.OPTIONAL):
                setattr(self, name, value)
            else:
                raise TypeError(f"{name}={value!r} is not a number")


class Average(Stateful):
    """Exponential moving average with a half-life in observations, without the bias of its start."""

    STATE = ("count", "total", "weight")

    def __init__(self, half_life: float) -> None:
        self._keep = 0.5 ** (1 / half_life)
        self.count, self.total, self.weight = 0, 0.0, 0.0

    def add(self, value: float) -> float:
        self.count += 1
        self.total = self._keep * self.total + (1 - self._keep) * value
        self.weight = self._keep * self.weight + (1 - self._keep)
        return self.value

    @property
    def value(self) -> float:
        """NaN before the first observation."""
        return self.total / self.weight if self.weight else math.nan


class StuckMomentum(Stateful):
    """Sees a momentum that one huge gradient has filled: the sign of the update, which flips at a steady rate, freezes.

    The outlier outweighs all gradients that follow; the loss does not show it.
    """

    STATE = ("rates", "low_steps")

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self.rates: deque[float] = deque(maxlen=thresholds.window)
        self.low_steps = 0

    def observe(self, flip_rate: float) -> bool:
        """Takes in a step's flip rate; True at the step that completes a run of low rates."""
        if not math.isfinite(flip_rate):
            return False
        limits = self.thresholds
        armed = len(self.rates) >= limits.armed_after
        if armed and flip_rate < limits.poison_ratio * statistics.median(self.rates):
            self.low_steps += 1
        else:
            self.low_steps = 0
            self.rates.append(flip_rate)
        return self.low_steps == limits.poison_steps


NORMAL_FROM_MEDIAN_DIFFERENCE = 1.4826 / math.sqrt(2)
"""Standard deviation of independent normal values over the median absolute difference of neighbours."""


class Divergence(Stateful):
    """Sees a loss that has left its best level: a fast average well above the best slow one, step after step.

    The noise of a step's loss is estimated from the differences of neighbours, which do not depend on the trend of the
    loss, and by their median, which a few bad steps do not move.
    """

    STATE = ("fast", "slow", "differences", "last", "best", "start", "high_steps", "high_norm_z")

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self.fast, self.slow = Average(thresholds.fast_half_life), Average(thresholds.slow_half_life)
        self.differences: deque[float] = deque(maxlen=thresholds.window)
        self.last, self.best, self.start = math.nan, math.inf, math.inf
        self.high_steps, self.high_norm_z = 0, 0.0

    @property
    def deviation(self) -> float:
        """Standard deviation of a step's loss at its best level; NaN before there are two losses."""
        return NORMAL_FROM_MEDIAN_DIFFERENCE * statistics.median(self.differences) if self.differences else math.nan

    @property
    def limit(self) -> float:
        """What the fast average may not stay above, never below `best`; infinite until there is a best average."""
        if not (math.isfinite(self.best) and self.differences):
            return math.inf
        limits = self.thresholds
        return self.best + max(limits.divergence_sigmas * self.deviation, limits.divergence_share * abs(self.best))

    @property
    def is_alone(self) -> bool:
        """Whether nothing but the loss has changed: it is not above its start, and gradients are as they were before.

        Gradients that were not measured or not finite count as changed. A loss without a natural level, such as a
        difference of energies, varies about its start; above it is what exceeds it by `divergence_sigmas`.
        """
        norm_z = abs(self.high_norm_z) / max(1, self.high_steps)
        start = self.start + self.thresholds.divergence_sigmas * self.deviation
        return self.fast.value < start and norm_z < self.thresholds.divergence_norm_z

    def take_level(self) -> None:
        """Takes the raised loss as the new best level: it has risen for a reason, or stays up."""
        self.best, self.slow = math.inf, Average(self.thresholds.slow_half_life)
        self.high_steps, self.high_norm_z = 0, 0.0

    def observe(self, loss: float, skipped: bool = False, norm_z: float = math.nan) -> bool:
        """Takes in a step's loss; True at the step that completes a run of high ones.

        Args:
            loss: of the step; ignored if it is not finite.
            skipped: the step was skipped: its loss counts as high and does not enter the averages.
            norm_z: robust z of the log norm of its gradient; NaN if it is not known.
        """
        if not math.isfinite(loss):
            return False
        if not skipped:
            fast, last, self.last = self.fast.add(loss), self.last, loss
            if self.fast.count == round(self.thresholds.fast_half_life):
                self.start = fast
        # A few huge losses keep the fast average up for long: a step that is as good as the best ends the run.
        if skipped or (loss > self.best and fast > self.best and fast > self.limit):
            self.high_steps += 1
            self.high_norm_z += math.inf if skipped or not math.isfinite(norm_z) else norm_z
        else:
            self.high_steps, self.high_norm_z = 0, 0.0
            if math.isfinite(last):
                self.differences.append(abs(loss - last))
            slow = self.slow.add(loss)
            if self.slow.count >= self.thresholds.slow_half_life:
                self.best = min(self.best, slow)
        return self.high_steps == self.thresholds.divergence_steps


AVERAGE_WARNINGS = {
    "dead": "{value:.0%} of the sampled weights move though their gradient is exactly 0: units are dead, or most "
    "inputs are; the learning rate may be too high",
    "unmoved": "{value:.0%} of the weights do not move in a step: the step is smaller than their precision; train with "
    "weight_bits=32, or let the schedule end earlier",
    "near_bound": "{value:.0%} of the decayed weights are beyond 0.9 / weight_decay, the bound that Lion's decay sets "
    "them: lower weight_decay",
    "cosine": "the cosine between update and gradient is {value:.3f}, where 0.1 to 0.2 is healthy: the run sits on a "
    "plateau; the learning rate is probably too high",
}


class WarningAverages(Stateful):
    """Slow averages of the update's statistics; each warns once when it is beyond its limit."""

    STATE = (*AVERAGE_WARNINGS, "warned")

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        half_life = thresholds.gauge_half_life
        self.dead, self.unmoved = Average(half_life), Average(half_life)
        self.near_bound, self.cosine = Average(half_life), Average(half_life)
        self.warned: list[str] = []

    def observe(self, name: str, value: float) -> Symptom | None:
        """Takes in a value of the average `name`; a symptom when it is beyond its limit after a window of values."""
        if not math.isfinite(value):
            return None
        average, limit = getattr(self, name), getattr(self.thresholds, name)
        mean = average.add(value)
        beyond = mean < limit if name == "cosine" else mean > limit
        if name in self.warned or not beyond or average.count < self.thresholds.window:
            return None
        self.warned.append(name)
        return Symptom(name, AVERAGE_WARNINGS[name].format(value=mean))


RATE_RISE = 1.5
"""A learning rate that rises by more than this in one step, as at a warm restart, is expected to raise the loss."""
OUTLIER_MEMORY_STEPS = 30
"""Steps after an outlier within which a frozen update is attributed to it."""
SHOWN_BAD_LOSSES = 10


class RuleSet(Stateful):
    """All rules over the readings of one optimizer."""

    STATE = (
        "last_outlier",
        "stuck_momentum",
        "divergence",
        "averages",
        "nonfinite_in_a_row",
        "clipped",
        "skipped",
        "bad_losses",
        "first_bad_losses",
        "steps",
        "rate",
        "rate_rose",
    )

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self.stuck_momentum, self.divergence = StuckMomentum(thresholds), Divergence(thresholds)
        self.averages = WarningAverages(thresholds)
        self.last_outlier = -math.inf
        self.nonfinite_in_a_row = self.clipped = self.skipped = self.bad_losses = self.steps = 0
        self.first_bad_losses: list[int] = []
        self.rate, self.rate_rose = math.nan, -math.inf
        """The last rate, and the step at which it last rose at once."""

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({"rate": math.nan, "rate_rose": -math.inf, **state})  # which older checkpoints lack
        self.last_outlier = min(self.last_outlier, self.steps)  # older checkpoints have the step of the run

    def observe(self, reading: Reading) -> list[Symptom]:
        """The symptoms in the next step's reading, in the order in which they should be acted on."""
        self.steps += 1
        if reading.rate > RATE_RISE * self.rate:
            self.rate_rose = self.steps
        self.rate = reading.rate
        gated = reading.factor > 1 or reading.skipped
        if reading.is_finite:
            self.nonfinite_in_a_row = 0
        symptoms = self._gated(reading) if gated or not reading.is_finite else []
        if reading.loss_z > self.thresholds.loss_z:
            self.bad_losses += 1
            if len(self.first_bad_losses) < SHOWN_BAD_LOSSES:
                self.first_bad_losses.append(reading.step)
            if self.bad_losses == 1 and not reading.skipped:
                message = (
                    f"the loss {reading.backward_loss:.4g} of step {reading.step} is far above the others (robust z "
                    f"{reading.loss_z:.0f}); such steps are counted as guard/bad_loss_steps and taken as they are"
                )
                symptoms.append(Symptom("bad_losses", message))
        if reading.norm_z > self.thresholds.outlier_z and reading.is_finite:
            self.last_outlier = self.steps
        if self.stuck_momentum.observe(reading.flip_rate):
            message = (
                f"the sign of the update has nearly stopped flipping (rate {reading.flip_rate:.4f}): the weights move "
                "one way whatever the gradients are, "
            )
            if self._outlier_seen:
                symptoms.append(Symptom("poison", message + "as after an outlier that has filled the momentum"))
            else:
                reason = "though no outlier was seen: gradients of one direction, or few that are not near 0"
                symptoms.append(Symptom("low_flip_rate", message + reason))
        rule = self.divergence
        # Steps without a finite gradient have rules of their own.
        if reading.is_finite and rule.observe(reading.level, reading.skipped, reading.norm_z):
            kind, end = "divergence", ""
            if self.steps - self.rate_rose <= self.thresholds.window:
                kind, end = "raised_loss", ", after the learning rate had risen at once"
            elif rule.is_alone:
                kind = "raised_loss"
                end = f", though the gradients are as before and it is not above its start ({rule.start:.4g})"
            message = f"the loss has risen to {rule.fast.value:.4g} on average and stayed above {rule.limit:.4g}"
            symptoms.append(Symptom(kind, f"{message} (best average {rule.best:.4g}){end}"))
        averages = (self.averages.observe(name, getattr(reading, name)) for name in ("dead", "cosine"))
        return symptoms + [symptom for symptom in averages if symptom is not None]

    def bad_loss_summary(self) -> str | None:
        """Count, share and first steps of the losses far above the others; None if there were fewer than two."""
        if self.bad_losses < 2:
            return None
        shown = ", ".join(map(str, self.first_bad_losses)) + (", ..." if self.bad_losses > SHOWN_BAD_LOSSES else "")
        return (
            f"{self.bad_losses} of {self.steps} steps ({self.bad_losses / self.steps:.2%}) had a loss far above the "
            f"others: steps {shown}"
        )

    def _gated(self, reading: Reading) -> list[Symptom]:
        """Counts and describes a step that was clipped or skipped, or whose loss or gradient was not finite."""
        self.skipped += reading.skipped
        self.clipped += reading.factor > 1
        ranks = ", ".join(map(str, reading.bad_ranks))
        if not reading.is_finite and math.isfinite(reading.grad_norm) and not reading.skipped:
            kind = "nonfinite_loss"
            message = f"the loss is not finite on rank {ranks}, though the gradient is: the step was taken"
        elif not reading.is_finite:
            self.nonfinite_in_a_row += 1
            kind, where = "nonfinite", f", with a loss that is not finite on rank {ranks}" if ranks else ""
            message = f"the gradient is not finite{where}: one such step would stay in the momentum for ever"
        elif reading.skipped:
            kind, seen = "bad_loss", f"{reading.backward_loss:.4g} is far out of line (robust z {reading.loss_z:.0f})"
            message = f"the loss {seen}: this batch would teach something that the others do not"
        else:
            kind, seen = "outlier", f"{reading.grad_norm:.3g} is an outlier (robust z {reading.norm_z:.0f})"
            message = f"the gradient norm {seen}: in the momentum it would set the direction for hundreds of steps"
        return [Symptom(kind, message)]

    @property
    def is_lost(self) -> bool:
        """Whether the last steps had no finite gradient, and they are at least half of all."""
        return self.nonfinite_in_a_row >= max(self.thresholds.nonfinite_steps, self.steps / 2)

    def suspicion(self, ignored: Collection[str] = ()) -> float:
        """How far a rule has counted steps towards a symptom of steps that were finite: 0 not at all, 1 the symptom.

        Args:
            ignored: kinds of symptom on which nobody acts.
        """
        limits = self.thresholds
        shares = {
            "poison": self.stuck_momentum.low_steps / limits.poison_steps if self._outlier_seen else 0.0,
            "divergence": self.divergence.high_steps / limits.divergence_steps,
        }
        return max((share for kind, share in shares.items() if kind not in ignored), default=0.0)

    @property
    def _outlier_seen(self) -> bool:
        return self.steps - self.last_outlier <= OUTLIER_MEMORY_STEPS
