"""The statistics of a comparison: which optimizer won, by how much, how surely, and at what cost."""

import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from lion_lightning.tracking.runs import AXES, Run
from lion_lightning.tracking.variants import Incomparable, Variant, check_alike, sort_into_variants

Mode = Literal["min", "max"]
USUAL_BASELINE = "adamw"
CONFIDENCE = 0.95
MIN_SEEDS_FOR_A_TEST = 2


@dataclass(frozen=True)
class Goal:
    """The metric that decides, and whether less (`min`) or more (`max`) of it is better."""

    metric: str
    mode: Mode

    def best(self, values: Sequence[float] | np.ndarray) -> float:
        """The best of the numbers among `values`; NaN where there is none."""
        numbers = [float(value) for value in values if math.isfinite(value)]
        return (min(numbers) if self.mode == "min" else max(numbers)) if numbers else math.nan

    def is_reached(self, values: np.ndarray, target: float) -> np.ndarray:
        return values <= target if self.mode == "min" else values >= target


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; the deviation of one seed is NaN."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def std(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan


@dataclass(frozen=True)
class Against:
    """A variant's best values against the baseline's: Welch's t-test, two-sided."""

    difference: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Outcome:
    """What came of one variant.

    Attributes:
        best, final: of the metric, over its counted runs.
        to_target: by axis, the places at which its runs first were as good as the baseline at its best; runs that
            never were are missing.
        costs: `step_ms`, `peak_memory_gib`, `bytes_per_parameter`, `energy_kj`: means over its runs, where logged.
        against: None for the baseline, and where either side has fewer than two seeds.
    """

    variant: Variant
    best: Spread
    final: Spread
    to_target: dict[str, list[float]]
    costs: dict[str, float]
    guard_events: int
    against: Against | None = None

    @property
    def label(self) -> str:
        return self.variant.label


@dataclass(frozen=True)
class Band:
    """A variant's curve: the mean over its counted runs with one standard deviation to each side, and every run."""

    label: str
    x: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    finished: list[tuple[np.ndarray, np.ndarray]]
    unfinished: list[tuple[np.ndarray, np.ndarray]]
    events: list[tuple[float, float]]


@dataclass(frozen=True)
class Comparison:
    """Runs of one experiment, compared."""

    goal: Goal
    baseline: str
    outcomes: list[Outcome]
    target: float
    group: str
    remarks: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        return [run for outcome in self.outcomes for run in outcome.variant.runs]

    @cached_property
    def axes(self) -> list[str]:
        """The axes that every run with a history has."""
        logged = [run for run in self.runs if run.history]
        return [axis for axis in AXES if logged and all(run.has_axis(axis) for run in logged)]

    @property
    def ranking(self) -> list[Outcome]:
        """The outcomes with finished runs, best mean first."""
        done = [outcome for outcome in self.outcomes if math.isfinite(outcome.best.mean)]
        return sorted(done, key=lambda outcome: outcome.best.mean, reverse=self.goal.mode == "max")

    def outcome(self, label: str) -> Outcome:
        return next(outcome for outcome in self.outcomes if outcome.label == label)

    def band(self, outcome: Outcome, axis: str = "steps", metric: str | None = None) -> Band:
        """The curve of `metric` (None: the goal's) of one variant."""
        return _band(outcome.variant, metric or self.goal.metric, axis)


def compare(
    runs: Sequence[Run],
    *,
    metric: str | None = None,
    mode: Mode | None = None,
    baseline: str | None = None,
    by: Sequence[str] = (),
    aside: Sequence[str] = (),
    unlike: bool = False,
) -> Comparison:
    """Compare runs.

    Args:
        metric, mode: what decides. None: what the recipe of the runs monitors.
        baseline: the label that the others are tested against. None: `adamw` where there is one, else the first.
        by: keys of the configuration that are compared beside the optimizer.
        aside: keys that follow from those, such as a learning rate scaled with the batch: they may differ, untold.
        unlike: compare even what `check_alike` refuses.

    Raises:
        Incomparable: no runs, unlike runs, or a metric or a baseline that is not there.
    """
    if not runs:
        raise Incomparable("there are no runs to compare")
    remarks = []
    try:
        check_alike(runs, by, aside)
    except Incomparable as reason:
        if not unlike:
            raise
        remarks.append(f"UNLIKE RUNS: {str(reason).split('. ')[0]}")
    goal = _goal(runs, metric, mode)
    variants, joined = sort_into_variants(runs, by, aside)
    chosen = _baseline(variants, baseline)
    target = _spread(chosen.counted, lambda run: goal.best(run.curve(goal.metric)[1])).mean
    reference = _outcome(chosen, goal, target, None)
    others = [
        reference if variant is chosen else _outcome(variant, goal, target, reference.best) for variant in variants
    ]
    groups = ", ".join(sorted({run.group for run in runs if run.group}))
    return Comparison(goal, chosen.label, others, target, groups, [*remarks, *joined])


def _goal(runs: Sequence[Run], metric: str | None, mode: Mode | None) -> Goal:
    logged = sorted(frozenset().union(*(run.metrics for run in runs)))
    monitors = {(run.setting("recipe.monitor"), run.setting("recipe.mode")) for run in runs}
    if metric is None:
        if len(monitors) != 1 or (None, None) in monitors:
            raise Incomparable(f"the runs do not name one metric that decides; name it with --metric: {_names(logged)}")
        metric = monitors.copy().pop()[0]
    if metric not in logged:
        raise Incomparable(f"no run has logged {metric}; there are: {_names(logged)}")
    known = {name: way for name, way in monitors if name}
    return Goal(metric, mode or known.get(metric) or guess_mode(metric))


def guess_mode(metric: str) -> Mode:
    """More is better for an accuracy, less for a loss."""
    return "max" if any(part in metric for part in ("acc", "top1", "top5", "f1", "per_second")) else "min"


def _names(names: Sequence[str]) -> str:
    return ", ".join(name for name in names if not name.startswith("_")) or "nothing"


def _baseline(variants: Sequence[Variant], wanted: str | None) -> Variant:
    labels = [variant.label for variant in variants]
    name = wanted or USUAL_BASELINE
    matching = [variant for variant in variants if name in (variant.label, variant.label.split(" (")[0])]
    if wanted and not matching:
        raise Incomparable(f"there is no {wanted} to compare with; there are: {', '.join(labels)}")
    finished = [variant for variant in matching or variants if variant.counted]
    return (finished or matching or list(variants))[0]


def _outcome(variant: Variant, goal: Goal, target: float, reference: Spread | None) -> Outcome:
    best = _spread(variant.counted, lambda run: goal.best(run.curve(goal.metric)[1]))
    return Outcome(
        variant=variant,
        best=best,
        final=_spread(variant.counted, lambda run: run.last(goal.metric)),
        to_target={axis: _to_target(variant.counted, goal, target, axis) for axis in AXES},
        costs=_costs(variant.counted or variant.others),
        guard_events=sum(int(run.last("guard/events") or 0) for run in variant.runs),
        against=welch(best.values, reference.values) if reference else None,
    )


def _spread(runs: Sequence[Run], value: Callable[[Run], float | None]) -> Spread:
    values = [value(run) for run in runs]
    return Spread(tuple(one for one in values if one is not None and math.isfinite(one)))


def _to_target(runs: Sequence[Run], goal: Goal, target: float, axis: str) -> list[float]:
    places = []
    for run in runs:
        x, values = run.curve(goal.metric, axis)
        reached = np.flatnonzero(goal.is_reached(values, target))
        if reached.size and math.isfinite(x[reached[0]]):
            places.append(float(x[reached[0]]))
    return places


def _costs(runs: Sequence[Run]) -> dict[str, float]:
    names = ("step_ms", "peak_memory_gib", "bytes_per_parameter", "energy_kj")
    spreads = {name: _spread(runs, lambda run, name=name: run.last(f"perf/{name}")) for name in names}  # type: ignore[misc]
    return {name: spread.mean for name, spread in spreads.items() if spread.values}


def welch(values: Sequence[float], reference: Sequence[float]) -> Against | None:
    """Welch's t-test of two samples with its confidence interval; None where a sample has fewer than two values.

    Samples that do not vary at all cannot be tested either: their difference is exact, and `p` NaN.
    """
    if min(len(values), len(reference)) < MIN_SEEDS_FOR_A_TEST:
        return None
    from scipy.stats import ttest_ind

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nearly identical values: said by the NaN
        test = ttest_ind(values, reference, equal_var=False)
        interval = test.confidence_interval(CONFIDENCE)
    difference = statistics.fmean(values) - statistics.fmean(reference)
    return Against(difference, float(interval.low), float(interval.high), float(test.pvalue))


def _band(variant: Variant, metric: str, axis: str) -> Band:
    """The mean at the steps that all counted runs share, drawn where they were on `axis` on average."""
    counted = [run for run in variant.counted if metric in run.metrics and run.has_axis(axis)]
    curves = [dict(zip(*run.curve(metric), strict=True)) for run in counted]
    shared = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    values = np.array([[curve[step] for step in shared] for curve in curves]).reshape(len(curves), len(shared))
    places = np.array([run.place(shared, axis) for run in counted]).reshape(len(curves), len(shared))
    empty = np.empty(0)
    return Band(
        label=variant.label,
        x=places.mean(0) if curves else empty,
        mean=values.mean(0) if curves else empty,
        std=values.std(0, ddof=1) if len(curves) > 1 else np.zeros(len(shared)),
        finished=[run.curve(metric, axis) for run in counted],
        unfinished=[run.curve(metric, axis) for run in variant.others if metric in run.metrics and run.has_axis(axis)],
        events=[event for run in variant.runs for event in _events(run, metric, axis)],
    )


def _events(run: Run, metric: str, axis: str) -> list[tuple[float, float]]:
    steps = run.guard_steps()
    at, values = run.curve(metric)
    if not steps or not len(at) or not run.has_axis(axis):
        return []
    return list(zip(run.place(steps, axis).tolist(), np.interp(steps, at, values).tolist(), strict=True))
