"""The report of bench_step.py: tables on the terminal, Markdown, JSON and a bar chart."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from scripts.bench.bench_measure import Result

COLUMNS = ("optimizer", "ms", "±", "B", "GB/s", "limit", "AdamW", "step", "decay")
LEGEND = (
    "ms: median of the rounds, ± half the distance of the quartiles. B: bytes a step must move per parameter. "
    "limit: share of the streaming limit. AdamW: how many times faster than torch's fused AdamW with the same "
    "parameters, median of the rounds' ratios. step, decay: share of the exact step and decay found in the weights "
    "after 200 steps of 4e-5."
)


def streaming_limit(limits: Mapping[str, Sequence[float]]) -> tuple[str, float]:
    """The fastest way to stream and its median GB/s."""
    way = max(limits, key=lambda name: statistics.median(limits[name]))
    return way, statistics.median(limits[way])


def figures(
    result: Result, results: Sequence[Result], count: int, limits: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """All figures of one subject. Ratios are medians over the rounds, which share the machine's mood."""
    way, _ = streaming_limit(limits)
    speeds = [result.bytes_moved * count / milliseconds / 1e6 for milliseconds in result.times]
    subject = result.subject
    yardstick = [r for r in results if r.subject.name == f"AdamW fused {subject.dtype}" and r.error is None]
    ratios = [mine / own for mine, own in zip(yardstick[0].times, result.times, strict=True)] if yardstick else []
    return {
        "name": subject.name,
        "package": subject.family,
        "mode": subject.mode,
        "dtype": subject.dtype,
        "median_ms": result.median,
        "best_ms": min(result.times),
        "spread_ms": result.spread,
        "times_ms": result.times,
        "bytes_moved_per_parameter": result.bytes_moved,
        "bytes_kept_per_parameter": result.bytes_kept,
        "gb_per_second": statistics.median(speeds),
        "share_of_limit": statistics.median(s / limit for s, limit in zip(speeds, limits[way], strict=True)),
        "times_faster_than_adamw": statistics.median(ratios) if ratios else None,
        "step_kept": result.step_kept,
        "decay_kept": result.decay_kept,
    }


def row(entry: Mapping[str, Any]) -> list[str]:
    ratio = entry["times_faster_than_adamw"]
    milliseconds = entry["median_ms"]
    digits = 3 if milliseconds < 1 else 1
    return [
        entry["name"],
        f"{milliseconds:.{digits}f}",
        f"{entry['spread_ms']:.{digits}f}",
        f"{entry['bytes_moved_per_parameter']:.1f}",
        f"{entry['gb_per_second']:.1f}",
        f"{entry['share_of_limit']:.0%}",
        "-" if ratio is None else f"{ratio:.2f}x",
        f"{entry['step_kept']:.0%}",
        f"{entry['decay_kept']:.0%}",
    ]


def terminal(entries: Sequence[Mapping[str, Any]], notes: Sequence[str], console: Console) -> None:
    """One table per dtype of the parameters; reads at 80 columns."""
    for dtype in dict.fromkeys(entry["dtype"] for entry in entries):
        table = Table(title=f"{dtype} parameters", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
        table.add_column(COLUMNS[0], no_wrap=True, min_width=27, overflow="ellipsis")
        for column in COLUMNS[1:]:
            table.add_column(column, justify="right", no_wrap=True)
        for entry in by_speed(entries, dtype):
            table.add_row(*row(entry), style="bold" if entry["package"] == "lion_lightning" else None)
        console.print(table)
    for note in (*notes, LEGEND):
        console.print(note, markup=False, highlight=False)


def by_speed(entries: Sequence[Mapping[str, Any]], dtype: str) -> list[Mapping[str, Any]]:
    return sorted((entry for entry in entries if entry["dtype"] == dtype), key=lambda entry: entry["median_ms"])


def markdown(entries: Sequence[Mapping[str, Any]], notes: Sequence[str], title: str, picture: str | None) -> str:
    lines = [f"# {title}", ""]
    lines += [f"- {note}" for note in notes]
    lines += ["", LEGEND]
    if picture:
        lines += ["", f"![time of a step by optimizer]({picture})"]
    for dtype in dict.fromkeys(entry["dtype"] for entry in entries):
        lines += [
            "",
            f"## {dtype} parameters",
            "",
            f"| {' | '.join(COLUMNS)} |",
            "|---|" + "---:|" * (len(COLUMNS) - 1),
        ]
        for entry in by_speed(entries, dtype):
            cells = row(entry)
            cells[0] = f"**{cells[0]}**" if entry["package"] == "lion_lightning" else cells[0]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def chart(entries: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Horizontal bars, one panel per dtype; the limit of each row is a tick. Grey bars lose the step or the decay."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    dtypes = list(dict.fromkeys(entry["dtype"] for entry in entries))
    heights = [max(len(by_speed(entries, dtype)), 1) for dtype in dtypes]
    figure = Figure(figsize=(9, 1.6 + 0.3 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(dtypes), 1, height_ratios=heights, squeeze=False)
    for axis, dtype in zip(axes[:, 0], dtypes, strict=True):
        rows = by_speed(entries, dtype)[::-1]
        times = [entry["median_ms"] for entry in rows]
        limits = [entry["median_ms"] * entry["share_of_limit"] for entry in rows]
        positions = range(len(rows))
        axis.barh(positions, times, color=[color(entry) for entry in rows], xerr=[e["spread_ms"] for e in rows])
        axis.plot(limits, positions, "|", color="black", markersize=11, label="streaming limit")
        axis.set_yticks(positions, [entry["name"] for entry in rows])
        longest = max(4 * times[-1], sorted(times)[len(times) // 2] * 2)  # outliers are cut and say their figure
        axis.set_xlim(0, min(longest, max(times) * 1.1))
        for position, milliseconds in zip(positions, times, strict=True):
            if milliseconds > axis.get_xlim()[1]:
                axis.text(
                    axis.get_xlim()[1] * 0.99, position, f"{milliseconds:,.0f}", ha="right", va="center", color="black"
                )
        axis.set_xlabel(f"ms a step, {dtype} parameters")
    colors = (("tab:orange", "Lion of this project"), ("tab:blue", "peer"), ("lightgrey", "loses step or decay"))
    handles = [Patch(color=shade, label=label) for shade, label in colors]
    figure.suptitle(title)
    figure.legend(handles=[*handles, axes[0, 0].lines[-1]], loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def color(entry: Mapping[str, Any]) -> str:
    if min(entry["step_kept"], entry["decay_kept"]) < 0.5:
        return "lightgrey"
    return "tab:orange" if entry["package"] == "lion_lightning" else "tab:blue"


def write_json(
    path: Path, entries: Sequence[Mapping[str, Any]], about: Mapping[str, Any], results: Sequence[Result]
) -> None:
    skipped = [
        {"name": result.subject.name, "missing": result.missing, "reason": result.error}
        for result in results
        if result.error is not None
    ]
    path.write_text(json.dumps({**about, "results": list(entries), "skipped": skipped}, indent=1) + "\n")
