"""A comparison as one self-contained HTML page: tables and interactive curves, light and dark, without network access.

`page.html` is the template; the browser draws the curves with the copy of plotly that the page contains.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lion_lightning.tracking import report
from lion_lightning.tracking.compare import Comparison, Variant
from lion_lightning.tracking.runs import AXES, Run

PLOTLY_DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}
PREFIXES = ("val/", "train/", "guard/", "lion/", "lr/", "perf/")  # of the metrics offered, in this order
MAX_SINGLE_RUNS = 48  # in more runs, only the metric that decides has a curve per run: the page would be slow
SIGNIFICANT_DIGITS = 6


def write_page(comparison: Comparison, file: Path, command: str, date: str) -> None:
    """Write the page; nearly all of its 5 MB is plotly.

    Args:
        comparison: What is shown.
        file: The HTML file.
        command: The command line that made the report.
        date: ISO 8601.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    curves = {
        metric: [_curve(comparison, variant, number, metric) for number, variant in enumerate(comparison.variants)]
        for metric in _offered_metrics(comparison)
    }
    data = {"axes": {axis: report.AXIS_TITLES[axis] for axis in comparison.axes}, "curves": curves}
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    page = templates.get_template("page.html").render(
        title=comparison.group or comparison.goal.metric,
        plotly=get_plotlyjs(),
        verdict=report.verdict(comparison),
        tables=report.tables(comparison),
        winner=report.winner(comparison),
        notes=report.notes(comparison),
        origin=report.origin(comparison, date),
        command=command,
        data=json.dumps(data, allow_nan=False).replace("</", "<\\/"),
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page, encoding="utf-8")


def _offered_metrics(comparison: Comparison) -> list[str]:
    """The metric that decides, then those that every run with a history has, except the axes."""
    logged = [run.metrics for run in comparison.runs if run.history]
    shared = sorted(frozenset.intersection(*logged) - {*AXES.values()}) if logged else []
    others = [name for prefix in PREFIXES for name in shared if name.startswith(prefix)]
    return list(dict.fromkeys([comparison.goal.metric, *others]))


def _curve(comparison: Comparison, variant: Variant, number: int, metric: str) -> dict[str, Any]:
    bands = {axis: comparison.band(variant, axis, metric) for axis in comparison.axes}
    color, dash = report.style_of(number)
    single = metric == comparison.goal.metric or len(comparison.runs) <= MAX_SINGLE_RUNS
    return {
        "label": variant.label,
        "color": color,
        "dash": PLOTLY_DASHES[dash],
        "x": {axis: _numbers(band.x) for axis, band in bands.items()},
        "mean": _numbers(bands["steps"].mean),
        "std": _numbers(bands["steps"].std),
        "finished": [_single(run, metric, comparison.axes) for run in variant.counted if single],
        "unfinished": [_single(run, metric, comparison.axes) for run in variant.others],
        "events": {axis: [_numbers(event) for event in band.events] for axis, band in bands.items()},
    }


def _single(run: Run, metric: str, axes: Iterable[str]) -> dict[str, Any]:
    places = {axis: _numbers(run.curve(metric, axis)[0]) for axis in axes if run.has_axis(axis)}
    return {"name": run.name, "state": run.state, "x": places, "y": _numbers(run.curve(metric)[1])}


def _numbers(values: Iterable[float]) -> list[float | None]:
    """Numbers for JSON; NaN and infinities become null, which plotly draws as gaps."""
    return [float(f"{value:.{SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None for value in values]
