"""The statistics of a comparison: the variants of one experiment, which is best, by how much, and at what cost."""

import json
import math
import statistics
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from lion_lightning.tracking.runs import AXES, SECONDS, STEP, Run

Mode = Literal["min", "max"]
USUAL_BASELINE = "adamw"
CONFIDENCE = 0.95
MIN_SEEDS_FOR_A_TEST = 2
COSTS = ("step_ms", "peak_memory_gib", "bytes_per_parameter")  # logged as `perf/...`
UNIGRAM_ENTROPY = "data/unigram_entropy"
COMPARED = ("optim", "schedule", "guard")  # keys that may differ between variants
# Keys that have no effect on the result: names, places, logging.
IRRELEVANT = (
    "seed", "data.seed", "run_dir", "run_name", "group", "resume", "export", "logger", "data.cache_dir",
    "data.num_workers", "trainer.log_every_n_steps", "trainer.name", "debug", "checkpoint", "guard.trace",
)  # fmt: skip
SHOWN_DIFFERENCES = 6
SHOWN_RUNS = 3


class Incomparable(ValueError):
    """Runs that make no fair comparison. The message names the difference and the options that allow it."""


@dataclass(frozen=True)
class Goal:
    """The metric that decides, and whether less (`min`) or more (`max`) of it is better."""

    metric: str
    mode: Mode

    def best(self, values: Iterable[float]) -> float:
        """The best finite value; NaN where there is none."""
        finite = [float(value) for value in values if math.isfinite(value)]
        return (min if self.mode == "min" else max)(finite, default=math.nan)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; the deviation of a single seed is NaN."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def std(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan


class Welch(NamedTuple):
    """Welch's two-sided t-test: the confidence interval of the difference of means, and p."""

    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Variant:
    """The runs of one setting, which differ only in their seed.

    Attributes:
        name: The optimizer.
        settings: What distinguishes this variant from others of that optimizer, by dotted key.
        counted: Finished runs, one per seed.
        others: Runs that are shown but not counted: running, crashed, failed.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    counted: list[Run] = field(default_factory=list)
    others: list[Run] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        return self.counted + self.others

    @property
    def label(self) -> str:
        return self.label_without("")

    def label_without(self, key: str) -> str:
        """The optimizer with its distinguishing settings, except `key`."""
        shown = [f"{short(name)} {_text(value)}" for name, value in self.settings.items() if name != key]
        return f"{self.name} ({', '.join(shown)})" if shown else self.name


@dataclass(frozen=True)
class Band:
    """A variant's curve: mean and standard deviation over its counted runs, single runs, and guard events."""

    x: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    finished: list[tuple[np.ndarray, np.ndarray]]
    unfinished: list[tuple[np.ndarray, np.ndarray]]
    events: list[tuple[float, float]]


@dataclass(frozen=True)
class Comparison:
    """The runs of one experiment, compared."""

    goal: Goal
    baseline: Variant
    variants: list[Variant]
    group: str
    remarks: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        return [run for variant in self.variants for run in variant.runs]

    @cached_property
    def axes(self) -> list[str]:
        """The axes that every run with a value of the goal's metric has."""
        logged = [run for run in self.runs if self.goal.metric in run.metrics]
        return [axis for axis in AXES if logged and all(run.has_axis(axis) for run in logged)]

    @cached_property
    def target(self) -> float:
        """The mean over the baseline's runs of their best values; NaN where none has finished."""
        return self.best(self.baseline).mean

    @cached_property
    def ranking(self) -> list[Variant]:
        """The variants with finished runs, best mean first."""
        done = [variant for variant in self.variants if math.isfinite(self.best(variant).mean)]
        return sorted(done, key=lambda variant: self.best(variant).mean, reverse=self.goal.mode == "max")

    @property
    def ordered(self) -> list[Variant]:
        """Best first, then the variants without a result."""
        return [*self.ranking, *(variant for variant in self.variants if variant not in self.ranking)]

    def variant(self, label: str) -> Variant:
        return next(variant for variant in self.variants if variant.label == label)

    def best(self, variant: Variant) -> Spread:
        """The best values of the counted runs."""
        return _spread(variant.counted, lambda run: self.goal.best(run.curve(self.goal.metric)[1]))

    def final(self, variant: Variant) -> Spread:
        """The last values of the counted runs."""
        return _spread(variant.counted, lambda run: run.last(self.goal.metric))

    def against_baseline(self, variant: Variant) -> Welch | None:
        """The test of a variant's best values against the baseline's, with p corrected for the number of variants.

        None for the baseline itself, and where one of both has fewer than two seeds.
        """
        return self._tests.get(variant.label)

    @property
    def test_count(self) -> int:
        """The number of variants that are tested against the baseline."""
        return len(self._tests)

    @cached_property
    def _tests(self) -> dict[str, Welch]:
        """By label, the tests of all variants but the baseline."""
        reference = self.best(self.baseline).values
        others = [variant for variant in self.variants if variant is not self.baseline]
        tests = {one.label: test for one in others if (test := welch(self.best(one).values, reference))}
        corrected = holm([test.p for test in tests.values()])
        return {label: test._replace(p=p) for (label, test), p in zip(tests.items(), corrected, strict=True)}

    def paired_error(self, variant: Variant) -> float:
        """Half the 95 % interval of the mean difference to the baseline, seed by seed.

        Runs of a recipe that share a seed share initialisation and order of the data, so that this can be narrower than
        Welch's interval. NaN for the baseline itself, with other seeds than the baseline's, and where nothing varies.
        """
        ours, theirs = self._best_by_seed(variant), self._best_by_seed(self.baseline)
        are_all = len(ours) == len(self.best(variant).values) and len(theirs) == len(self.best(self.baseline).values)
        if variant is self.baseline or ours.keys() != theirs.keys() or len(ours) < MIN_SEEDS_FOR_A_TEST or not are_all:
            return math.nan
        from scipy.stats import t

        differences = [ours[seed] - theirs[seed] for seed in ours]
        quantile = float(t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1))
        return quantile * statistics.stdev(differences) / math.sqrt(len(differences)) or math.nan

    def _best_by_seed(self, variant: Variant) -> dict[Any, float]:
        best = {_seed(run): self.goal.best(run.curve(self.goal.metric)[1]) for run in variant.counted}
        return {seed: value for seed, value in best.items() if seed is not None and math.isfinite(value)}

    def to_target(self, variant: Variant, axis: str) -> list[float]:
        """The places on `axis` at which the counted runs first reached `target`; runs that never did are left out."""
        places = []
        for run in variant.counted:
            x, values = run.curve(self.goal.metric, axis)
            reached = x[values <= self.target if self.goal.mode == "min" else values >= self.target]
            if reached.size and math.isfinite(reached[0]):
                places.append(float(reached[0]))
        return places

    def costs(self, variant: Variant) -> dict[str, float]:
        """Means of the metrics of `COSTS` that the variant's runs logged."""
        runs = variant.counted or variant.others
        logged = {name: [cost for run in runs if (cost := run.last(f"perf/{name}")) is not None] for name in COSTS}
        return {name: statistics.fmean(values) for name, values in logged.items() if values}

    def band(self, variant: Variant, axis: str = "steps", metric: str | None = None) -> Band:
        """The curve of a variant.

        Args:
            variant: One of `variants`.
            axis: A key of `AXES`. The mean is taken at the steps that all counted runs share and drawn at the mean of
                their places.
            metric: A logged name; None: the goal's metric.
        """
        metric = metric or self.goal.metric
        counted, others, runs = (
            [run for run in some if metric in run.metrics and run.has_axis(axis)]
            for some in (variant.counted, variant.others, variant.runs)
        )
        by_step = [dict(zip(*run.curve(metric), strict=True)) for run in counted]
        shared = sorted(set(by_step[0]).intersection(*by_step[1:])) if by_step else []
        values = np.array([[curve[step] for step in shared] for curve in by_step])
        return Band(
            x=np.mean([run.place(shared, axis) for run in counted], axis=0) if shared else np.empty(0),
            mean=values.mean(0) if shared else np.empty(0),
            std=values.std(0, ddof=1) if len(counted) > 1 else np.zeros(len(shared)),
            finished=[run.curve(metric, axis) for run in counted],
            unfinished=[run.curve(metric, axis) for run in others],
            events=[event for run in runs for event in _guard_events(run, metric, axis)],
        )


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
    """Compare runs that differ only in optimizer, schedule, guard and seed.

    Args:
        runs: The runs of one experiment.
        metric: The metric that decides; None: the one that the runs' recipe monitors.
        mode: Whether less (`min`) or more (`max`) of it is better; None: as in the recipe.
        baseline: Label of the variant that the others are tested against; None: `adamw` if present, else the first.
        by: Dotted keys of the configuration that are compared as well.
        aside: Dotted keys that follow from those, such as a learning rate scaled with the batch: they may differ and
            do not appear in labels.
        unlike: Compare runs in spite of other differences, with a remark.

    Raises:
        Incomparable: No runs, runs with other differences, or a missing metric or baseline.
    """
    if not runs:
        raise Incomparable("there are no runs to compare")
    remarks = []
    try:
        _check_alike(runs, by, aside)
    except Incomparable as reason:
        if not unlike:
            raise
        remarks.append(f"UNLIKE RUNS: {str(reason).split('. ')[0]}")
    goal = _goal(runs, metric, mode)
    members: dict[str, list[tuple[Variant, Run]]] = {}
    for variant, run in zip(variants_of(runs, by, aside), runs, strict=True):
        members.setdefault(variant.label, []).append((variant, run))
    variants = [_filled(same[0][0], [run for _, run in same], goal, remarks) for same in members.values()]
    groups = ", ".join(sorted({run.group for run in runs if run.group}))
    return Comparison(goal, _baseline(variants, baseline), variants, groups, remarks)


def welch(values: Sequence[float], reference: Sequence[float]) -> Welch | None:
    """Welch's t-test of two samples.

    Returns:
        None where a sample has fewer than two values; `p` is NaN where neither sample varies.
    """
    if min(len(values), len(reference)) < MIN_SEEDS_FOR_A_TEST:
        return None
    if len(set(values)) == len(set(reference)) == 1:
        return Welch(math.nan, math.nan, math.nan)
    from scipy.stats import ttest_ind

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy warns of samples that hardly vary; p is then NaN
        test = ttest_ind(values, reference, equal_var=False)
        interval = test.confidence_interval(CONFIDENCE)
    return Welch(float(interval.low), float(interval.high), float(test.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """The values of p, corrected for their number (Holm, 1979, Scandinavian Journal of Statistics 6); NaN stays."""
    tested = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    corrected, largest = list(p_values), 0.0
    for rank, (p, place) in enumerate(tested):
        largest = max(largest, min(1.0, p * (len(tested) - rank)))
        corrected[place] = largest
    return corrected


def guess_mode(metric: str) -> Mode:
    """`max` for an accuracy or a speed, `min` for anything else, by the metric's name."""
    return "max" if any(part in metric for part in ("acc", "top1", "top5", "f1", "per_second")) else "min"


def variants_of(runs: Sequence[Run], by: Sequence[str] = (), aside: Sequence[str] = ()) -> list[Variant]:
    """The variant of each run, without runs: its optimizer, and the settings in which runs of that optimizer differ.

    Args:
        runs: The runs of one experiment.
        by: Dotted keys that distinguish every variant.
        aside: Dotted keys that distinguish none.
    """
    names = [str(run.setting("optim.name") or run.setting("optimizer") or run.name) for run in runs]
    settings = [
        {
            key: value
            for key, value in relevant_settings(run.config).items()
            if _is_below(key, COMPARED) and not _is_below(key, aside)
        }
        for run in runs
    ]
    variants = []
    for run, name, own in zip(runs, names, settings, strict=True):
        same_name = [other for other_name, other in zip(names, settings, strict=True) if other_name == name]
        differing = [key for key in own if any(other.get(key) != own[key] for other in same_name) and key not in by]
        shown = {**{key: own[key] for key in differing}, **{key: run.setting(key) for key in by}}
        variants.append(Variant(name, {key: value for key, value in shown.items() if key != "optim.name"}))
    return variants


def _check_alike(runs: Sequence[Run], by: Sequence[str], aside: Sequence[str]) -> None:
    groups = sorted({run.group for run in runs})
    if len(groups) > 1 and not by:
        counts = [f"{group or 'no group'} ({sum(run.group == group for run in runs)} runs)" for group in groups]
        raise Incomparable(
            f"the runs belong to {len(groups)} groups: {'; '.join(counts)}. Name one with --group, compare each for "
            "itself with --each-group, say what is compared with --by, or mix them with --unlike"
        )
    differences = _differences(runs, (*COMPARED, *by, *aside))
    if differences:
        more = len(differences) - SHOWN_DIFFERENCES
        shown = "; ".join(differences[:SHOWN_DIFFERENCES]) + (f"; and {more} more keys" if more > 0 else "")
        raise Incomparable(
            f"the runs differ in more than optimizer and seed: {shown}. "
            "If that is what you compare, name the keys with --by; to mix them all the same, --unlike"
        )
    entropies = {round(value, 6) for run in runs if (value := run.last(UNIGRAM_ENTROPY)) is not None}
    if len(entropies) > 1:
        raise Incomparable(
            f"the validation texts differ: unigram entropy {', '.join(map(str, sorted(entropies)))} nats (python_docs "
            "differs between Python versions). To compare all the same, --unlike"
        )


def _differences(runs: Sequence[Run], ignored: Collection[str]) -> list[str]:
    """A text for each key outside `ignored` in which the runs differ: its values, and the runs that have them."""
    settings = [relevant_settings(run.config) for run in runs]
    found = []
    for key in sorted({key for one in settings for key in one if not _is_below(key, ignored)}):
        owners: dict[str, set[str]] = {}
        for run, one in zip(runs, settings, strict=True):
            owners.setdefault(_text(one[key]) if key in one else "missing", set()).add(run.name)
        if len(owners) > 1:
            values = [
                f"{value} ({', '.join(sorted(names)[:SHOWN_RUNS])}{', ...' if len(names) > SHOWN_RUNS else ''})"
                for value, names in owners.items()
            ]
            found.append(f"{key} is {' and '.join(values)}")
    return found


def _goal(runs: Sequence[Run], metric: str | None, mode: Mode | None) -> Goal:
    logged = sorted(frozenset().union(*(run.metrics for run in runs)))
    names = ", ".join(name for name in logged if not name.startswith("_")) or "nothing"
    monitors = {run.setting("recipe.monitor"): run.setting("recipe.mode") for run in runs}
    if metric is None:
        if len(monitors) != 1 or None in monitors:
            raise Incomparable(f"the runs do not name one metric that decides; name it with --metric: {names}")
        (metric,) = monitors
    if metric not in logged:
        raise Incomparable(f"no run has logged {metric}; there are: {names}")
    return Goal(metric, mode or monitors.get(metric) or guess_mode(metric))


def _baseline(variants: Sequence[Variant], wanted: str | None) -> Variant:
    name = wanted or USUAL_BASELINE
    matching = [variant for variant in variants if name in (variant.label, variant.name)]
    if wanted and not matching:
        labels = ", ".join(variant.label for variant in variants)
        raise Incomparable(f"there is no {wanted} to compare with; there are: {labels}")
    candidates = matching or list(variants)
    return next((variant for variant in candidates if variant.counted), candidates[0])


def _filled(variant: Variant, runs: Sequence[Run], goal: Goal, remarks: list[str]) -> Variant:
    """Sort the runs of a variant into `counted` and `others`, one per seed."""
    by_seed: dict[Any, list[Run]] = {}
    for number, run in enumerate(sorted(runs, key=lambda run: run.created)):
        by_seed.setdefault(("no seed", number) if _seed(run) is None else _seed(run), []).append(run)
    for seed, attempts in by_seed.items():
        finished = [run for run in attempts if run.state == "finished"]
        # Repeating the command of a run that is over makes one that has nothing to log.
        with_result = [run for run in finished if run.last(goal.metric) is not None]
        chosen = (with_result or finished or attempts)[-1]
        joined = _with_first_part(chosen, attempts)
        (variant.counted if chosen.state == "finished" else variant.others).append(joined)
        if len(attempts) > 1:
            what = "the newest finished one counts" if joined is chosen else "the last goes on from the one before"
            remarks.append(f"{variant.label}, seed {seed}: {len(attempts)} runs; {what}")
    if any(run.setting("seed") is None for run in runs):
        remarks.append(f"{variant.label}: no `seed` in the configuration; each of its {len(runs)} runs counts as one")
    return variant


def _seed(run: Run) -> Any:
    """What a run's weights and data are drawn by: its seed, and that of the data where it is another; None without."""
    seed, of_data = run.setting("seed"), run.setting("data.seed")
    return seed if of_data in (None, seed) else f"{seed} (data.seed {of_data})"


def _with_first_part(run: Run, attempts: Sequence[Run]) -> Run:
    """Prepend the history of the runs that `run` resumed: a run resumed offline is a new W&B run."""
    earlier = [other for other in attempts if other.created < run.created and other.history]
    if run.setting("resume") is None or not earlier or not run.history:
        return run
    start = min(row.get(STEP, 0) for row in run.history)
    before = _with_first_part(earlier[-1], earlier[:-1])
    kept = [row for row in before.history if row.get(STEP, 0) < start]
    if not kept:  # `resume=auto` found no checkpoint
        return run
    spent = max(row.get(SECONDS, 0.0) for row in kept)
    shifted = [{**row, SECONDS: row[SECONDS] + spent} if SECONDS in row else row for row in run.history]
    return replace(run, history=[*kept, *shifted])


def _spread(runs: Sequence[Run], value: Callable[[Run], float | None]) -> Spread:
    return Spread(tuple(one for one in map(value, runs) if one is not None and math.isfinite(one)))


def _guard_events(run: Run, metric: str, axis: str) -> list[tuple[float, float]]:
    """Places of the guard's events, on the curve of the run."""
    steps, (at, values) = run.guard_steps(), run.curve(metric)
    if not at.size:
        return []
    return list(zip(run.place(steps, axis).tolist(), np.interp(steps, at, values).tolist(), strict=True))


def relevant_settings(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings of a configuration that can affect the result, by dotted key."""
    found: dict[str, Any] = {}
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            found |= relevant_settings(value, f"{key}.")
        elif not _is_below(key, IRRELEVANT):
            found[key] = value
    return found


def _is_below(key: str, prefixes: Collection[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def short(key: str) -> str:
    """A dotted key as labels have it."""
    group, _, rest = key.partition(".")
    return rest if group in ("optim", "data", "trainer") and rest != "name" else key


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "/".join(map(_text, value))
    return value if isinstance(value, str) else json.dumps(value)
