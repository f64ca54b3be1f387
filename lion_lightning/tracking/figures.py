"""Curves as pictures for a paper: a metric against each axis, the mean over seeds with a band, guard events marked."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lion_lightning.tracking.compare import Band, Comparison
from lion_lightning.tracking.variants import YARDSTICK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours (jfly.uni-koeln.de/color), which the colour-blind tell apart; dashes when they run out.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
AXIS_TITLES = {
    "steps": "optimizer steps",
    "samples": "samples seen",
    "tokens": "tokens seen",
    "seconds": "seconds of training and validation",
    "energy": "energy (kJ)",
}
SIZE_INCHES, DOTS_PER_INCH = (7, 4), 150
RUNS_SHOWN_ONE_BY_ONE = 5
CURVES_WITH_A_LEGEND_INSIDE = 7  # the legend of more would lie over the curves


def write_pictures(comparison: Comparison, folder: Path, metric: str | None = None) -> list[Path]:
    """One PNG per axis that the runs have, `val_loss-steps.png`; an axis without a curve is left out."""
    name = metric or comparison.goal.metric
    files = [folder / f"{name.replace('/', '_')}-{axis}.png" for axis in comparison.axes]
    return [
        file
        for file, axis in zip(files, comparison.axes, strict=True)
        if write_picture(comparison, file, axis=axis, metric=name)
    ]


def write_picture(comparison: Comparison, file: Path, *, axis: str = "steps", metric: str | None = None) -> int:
    """Draw one picture; returns the number of curves of runs in it, and writes nothing where there are none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    bands = [comparison.band(outcome, axis, metric) for outcome in comparison.outcomes]
    drawn = sum(len(band.finished) + len(band.unfinished) for band in bands)
    if not drawn:
        return 0
    figure, axes = plt.subplots(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH)
    for number, band in enumerate(bands):
        _draw_band(axes, band, number)
    _draw_yardstick(axes, comparison, metric or comparison.goal.metric)
    _draw_legend_of_marks(axes, bands)
    axes.set(xlabel=AXIS_TITLES[axis], ylabel=metric or comparison.goal.metric)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(bands) > CURVES_WITH_A_LEGEND_INSIDE:
        axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        axes.legend(frameon=False, fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, bbox_inches="tight")
    plt.close(figure)
    return drawn


def style_of(number: int) -> tuple[str, str]:
    """Colour and dash of the number-th curve."""
    return COLORS[number % len(COLORS)], DASHES[number // len(COLORS) % len(DASHES)]


def _draw_band(axes: "Axes", band: Band, number: int) -> None:
    color, dash = style_of(number)
    seeds = len(band.finished)
    label = f"{band.label} ({seeds} seed{'s' if seeds != 1 else ''})"
    if len(band.x):
        axes.plot(band.x, band.mean, color=color, linestyle=dash, linewidth=1.6, label=label)
        axes.fill_between(band.x, band.mean - band.std, band.mean + band.std, color=color, alpha=0.2, linewidth=0)
        label = "_nolegend_"
    if seeds > 1 and (seeds <= RUNS_SHOWN_ONE_BY_ONE or not len(band.x)):
        label = _draw_runs(axes, band.finished, color, "-", label)
    if band.unfinished:
        _draw_runs(axes, band.unfinished, color, ":", label)
    if band.events:
        x, y = zip(*band.events, strict=True)
        axes.scatter(x, y, marker="v", color=color, edgecolor="black", linewidth=0.5, s=40, zorder=3)


def _draw_runs(axes: "Axes", curves: Sequence[tuple], color: str, dash: str, label: str) -> str:
    """Thin single curves; the first takes the label where nothing has it yet."""
    for x, y in curves:
        axes.plot(x, y, color=color, linestyle=dash, linewidth=0.7, alpha=0.6, label=label)
        label = "_nolegend_"
    return label


def _draw_yardstick(axes: "Axes", comparison: Comparison, metric: str) -> None:
    """The unigram entropy: what a model without any context would reach, where all runs have the same."""
    seen = {round(value, 3) for run in comparison.runs if (value := run.last(YARDSTICK)) is not None}
    if len(seen) == 1 and metric == "val/loss":
        axes.axhline(seen.pop(), color="grey", linestyle="--", linewidth=1, label="unigram entropy")


def _draw_legend_of_marks(axes: "Axes", bands: Sequence[Band]) -> None:
    if any(band.events for band in bands):
        axes.scatter([], [], marker="v", color="white", edgecolor="black", linewidth=0.5, s=40, label="guard event")
    if any(band.unfinished for band in bands):
        axes.plot([], [], color="grey", linestyle=":", linewidth=0.7, label="not finished")
