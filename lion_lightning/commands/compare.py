"""Compare optimizers, with significance and cost: `lion-compare outputs/multirun/...`.

Reads offline W&B runs from folders, runs on the server (`--wandb entity/project --group NAME`), or both. Prints two
tables and writes compare.md, runs.csv, PNGs and compare.html. Runs that differ in more than
optimizer and seed are refused with the reason.
"""

import argparse
import datetime
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lion_lightning.command_line import command_name
from lion_lightning.tracking import plots, report
from lion_lightning.tracking.compare import Comparison, Incomparable, compare
from lion_lightning.tracking.page import write_page
from lion_lightning.tracking.runs import Run, UnreadableRun, fetch_runs, find_runs, read_file

EXIT_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 with a message of one line, for a group too."""
    options = _parser().parse_intermixed_args(arguments)
    console, code = Console(), 0
    try:
        runs, unreadable = gather(options)
        for one in split(runs, options):
            folder = options.output / one[0].group if options.each_group else options.output
            try:
                _compare(one, options, folder, unreadable, console)
            except Incomparable as reason:
                if not options.each_group:
                    raise
                code = _refuse(f"{one[0].group or 'no group'}: {reason}")  # the other groups are compared
    except ModuleNotFoundError as error:
        extra = "wandb-report" if error.name and error.name.startswith("wandb_workspaces") else "report"
        return _refuse(f"{error.name} is not installed; pip install 'lion-lightning[{extra}]'")
    except (Incomparable, UnreadableRun, OSError) as error:
        return _refuse(str(error))
    return code


def gather(options: argparse.Namespace) -> tuple[list[Run], list[str]]:
    """The runs that the options name, and a line for each that cannot be read."""
    if not options.folders and not options.wandb:
        raise Incomparable("nothing to compare: name folders with runs, or --wandb entity/project")
    files = [file for folder in options.folders for file in find_runs(folder)]
    if options.folders and not files and not options.wandb:
        raise Incomparable(f"no W&B run in {', '.join(map(str, options.folders))}")
    read = [read_file(file) for file in dict.fromkeys(files)]
    runs = [run for run in read if isinstance(run, Run)]
    errors = [str(error).partition(": ") for error in read if isinstance(error, UnreadableRun)]
    unreadable = [f"not read: {report.relative(file)}: {reason}" for file, _, reason in errors]
    # Of copies the most complete one counts; two folders of one id are the parts of a run that was resumed online.
    copies: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        copies.setdefault((run.id or run.source, run.created), []).append(run)
    runs = [max(same, key=lambda run: (run.exit_code is not None, len(run.history))) for same in copies.values()]
    if options.wandb:
        known = {run.id for run in runs}
        runs += [run for run in fetch_runs(options.wandb, options.group) if run.id not in known]
    if not runs:
        of_group = f" of group {options.group}" if options.group else ""
        raise Incomparable("; ".join(unreadable) or f"no run{of_group} in {options.wandb}")
    return runs, unreadable


def split(runs: list[Run], options: argparse.Namespace) -> list[list[Run]]:
    """The lists of runs to compare: those of --group, one list per group, or all in one."""
    groups = list(dict.fromkeys(run.group for run in runs))
    if options.group:
        wanted = [run for run in runs if run.group == options.group]
        if not wanted:
            raise Incomparable(f"no run of group {options.group}; there are: {', '.join(sorted(groups))}")
        return [wanted]
    return [[run for run in runs if run.group == group] for group in groups] if options.each_group else [runs]


def write(comparison: Comparison, folder: Path, command: str, date: str) -> list[Path]:
    """Write every file of the report and return their paths.

    Args:
        comparison: What is reported.
        folder: Where the files go; created if missing.
        command: The command line, for the end of the report.
        date: ISO 8601.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = plots.write_pictures(comparison, folder)
    page, text, runs = (folder / name for name in ("compare.html", "compare.md", "runs.csv"))
    write_page(comparison, page, command, date)
    names = [picture.name for picture in pictures]
    text.write_text(report.markdown(comparison, command, date, names), encoding="utf-8")
    report.write_runs_csv(comparison, runs)
    return [text, page, runs, *pictures]


def _compare(
    runs: list[Run], options: argparse.Namespace, folder: Path, unreadable: list[str], console: Console
) -> None:
    comparison = compare(
        runs,
        metric=options.metric,
        mode=options.mode,
        baseline=options.baseline,
        by=options.by,
        aside=options.aside,
        unlike=options.unlike,
    )
    comparison.remarks.extend(unreadable)
    report.show(comparison, console)
    command = shlex.join([*command_name().split(), *sys.argv[1:]])  # scripts/experiments.py calls this, too
    files = write(comparison, folder, command, datetime.date.today().isoformat())
    names = ", ".join(file.name for file in files)
    console.print(f"{report.relative(str(folder))}: {names}", highlight=False, soft_wrap=True)
    if options.report:
        console.print(report.publish_report(comparison, options.wandb), highlight=False, soft_wrap=True)


def _refuse(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return EXIT_USAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, help="folders with runs, searched recursively")
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT", help="runs on the server; needs WANDB_API_KEY")
    parser.add_argument("--group", help="only runs of this W&B group")
    parser.add_argument("--each-group", action="store_true", help="compare each group separately")
    parser.add_argument("--metric", help="the metric that decides (default: what the recipe monitors)")
    parser.add_argument("--mode", choices=("min", "max"), help="whether less or more of the metric is better")
    parser.add_argument(
        "--baseline", help="the variant that the others are tested against (default: adamw, if present)"
    )
    keys: dict[str, Any] = {"type": lambda text: text.split(","), "default": [], "metavar": "KEY,KEY"}
    parser.add_argument("--by", **keys, help="further settings that are compared, such as data.batch_size")
    parser.add_argument("--aside", **keys, help="settings that follow from those, such as a rate scaled with the batch")
    parser.add_argument("--unlike", action="store_true", help="compare runs in spite of other differences")
    parser.add_argument("--output", type=Path, default=Path("outputs/comparison"), help="folder (default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="publish a W&B report (needs --wandb)")
    return parser
