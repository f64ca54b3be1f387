"""Pictures of a comparison: curves of a few variants, or the result of many against the setting that they vary."""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lion_lightning.tracking.compare import UNIGRAM_ENTROPY, Band, Comparison, Spread, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The palette of Okabe and Ito (jfly.uni-koeln.de/color) is safe for colour-blind readers; dashes extend it.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
USUAL_OPTIMIZERS = ("lion", "adamw", "signum", "muon", "adafactor", "sgd")
"""Optimizers whose curves have the same colour in every picture, in the order of `COLORS`."""
AXIS_TITLES = {"steps": "optimizer steps", "samples": "samples seen", "tokens": "tokens seen"}
MAGNITUDES = ((1e9, 1e9, "billion "), (1e6, 1e6, "million "), (1e4, 1e3, "thousand "), (0, 1.0, ""))
DURATIONS = ((3 * 3600, 3600.0, "hours"), (3 * 60, 60.0, "minutes"), (0, 1.0, "seconds"))
SIZE_INCHES, DOTS_PER_INCH = (7, 4.2), 150
MAX_CURVES = 6  # of more variants the results are drawn, not the curves
MAX_SINGLE_CURVES = 5
MAX_POINTS_WITH_MARKERS = 12
MAX_TICKS = 10
LEGEND_CHARACTERS = 84  # in a line below a picture
TITLE_CHARACTERS = 12  # in an inch
DIVERGED = 2.0  # a curve has diverged if it got worse than its start by this many times what the best one gained
MARGIN = 0.1  # of that gain
LOGARITHMIC_SPAN = 8  # of the values of a setting from which on their axis is logarithmic
SHARES = ("accuracy", "top1", "top5", "ece")
INCHES_A_ROW = 0.3


class Study(NamedTuple):
    """The result of each variant against the one numeric setting that varies most.

    Attributes:
        key: The dotted key of the setting; None where no number that all variants have varies.
        lines: Values of the setting and results over seeds, in order, by optimizer and its other settings.
    """

    key: str | None
    lines: dict[str, list[tuple[float, Spread]]]

    @property
    def values(self) -> list[float]:
        """The values of the setting, in order."""
        return sorted({value for line in self.lines.values() for value, _ in line})

    @property
    def is_logarithmic(self) -> bool:
        """Whether the values span so much that small ones would lie together on a linear axis."""
        return 0 < LOGARITHMIC_SPAN * self.values[0] <= self.values[-1]


def study_of(comparison: Comparison) -> Study | None:
    """The study that many variants make; None where there are few, whose curves can be told apart."""
    if len(comparison.variants) <= MAX_CURVES:
        return None
    values = {
        key: [variant.runs[0].setting(key) for variant in comparison.variants]
        for key in dict.fromkeys(key for variant in comparison.variants for key in variant.settings)
    }
    # A variant that has no number there could not be drawn.
    numeric = {key: set(own) for key, own in values.items() if set(map(type, own)) <= {int, float}}
    key = max(numeric, key=lambda key: len(numeric[key]), default=None)
    if key is None or len(numeric[key]) < 2:
        return Study(None, {})
    lines: dict[str, list[tuple[float, Spread]]] = {}
    for variant, value in zip(comparison.variants, values[key], strict=True):
        lines.setdefault(variant.label_without(key), []).append((float(value), comparison.best(variant)))
    return Study(key, {label: sorted(line, key=lambda point: point[0]) for label, line in lines.items()})


def write_pictures(comparison: Comparison, folder: Path) -> list[Path]:
    """Write the PNGs of a comparison and return their paths.

    Of a few variants these are the curves against what was learned from (tokens, else samples, else steps) and against
    seconds, such as `val_loss-tokens.png`; an axis without a curve is left out. Of many it is one picture of results.
    """
    stem = comparison.goal.metric.replace("/", "_")
    if (study := study_of(comparison)) is not None:
        file = folder / f"{stem}-{short(study.key or 'variants')}.png"
        _write_study(comparison, study, file)
        return [file]
    learned_from = [axis for axis in ("tokens", "samples", "steps") if axis in comparison.axes][:1]
    axes = [*learned_from, *(axis for axis in comparison.axes if axis == "seconds")]
    files = {axis: folder / f"{stem}-{axis}.png" for axis in axes}
    return [file for axis, file in files.items() if write_picture(comparison, file, axis=axis)]


def write_picture(comparison: Comparison, file: Path, *, axis: str = "steps", metric: str | None = None) -> int:
    """Draw the curves of all variants.

    Args:
        comparison: What is drawn.
        file: The PNG; written only where there is a curve.
        axis: A key of `runs.AXES`.
        metric: A logged name; None: the metric that decides.

    Returns:
        The number of runs drawn.
    """
    metric = metric or comparison.goal.metric
    bands = [comparison.band(variant, axis, metric) for variant in comparison.variants]
    drawn = sum(len(band.finished) + len(band.unfinished) for band in bands)
    if not drawn:
        return 0
    limits = limits_of(comparison, metric)
    factor, x_title = axis_unit(comparison, axis)
    seeds = {len(band.finished) for band in bands if band.finished}
    title = [_group_of(comparison) or metric]
    if max(seeds, default=1) > 1:
        title.append(f"mean of {'the' if len(seeds) > 1 else max(seeds)} seeds and one standard deviation")
    with picture(file, "\n".join(title), x_title, _title_of(metric)) as axes:
        styles = styles_of([variant.label for variant in comparison.variants])
        for variant, band, style in zip(comparison.variants, bands, styles, strict=True):
            over = f", {len(band.finished)} seed{'s' if len(band.finished) != 1 else ''}" if len(seeds) > 1 else ""
            _draw(axes, band, factor, limits, variant.label + over, *style)
        entropies = {round(value, 3) for run in comparison.runs if (value := run.last(UNIGRAM_ENTROPY)) is not None}
        if len(entropies) == 1 and metric == "val/loss":  # the loss of a model that ignores context
            axes.axhline(entropies.pop(), color="grey", linestyle="--", linewidth=1, label="unigram entropy")
        if any(band.events for band in bands):
            axes.scatter([], [], marker="v", color="white", edgecolor="black", linewidth=0.5, s=40, label="guard event")
        if any(band.unfinished for band in bands):
            axes.plot([], [], color="grey", linestyle=":", linewidth=1, label="not finished")
        if limits is not None:
            axes.set_ylim(*limits)
            axes.plot([], [], linestyle="", label="what diverged is cut off")
    return drawn


@contextmanager
def picture(
    file: Path, title: str, x_title: str, y_title: str, size: tuple[float, float] = SIZE_INCHES
) -> Iterator["Axes"]:
    """Axes to draw on, written to a PNG at the end, with the legend below them.

    Args:
        file: The PNG; its folder is created if missing.
        title, x_title, y_title: The titles of the picture and of its axes.
        size: Width and height in inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x_title, ylabel=y_title)
    lines = [line for one in title.splitlines() for line in textwrap.wrap(one, int(TITLE_CHARACTERS * size[0]))]
    figure.suptitle("\n".join(lines), fontsize="medium", x=0.01, horizontalalignment="left")
    axes.ticklabel_format(useOffset=False, style="plain")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    yield axes
    labels = axes.get_legend_handles_labels()[1]
    if labels:
        columns = max(1, min(4, len(labels), LEGEND_CHARACTERS // (max(map(len, labels)) + 8)))
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def style_of(number: int) -> tuple[str, str]:
    """Colour and dash (in matplotlib's notation) of the curve with this number."""
    return COLORS[number % len(COLORS)], DASHES[number // len(COLORS) % len(DASHES)]


def styles_of(labels: Sequence[str]) -> list[tuple[str, str]]:
    """Colour and dash of each curve: the first one of a usual optimizer has its own, the rest take others."""
    optimizers = [label.partition(" (")[0] for label in labels]
    own = {name: number for number, name in enumerate(USUAL_OPTIMIZERS) if name in optimizers}
    taken = set(own.values())
    others = (number for number in count() if number not in taken)
    return [style_of(own.pop(name) if name in own else next(others)) for name in optimizers]


def axis_unit(comparison: Comparison, axis: str) -> tuple[float, str]:
    """What the places on `axis` are divided by so that their numbers are short, and the title that says so."""
    runs = [run for run in comparison.runs if run.history and run.has_axis(axis)]
    largest = max((float(run.place([run.last_step], axis)[0]) for run in runs), default=0)
    units = DURATIONS if axis == "seconds" else MAGNITUDES
    factor, unit = next((factor, unit) for least, factor, unit in units if not largest < least)
    return factor, f"{unit} of training and validation" if axis == "seconds" else unit + AXIS_TITLES[axis]


def _group_of(comparison: Comparison) -> str:
    """The group, or the first of several and their number, which fits on a picture."""
    first, *others = comparison.group.split(", ")
    return f"{first} and {len(others)} other group{'s' if len(others) > 1 else ''}" if others else first


def _title_of(metric: str) -> str:
    name = metric.partition("/")[2]
    return f"{metric} (nats)" if "loss" in name else f"{metric} (share)" if name in SHARES else metric


def _draw(
    axes: "Axes", band: Band, factor: float, limits: tuple[float, float] | None, label: str, color: str, dash: str
) -> None:
    seeds = len(band.finished)
    labels = [label]  # taken by the first line that is drawn
    longest = max((len(x) for x, _ in [*band.finished, *band.unfinished]), default=0)
    marker = "o" if longest <= MAX_POINTS_WITH_MARKERS else ""
    look: dict[str, Any] = {"color": color, "marker": marker, "markersize": 3}
    if band.x.size:
        axes.plot(band.x / factor, band.mean, linestyle=dash, linewidth=1.6, label=labels.pop(), **look)
        low, high = band.mean - band.std, band.mean + band.std
        axes.fill_between(band.x / factor, low, high, color=color, alpha=0.2, linewidth=0)
    show_seeds = seeds > 1 and (seeds <= MAX_SINGLE_CURVES or not band.x.size)
    single: dict[str, Any] = {"linestyle": "-", "linewidth": 0.7, "alpha": 0.6}
    unfinished: dict[str, Any] = {"linestyle": ":", "linewidth": 1.4, "marker": marker, "markersize": 3}
    for curves, line in ((band.finished if show_seeds else [], single), (band.unfinished, unfinished)):
        for x, y in curves:
            name = labels.pop() if labels else "_nolegend_"
            axes.plot(x / factor, y, color=color, label=name, **line)
    if band.events:
        places, values = np.array(band.events).T
        values = values if limits is None else values.clip(*limits)
        look = {"marker": "v", "color": color, "edgecolor": "black", "linewidth": 0.5, "s": 40, "zorder": 3}
        axes.scatter(places / factor, values, clip_on=False, **look)


def limits_of(comparison: Comparison, metric: str) -> tuple[float, float] | None:
    """Limits of the y-axis, such that a diverged run does not flatten the others; None where no run has diverged.

    Args:
        comparison: The runs.
        metric: The metric that decides, or a loss; others are not limited.
    """
    goal = comparison.goal
    if metric != goal.metric and "loss" not in metric:
        return None
    sign = -1 if metric == goal.metric and goal.mode == "max" else 1
    curves = [sign * run.curve(metric)[1] for run in comparison.runs]
    curves = [finite for values in curves if (finite := values[np.isfinite(values)]).size]
    if not curves:
        return None
    start = float(np.quantile([values[0] for values in curves], 0.5, method="lower"))
    best, last = (float(function([function(values) for values in curves])) for function in (np.min, np.max))
    gain = start - best
    if not 0 < DIVERGED * gain < last - start:
        return None
    low, high = sorted((sign * (best - MARGIN * gain), sign * (start + MARGIN * gain)))
    return low, high


def _write_study(comparison: Comparison, study: Study, file: Path) -> None:
    goal = comparison.goal
    better = "less" if goal.mode == "min" else "more"
    seeds = max(len(comparison.best(variant).values) for variant in comparison.variants)
    spread = ", mean and standard deviation over seeds" if seeds > 1 else ""
    title = f"{_group_of(comparison) or goal.metric}\nbest {goal.metric} of each run ({better} is better){spread}"
    if study.key is None:
        _write_ranking(comparison, file, title)
        return
    with picture(file, title, short(study.key).replace("_", " "), _title_of(goal.metric)) as axes:
        styles = styles_of(list(study.lines))
        for (label, line), (color, dash) in zip(study.lines.items(), styles, strict=True):
            means, stds = (np.array([getattr(spread, name) for _, spread in line]) for name in ("mean", "std"))
            x = np.array([value for value, _ in line])
            look: dict[str, Any] = {"color": color, "linestyle": dash, "marker": "o", "markersize": 4, "capsize": 3}
            axes.errorbar(x, means, yerr=np.nan_to_num(stds), label=label, **look)
            if (lost := x[~np.isfinite(means)]).size:
                axes.plot(lost, np.full(lost.size, 0.97), "x", color=color, transform=axes.get_xaxis_transform())
        values = study.values
        if any(not spread.values for line in study.lines.values() for _, spread in line):
            axes.errorbar([], [], fmt="x", color="grey", label="no finished run")
        if study.is_logarithmic:
            axes.set_xscale("log")
        if len(values) <= MAX_TICKS:
            axes.set_xticks(values, [f"{value:g}" for value in values], rotation=45 if len(values) > 6 else 0)
            axes.minorticks_off()


def _write_ranking(comparison: Comparison, file: Path, title: str) -> None:
    """Draw a point with its deviation for each variant, the best on top."""
    variants = comparison.ordered
    labels = [one.label if one in comparison.ranking else f"{one.label}: no finished run" for one in variants]
    spreads = [comparison.best(one) for one in variants]
    height = 1.2 + INCHES_A_ROW * len(variants)
    with picture(file, title, _title_of(comparison.goal.metric), "", (SIZE_INCHES[0], height)) as axes:
        deviations = np.nan_to_num([spread.std for spread in spreads])
        rows = np.arange(len(variants))
        axes.errorbar([spread.mean for spread in spreads], rows, xerr=deviations, fmt="o", color=COLORS[0], capsize=3)
        axes.set_yticks(rows, labels)
        axes.set_ylim(len(variants) - 0.5, -0.5)
