"""A comparison in words, tables, CSV files, and as a W&B report."""

import csv
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lion_lightning.tracking.compare import COSTS, Comparison, Incomparable, Spread, Welch
from lion_lightning.tracking.runs import AXES, STEP, Run

NONE = "-"
SIGNIFICANCE = 0.05
COST_FORMATS = dict(zip(COSTS, [("ms a step", ".1f"), ("peak GiB", ".2f"), ("bytes/param", ".2f")], strict=True))
Rows = tuple[list[str], list[list[str]]]


def verdict(comparison: Comparison) -> str:
    """One or two sentences: which variant is best, by how much, with what significance, over how many seeds."""
    ranking, goal = comparison.ranking, comparison.goal
    if not ranking:
        return f"No run has finished with a value of {goal.metric}; there is no result yet."
    first, best = ranking[0], comparison.best(ranking[0])
    better = "less" if goal.mode == "min" else "more"
    seeds = f"{len(best.values)} seed{'s' if len(best.values) > 1 else ''}"
    opening = f"{goal.metric} ({better} is better): {first.label} is best with {_spread(best)} over {seeds}"
    if len(ranking) == 1:
        return f"{opening}; there is nothing to compare it with."
    wins_as_baseline = first is comparison.baseline
    other = ranking[1] if wins_as_baseline else comparison.baseline
    if not math.isfinite(comparison.best(other).mean):
        return f"{opening}; the baseline {other.label} has no finished run."
    gap = _number(abs(best.mean - comparison.best(other).mean))
    role = "the next, " if wins_as_baseline else "the baseline "
    test = comparison.against_baseline(other if wins_as_baseline else first)
    return f"{opening}, {gap} ahead of {role}{other.label}; {_significance(test, comparison.test_count > 1)}."


def tables(comparison: Comparison) -> tuple[tuple[str, Rows], tuple[str, Rows]]:
    """The table of results and the table of costs, each with its caption."""
    goal, baseline = comparison.goal, comparison.baseline.label
    target = _number(comparison.target) if math.isfinite(comparison.target) else "not there yet"
    paired = any(math.isfinite(comparison.paired_error(variant)) for variant in comparison.variants)
    result = (
        f"{goal.metric}, best and last: mean ± standard deviation over seeds. vs {baseline}: difference of the best"
        f"{' ± half its 95 % interval, paired by seed' if paired else ''}. p: Welch's two-sided test"
        f"{', corrected for several comparisons (Holm)' if comparison.test_count > 1 else ''}."
    )
    cost = f"What it took to reach {baseline}'s best ({target}), mean of the runs that reached it."
    return (result, _result_rows(comparison)), (cost, _cost_rows(comparison))


def notes(comparison: Comparison) -> list[str]:
    """A line for each run that is not counted or has no finite result, and the remarks of the comparison."""
    metric, lines = comparison.goal.metric, []
    for variant in comparison.variants:
        lines += [_progress(run, metric) for run in variant.others]
        lost = [run for run in variant.counted if not np.isfinite(run.curve(metric)[1]).any()]
        lines += [f"{run.name} has finished without a finite {metric}: not in any mean" for run in lost]
    return [*lines, *comparison.remarks]


def winner(comparison: Comparison) -> str:
    """The label of the best of several variants; empty where there is only one."""
    return comparison.ranking[0].label if len(comparison.ranking) > 1 else ""


def origin(comparison: Comparison, date: str) -> str:
    """Number of runs, date and hardware, for the end of a report."""
    hardware = sorted({run.hardware for run in comparison.runs if run.hardware}) or ["unknown hardware"]
    return f"{len(comparison.runs)} runs, {date}, on {' and on '.join(hardware)}"


def show(comparison: Comparison, console: Console) -> None:
    """Print verdict, tables and notes in the width of the console."""
    console.print(verdict(comparison), highlight=False, markup=False)
    for caption, (header, rows) in tables(comparison):
        console.print(f"\n{caption}", highlight=False, markup=False, style="italic")
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False)
        for number, name in enumerate(header):
            table.add_column(Text(name), justify="right" if number else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row), style="bold" if row[0] == winner(comparison) else None)
        console.print(table, highlight=False)
    for line in notes(comparison):
        console.print(f"! {line}", highlight=False, markup=False, style="yellow")


def markdown(comparison: Comparison, command: str, date: str, pictures: Sequence[str]) -> str:
    """The comparison as a Markdown document.

    Args:
        comparison: What is reported.
        command: The command line that made the report.
        date: ISO 8601.
        pictures: File names, relative to the document.
    """
    parts = [f"# {comparison.group or comparison.goal.metric}", verdict(comparison)]
    for caption, rows in tables(comparison):
        parts += [markdown_table(*rows, bold=winner(comparison)), caption]
    parts += [f"![{Path(name).stem}]({name})" for name in pictures]
    if lines := notes(comparison):
        parts.append("\n".join(["Remarks:", "", *(f"- {line}" for line in lines)]))
    parts += [f"{origin(comparison, date)}. Seconds include validation. Made by:", f"```\n{command}\n```"]
    return "\n\n".join(parts) + "\n"


def markdown_table(header: list[str], rows: list[list[str]], bold: str = "") -> str:
    """A Markdown table; a row whose first cell is `bold` is set in bold."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    lines += [[f"**{cell}**" for cell in row] if row[0] == bold else row for row in rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def write_runs_csv(comparison: Comparison, file: Path) -> None:
    """Write a line per run: identity, state, final place on every axis, costs."""
    goal = comparison.goal
    header = ["optimizer", "seed", "state", "counted", "run", "id", "group", "lr", "weight_decay", "best", "final"]
    header += [*AXES, *COSTS, "guard_events", "created", "hardware", "source"]
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        for variant, run in ((one, run) for one in comparison.variants for run in one.runs):
            writer.writerow([
                variant.label, run.setting("seed"), run.state, run in variant.counted, run.name, run.id, run.group,
                run.setting("optim.lr"), run.setting("optim.weight_decay"), goal.best(run.curve(goal.metric)[1]),
                run.last(goal.metric),
                *(run.place([run.last_step], axis)[0] if run.has_axis(axis) else None for axis in AXES),
                *(run.last(f"perf/{name}") for name in COSTS),
                len(run.guard_steps()), run.created, run.hardware, relative(run.source),
            ])  # fmt: skip


def relative(source: str) -> str:
    """A path relative to the working directory, or its name alone where it lies outside; a web address unchanged."""
    if "://" in source:
        return source
    near = os.path.relpath(source)
    return Path(source).name if near.startswith("..") else near


def _result_rows(comparison: Comparison) -> Rows:
    """Header and rows: optimizer, seeds, best and final metric, difference to the baseline, p."""
    header = ["optimizer", "seeds", "best", "final", f"vs {comparison.baseline.label.split(' (')[0]}", "p"]
    rows = []
    for variant in comparison.ordered:
        best, test = comparison.best(variant), comparison.against_baseline(variant)
        states = [run.state for run in variant.others]
        seeds = [str(len(best.values)), *(f"{states.count(state)} {state}" for state in dict.fromkeys(states))]
        gap = best.mean - comparison.target
        difference = NONE if variant is comparison.baseline or math.isnan(gap) else f"{gap:+.{_decimals(gap)}f}"
        error = comparison.paired_error(variant)
        difference += "" if math.isnan(error) else f" ± {error:.{_decimals(gap)}f}"
        p = _p(test.p).removeprefix("p = ").removeprefix("p ") if test else NONE
        rows.append([
            variant.label, " + ".join(seeds), _spread(best), _spread(comparison.final(variant)), difference, p
        ])  # fmt: skip
    return header, rows


def _cost_rows(comparison: Comparison) -> Rows:
    """Header and rows: optimizer, what it took to reach the target, and those of `COSTS` that were logged."""
    axes = [axis for axis in comparison.axes if axis != "samples" or "tokens" not in comparison.axes]
    costs = {variant.label: comparison.costs(variant) for variant in comparison.variants}
    logged = [name for name in COSTS if any(name in one for one in costs.values())]
    header = ["optimizer", "reached", *axes, *(COST_FORMATS[name][0] for name in logged)]
    rows = []
    for variant in comparison.ordered:
        own = costs[variant.label]
        reached = len(comparison.to_target(variant, "steps"))
        places = [_mean_count(comparison.to_target(variant, axis)) for axis in axes]
        figures = [format(own[name], COST_FORMATS[name][1]) if name in own else NONE for name in logged]
        rows.append([variant.label, f"{reached}/{len(variant.counted)}", *places, *figures])
    return header, rows


def _significance(test: Welch | None, is_corrected: bool) -> str:
    if test is None:
        return "with fewer than two seeds on a side chance cannot be excluded"
    if math.isnan(test.p):
        return "its seeds do not vary, so there is nothing to test"
    low, high = sorted((abs(test.low), abs(test.high)))
    told = f"Welch's {_p(test.p)}{' after Holm' if is_corrected else ''}"
    if test.p < SIGNIFICANCE:
        return f"{told}, 95 % interval {_number(low)} to {_number(high)}"
    return f"that may be chance ({told})"


def _progress(run: Run, metric: str) -> str:
    last, budget = run.last(metric), run.setting("trainer.max_steps")
    code = f" with code {run.exit_code}" if run.exit_code else ""
    step = f"{run.last_step} of {budget}" if budget else f"{run.last_step}"
    value = f"no {metric}" if last is None else f"{metric} {_number(last)}"
    return f"{run.name} is {run.state}{code} at step {step}, {value}: not counted ({relative(run.source)})"


def _spread(spread: Spread) -> str:
    if not spread.values:
        return NONE
    deviation = "" if math.isnan(spread.std) else f" ± {spread.std:.{_decimals(spread.mean)}f}"
    return _number(spread.mean) + deviation


def _number(value: float) -> str:
    return f"{value:.{_decimals(value)}f}"


def _decimals(value: float) -> int:
    """Four decimals for losses and shares, fewer for larger numbers."""
    return 4 if abs(value) < 10 else 2 if abs(value) < 1000 else 0


def _mean_count(values: Sequence[float]) -> str:
    if not values:
        return NONE
    mean = sum(values) / len(values)
    if mean >= 1e9:
        return f"{mean / 1e9:.2f} G"
    if mean >= 1e6:
        return f"{mean / 1e6:.2f} M"
    return f"{mean / 1e3:.1f} k" if mean >= 1e4 else f"{mean:.{0 if mean >= 100 else 1}f}"


def _p(p: float) -> str:
    if math.isnan(p):
        return NONE
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def publish_report(comparison: Comparison, project: str | None) -> str:
    """Publish verdict, tables and curves of one group as a W&B report, with its runs grouped by optimizer.

    Needs wandb-workspaces: `pip install 'lion-lightning[wandb-report]'`.

    Args:
        comparison: What is reported.
        project: `entity/project`.

    Returns:
        A line with the address of the report.

    Raises:
        Incomparable: `project` is not of that form.
    """
    entity, _, name = (project or "").partition("/")
    if not (entity and name):
        raise Incomparable(f"a W&B report needs --wandb ENTITY/PROJECT to be published to, got {project!r}")
    import wandb_workspaces.reports.v2 as wr

    x_axes = [STEP, *(metric for axis in comparison.axes if (metric := AXES[axis]))]
    groups = [group for group in comparison.group.split(", ") if group]
    runset = wr.Runset(
        entity=entity,
        project=name,
        name=comparison.group or name,
        filters=f"Metric('Group') in {groups!r}" if groups else "",
        groupby=["config.optim.value.name"],  # where W&B keeps `optim.name`; workspaces translate, reports do not
    )
    result, cost = (
        wr.MarkdownBlock(text=f"{markdown_table(*rows)}\n\n{caption}") for caption, rows in tables(comparison)
    )
    look: dict[str, Any] = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev", "smoothing_factor": 0}
    drawn = [*((comparison.goal.metric, x) for x in x_axes), ("train/loss", STEP)]
    lines: list[Any] = [*notes(comparison)]
    report = wr.Report(
        entity=entity,
        project=name,
        title=comparison.group or comparison.goal.metric,
        description=verdict(comparison),
        blocks=[
            wr.MarkdownBlock(text=verdict(comparison)),
            result,
            wr.PanelGrid(runsets=[runset], panels=[wr.LinePlot(title=y, x=x, y=[y], **look) for y, x in drawn]),
            cost,
            *([wr.UnorderedList(items=lines)] if lines else []),
        ],
    )
    report.save()
    return f"W&B report: {report.url}"
