"""A comparison as one self-contained HTML page: tables and interactive curves, light and dark, without network access.

`page.html` is the template; the browser draws the curves with the copy of plotly that the page contains.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lion_lightning.tracking import plots, report
from lion_lightning.tracking.compare import Comparison, Variant, short
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

    units = {axis: plots.axis_unit(comparison, axis) for axis in comparison.axes}
    factors = {axis: factor for axis, (factor, _) in units.items()}
    metrics = _offered_metrics(comparison)
    looks = _looks([variant.label for variant in comparison.variants])
    data = {
        "axes": {axis: title for axis, (_, title) in units.items()},
        "curves": {
            metric: [
                {**look, **_curve(comparison, variant, metric, factors)}
                for look, variant in zip(looks, comparison.variants, strict=True)
            ]
            for metric in metrics
        },
        "limits": {metric: plots.limits_of(comparison, metric) for metric in metrics},
        "study": _study(comparison),
    }
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
    """The metric that decides, then those that every run with a value of it has, except the axes."""
    runs = [run for run in comparison.runs if comparison.goal.metric in run.metrics]
    every = sorted({name for run in runs for name in run.metrics} - {*AXES.values()})
    shared = [name for name in every if all(run.curve(name)[0].size for run in runs)]
    others = [name for prefix in PREFIXES for name in shared if name.startswith(prefix)]
    return list(dict.fromkeys([comparison.goal.metric, *others]))


def _curve(comparison: Comparison, variant: Variant, metric: str, factors: Mapping[str, float]) -> dict[str, Any]:
    bands = {axis: comparison.band(variant, axis, metric) for axis in factors}
    is_single_shown = metric == comparison.goal.metric or len(comparison.runs) <= MAX_SINGLE_RUNS

    def single(run: Run) -> dict[str, Any]:
        places = {axis: _numbers(run.curve(metric, axis)[0] / factors[axis]) for axis in factors if run.has_axis(axis)}
        return {"name": run.name, "state": run.state, "x": places, "y": _numbers(run.curve(metric)[1])}

    return {
        "x": {axis: _numbers(band.x / factors[axis]) for axis, band in bands.items()},
        "mean": _numbers(bands["steps"].mean),
        "std": _numbers(bands["steps"].std),
        "finished": [single(run) for run in variant.counted if is_single_shown],
        "unfinished": [single(run) for run in variant.others],
        "events": {axis: [_numbers((x / factors[axis], y)) for x, y in band.events] for axis, band in bands.items()},
    }


def _study(comparison: Comparison) -> dict[str, Any] | None:
    """The results of many variants against the number that they vary; None for few variants."""
    study = plots.study_of(comparison)
    if study is None or study.key is None:
        return None
    lines = [
        {
            **look,
            "x": _numbers(value for value, _ in line),
            "y": _numbers(spread.mean for _, spread in line),
            "std": _numbers(spread.std for _, spread in line),
        }
        for look, line in zip(_looks(list(study.lines)), study.lines.values(), strict=True)
    ]
    return {"title": short(study.key), "is_log": study.is_logarithmic, "lines": lines}


def _looks(labels: Sequence[str]) -> list[dict[str, str]]:
    styles = zip(labels, plots.styles_of(labels), strict=True)
    return [{"label": label, "color": color, "dash": PLOTLY_DASHES[dash]} for label, (color, dash) in styles]


def _numbers(values: Iterable[float]) -> list[float | None]:
    """Numbers for JSON; NaN and infinities become null, which plotly draws as gaps."""
    return [float(f"{value:.{SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None for value in values]
