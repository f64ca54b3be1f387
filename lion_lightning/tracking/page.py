"""One self-contained HTML page of a comparison: tables and interactive curves, light and dark, no network.

The page is `page.html` with the data and plotly's own script put in; drawing happens in the browser.
"""

import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from lion_lightning.tracking.compare import Comparison, Outcome
from lion_lightning.tracking.figures import AXIS_TITLES, style_of
from lion_lightning.tracking.report import captions, cost_rows, result_rows, unfinished_lines, verdict
from lion_lightning.tracking.runs import AXES, Run

TEMPLATE = Path(__file__).with_name("page.html")
PLOTLY_DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}
# What is offered beside the metric that decides, by the beginning of its name.
OFFERED = ("val/", "train/", "guard/", "lion/", "lr-", "perf/")
RUNS_DRAWN_ONE_BY_ONE = 48  # more would make the page slow; the metric that decides always has its runs
SIGNIFICANT_DIGITS = 6


def write_page(
    comparison: Comparison, file: Path, command: str, date: str, unreadable: Sequence[str] = ()
) -> list[str]:
    """Write the page, about 5 MB of which nearly all is plotly; returns the metrics that it offers."""
    from plotly.offline import get_plotlyjs

    metrics = offered_metrics(comparison)
    data = {
        "axes": {axis: AXIS_TITLES[axis] for axis in comparison.axes},
        "curves": {metric: _curves(comparison, metric) for metric in metrics},
    }
    hardware = sorted({run.hardware for run in comparison.runs if run.hardware}) or ["unknown hardware"]
    result, cost = captions(comparison)
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(comparison.group or comparison.goal.metric),
        plotly=get_plotlyjs(),
        verdict=escape(verdict(comparison)),
        result_table=_table(*result_rows(comparison), result, comparison),
        cost_table=_table(*cost_rows(comparison), cost, comparison),
        notes=_notes([*unfinished_lines(comparison), *comparison.remarks, *unreadable]),
        made=escape(f"{len(comparison.runs)} runs, {date}, on {' and on '.join(hardware)}. Made by:"),
        command=escape(command),
        data=json.dumps(data, allow_nan=False).replace("</", "<\\/"),
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page, encoding="utf-8")
    return metrics


def offered_metrics(comparison: Comparison) -> list[str]:
    """The metric that decides, then others that every run with a history has, without the axes themselves."""
    logged = [run.metrics for run in comparison.runs if run.history]
    shared = sorted(frozenset.intersection(*logged)) if logged else []
    others = [name for prefix in OFFERED for name in shared if name.startswith(prefix)]
    return list(dict.fromkeys([comparison.goal.metric, *(name for name in others if name not in AXES.values())]))


def _curves(comparison: Comparison, metric: str) -> list[dict[str, Any]]:
    one_by_one = metric == comparison.goal.metric or len(comparison.runs) <= RUNS_DRAWN_ONE_BY_ONE
    return [
        _curve(comparison, outcome, metric, number, one_by_one) for number, outcome in enumerate(comparison.outcomes)
    ]


def _curve(comparison: Comparison, outcome: Outcome, metric: str, number: int, one_by_one: bool) -> dict[str, Any]:
    bands = {axis: comparison.band(outcome, axis, metric) for axis in comparison.axes}
    band = bands["steps"]
    color, dash = style_of(number)
    return {
        "label": outcome.label,
        "color": color,
        "dash": PLOTLY_DASHES[dash],
        "x": {axis: _numbers(one.x) for axis, one in bands.items()},
        "mean": _numbers(band.mean),
        "std": _numbers(band.std),
        "finished": [_single(run, metric, comparison.axes) for run in outcome.variant.counted if one_by_one],
        "unfinished": [_single(run, metric, comparison.axes) for run in outcome.variant.others],
        "events": {axis: [_numbers(event) for event in one.events] for axis, one in bands.items()},
    }


def _single(run: Run, metric: str, axes: Iterable[str]) -> dict[str, Any]:
    curves = {axis: run.curve(metric, axis) for axis in axes if run.has_axis(axis)}
    places = {axis: _numbers(x) for axis, (x, _) in curves.items()}
    return {"name": run.name, "state": run.state, "x": places, "y": _numbers(run.curve(metric)[1])}


def _numbers(values: Iterable[float] | np.ndarray) -> list[float | None]:
    """Plain numbers for JSON, which knows neither NaN nor an infinity: those are gaps."""
    return [float(f"{value:.{SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None for value in map(float, values)]


def _table(header: list[str], rows: list[list[str]], caption: str, comparison: Comparison) -> str:
    best = comparison.ranking[0].label if len(comparison.ranking) > 1 else None
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    lines = [
        f"<tr{' class=best' if row[0] == best else ''}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    ]
    return (
        f'<p class="faint">{escape(caption)}.</p><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return f"<p>Beside the count:</p><ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>"
