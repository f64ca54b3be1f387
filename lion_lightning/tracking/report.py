"""A comparison in words and numbers: a verdict, two tables for terminal and Markdown, and CSV files."""

import csv
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from lion_lightning.tracking.compare import AXES, Against, Comparison, Outcome, Spread
from lion_lightning.tracking.runs import Run

NONE = "-"
SURE = 0.05
LABEL_WIDTH = 16  # columns of the terminal that a label has at least; a longer one is folded
COST_COLUMNS = {
    "step_ms": ("ms a step", "{:.1f}"),
    "peak_memory_gib": ("peak GiB", "{:.2f}"),
    "bytes_per_parameter": ("bytes/param", "{:.2f}"),
    "energy_kj": ("kJ", "{:.2f}"),
}
Rows = tuple[list[str], list[list[str]]]


def verdict(comparison: Comparison) -> str:
    """One or two sentences: who won, by how much, how surely, over how many seeds."""
    ranking, goal = comparison.ranking, comparison.goal
    if not ranking:
        return f"No run has finished with a value of {goal.metric}; there is no result yet."
    better = "less" if goal.mode == "min" else "more"
    first = ranking[0]
    seeds = "seed" if len(first.best.values) == 1 else "seeds"
    opening = f"{goal.metric} ({better} is better): {first.label} is best with {_spread(first.best)}"
    opening += f" over {len(first.best.values)} {seeds}"
    if len(ranking) == 1:
        return f"{opening}; there is nothing to compare it with."
    other = ranking[1] if first.label == comparison.baseline else comparison.outcome(comparison.baseline)
    if not math.isfinite(other.best.mean):
        return f"{opening}; the baseline {other.label} has no finished run."
    gap = abs(first.best.mean - other.best.mean)
    role = "the baseline " if other.label == comparison.baseline else "the next, "
    return f"{opening}, {_number(gap)} ahead of {role}{other.label}; {_surely(first.against or other.against)}."


def _surely(against: Against | None) -> str:
    if against is None:
        return "with fewer than two seeds on a side nothing can be said about chance"
    if math.isnan(against.p):
        return "its seeds do not vary, so there is nothing to test"
    low, high = sorted((abs(against.low), abs(against.high)))
    if against.p < SURE:
        return f"Welch's {_p(against.p)}, 95 % interval {_number(low)} to {_number(high)}"
    return f"that may be chance (Welch's {_p(against.p)})"


def result_rows(comparison: Comparison) -> Rows:
    """Optimizer, seeds, best and final metric, difference to the baseline, p."""
    header = ["optimizer", "seeds", "best", "final", f"vs {comparison.baseline.split(' (')[0]}", "p"]
    return header, [_result_row(comparison, outcome) for outcome in _ordered(comparison)]


def cost_rows(comparison: Comparison) -> Rows:
    """Optimizer, what it took to the baseline's best, and what a step costs; columns nobody logged are left out."""
    axes = [axis for axis in comparison.axes if axis != "samples" or "tokens" not in comparison.axes]
    costs = [name for name in COST_COLUMNS if any(name in outcome.costs for outcome in comparison.outcomes)]
    header = ["optimizer", "got there", *axes, *(COST_COLUMNS[name][0] for name in costs)]
    rows = []
    for outcome in _ordered(comparison):
        reached = f"{len(outcome.to_target['steps'])}/{len(outcome.best.values)}"
        places = [_mean_count(outcome.to_target[axis]) for axis in axes]
        figures = [
            COST_COLUMNS[name][1].format(outcome.costs[name]) if name in outcome.costs else NONE for name in costs
        ]
        rows.append([outcome.label, reached, *places, *figures])
    return header, rows


def captions(comparison: Comparison) -> tuple[str, str]:
    """What the two tables show, in one line each."""
    goal = comparison.goal
    result = (
        f"{goal.metric}, {'least' if goal.mode == 'min' else 'most'} and last, mean ± standard deviation over seeds; "
        f"p: Welch's two-sided test of the best against {comparison.baseline}, not corrected for several comparisons"
    )
    target = f"{_number(comparison.target)}" if math.isfinite(comparison.target) else "not there yet"
    cost = f"What it took to get to {comparison.baseline}'s best ({target}), mean of the runs that got there"
    return result, cost


def unfinished_lines(comparison: Comparison) -> list[str]:
    """A line for each run that does not count: its state, and how far it got."""
    return [_fate(run, comparison.goal.metric) for outcome in comparison.outcomes for run in outcome.variant.others]


def show(comparison: Comparison, console: Console) -> None:
    """Print verdict, tables and remarks at whatever width the console has."""
    console.print(verdict(comparison), highlight=False)
    for caption, (header, rows) in zip(
        captions(comparison), (result_rows(comparison), cost_rows(comparison)), strict=True
    ):
        console.print(f"\n{caption}.", highlight=False, style="italic")
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False)
        longest = max(len(row[0]) for row in rows)
        for number, name in enumerate(header):
            table.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=bool(number))
        table.columns[0].min_width = min(longest, LABEL_WIDTH)
        for row in rows:
            table.add_row(*row, style="bold" if row[0] == _winner(comparison) else None)
        console.print(table, highlight=False)
    for line in (*unfinished_lines(comparison), *comparison.remarks):
        console.print(f"! {line}", highlight=False, style="yellow")


def markdown(
    comparison: Comparison, command: str, date: str, pictures: Sequence[str], unreadable: Sequence[str] = ()
) -> str:
    """The comparison as a page: verdict, tables, pictures, and how it was made."""
    parts = [f"# {comparison.group or comparison.goal.metric}", verdict(comparison)]
    for caption, rows in zip(captions(comparison), (result_rows(comparison), cost_rows(comparison)), strict=True):
        parts += [markdown_table(*rows, bold=_winner(comparison)), f"{caption}."]
    parts += [f"![{Path(name).stem}]({name})" for name in pictures]
    notes = [*unfinished_lines(comparison), *comparison.remarks, *unreadable]
    if notes:
        parts.append("\n".join(["Beside the count:", "", *(f"- {note}" for note in notes)]))
    hardware = sorted({run.hardware for run in comparison.runs if run.hardware}) or ["unknown"]
    parts.append(
        f"{len(comparison.runs)} runs, {date}, on {' and on '.join(hardware)}. Seconds hold validation. Made by:"
    )
    parts.append(f"```\n{command}\n```")
    return "\n\n".join(parts) + "\n"


def write_runs_csv(comparison: Comparison, file: Path) -> None:
    """A line per run: who it is, how it ended, its numbers."""
    goal = comparison.goal
    header = ["optimizer", "seed", "state", "counted", "run", "id", "group", "lr", "weight_decay", "best", "final"]
    header += [*AXES, *COST_COLUMNS, "guard_events", "created", "hardware", "source"]
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        for outcome in comparison.outcomes:
            for run in outcome.variant.runs:
                ends = [run.place([run.last_step], axis)[0] if run.has_axis(axis) else None for axis in AXES]
                costs = [run.last(f"perf/{name}") for name in COST_COLUMNS]
                writer.writerow([
                    outcome.label, run.seed, run.state, run in outcome.variant.counted, run.name, run.id, run.group,
                    run.setting("optim.lr"), run.setting("optim.weight_decay"), goal.best(run.curve(goal.metric)[1]),
                    run.last(goal.metric), *ends, *costs, len(run.guard_steps()), run.created, run.hardware,
                    relative(run.source),
                ])  # fmt: skip


def write_curves_csv(comparison: Comparison, metrics: Sequence[str], file: Path) -> None:
    """A line per logged value of `metrics`, with its place on every axis."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["optimizer", "seed", "id", "metric", *AXES, "value"])
        for outcome in comparison.outcomes:
            for run in outcome.variant.runs:
                for metric in metrics:
                    steps, values = run.curve(metric)
                    places = [run.place(steps, axis) for axis in AXES]
                    for place, value in zip(zip(*places, strict=True), values, strict=True):
                        writer.writerow([outcome.label, run.seed, run.id, metric, *map(_plain, place), value])


def relative(source: str) -> str:
    """A folder as seen from here; an address, or what lies elsewhere, by itself."""
    if "://" in source:
        return source
    near = os.path.relpath(source)
    return Path(source).name if near.startswith("..") else near


def _result_row(comparison: Comparison, outcome: Outcome) -> list[str]:
    others: dict[str, int] = {}
    for run in outcome.variant.others:
        others[run.state] = others.get(run.state, 0) + 1
    seeds = " + ".join([str(len(outcome.best.values)), *(f"{count} {state}" for state, count in others.items())])
    gap = outcome.best.mean - comparison.outcome(comparison.baseline).best.mean
    difference = NONE if outcome.label == comparison.baseline or math.isnan(gap) else f"{gap:+.{_decimals(gap)}f}"
    p = _p(outcome.against.p).removeprefix("p = ").removeprefix("p ") if outcome.against else NONE
    return [outcome.label, seeds, _spread(outcome.best), _spread(outcome.final), difference, p]


def _ordered(comparison: Comparison) -> list[Outcome]:
    """Best first, then those without a result."""
    ranked = comparison.ranking
    return ranked + [outcome for outcome in comparison.outcomes if all(outcome is not done for done in ranked)]


def _winner(comparison: Comparison) -> str:
    return comparison.ranking[0].label if len(comparison.ranking) > 1 else ""


def _fate(run: Run, metric: str) -> str:
    last = run.last(metric)
    value = f"{metric} {_number(last)}" if last is not None else f"no {metric}"
    code = f" with code {run.exit_code}" if run.exit_code else ""
    budget = run.setting("trainer.max_steps")
    of = f" of {budget}" if budget else ""
    return f"{run.name} is {run.state}{code} at step {run.last_step}{of}, {value}: not counted ({relative(run.source)})"


def markdown_table(header: list[str], rows: list[list[str]], bold: str = "") -> str:
    """A Markdown table; the row that starts with `bold` stands out."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    lines += [[f"**{cell}**" for cell in row] if row[0] == bold else row for row in rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _spread(spread: Spread) -> str:
    if not spread.values:
        return NONE
    if math.isnan(spread.std):
        return _number(spread.mean)
    decimals = _decimals(spread.mean)
    return f"{spread.mean:.{decimals}f} ± {spread.std:.{decimals}f}"


def _number(value: float) -> str:
    return f"{value:.{_decimals(value)}f}"


def _decimals(value: float) -> int:
    """Four decimals for losses and shares, fewer for what is larger."""
    return 4 if abs(value) < 10 else 2 if abs(value) < 1000 else 0


def _mean_count(values: Sequence[float]) -> str:
    if not values:
        return NONE
    mean = sum(values) / len(values)
    units: list[tuple[float, Callable[[float], str]]] = [
        (1e9, lambda x: f"{x / 1e9:.2f} G"),
        (1e6, lambda x: f"{x / 1e6:.2f} M"),
        (1e4, lambda x: f"{x / 1e3:.1f} k"),
        (100, lambda x: f"{x:.0f}"),
    ]
    return next((write(mean) for least, write in units if mean >= least), f"{mean:.1f}")


def _p(p: float) -> str:
    if math.isnan(p):
        return NONE
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _plain(value: float) -> float | str:
    return "" if math.isnan(value) else round(float(value), 3)
