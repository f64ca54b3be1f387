"""Healthy trainings of tests/healthy, each without and with the guard: the table of docs/guard.md.

    python scripts/healthy_report.py --seeds 1 2 3 --runs healthy.csv --output docs/guard/healthy.md

Each run is appended to the CSV file as soon as it ends; runs that are in it already are not repeated. Runs without the
guard serve every mode. A row is harmed if the guard ended a run, or if the mean of the final metric with the guard is
worse than without it: at the defaults by more than the range over the seeds without it, with `--guard recover` by more
than 1 %. With one seed the range is unknown and 5 % stand for it. It is harmed as well if the state after the last step
was not fit to be saved: the result would be lost. "unsaved" is the share of steps after which that was so.
"""

import argparse
import csv
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the trainings live beside the tests
from lion_lightning import LionGuard
from tests.healthy.kind import OPTIMIZERS, Outcome, train
from tests.healthy.verdict import Row
from tests.healthy.zoo import KINDS

MODES: dict[str, Callable[[float | None], LionGuard | None]] = {
    "none": lambda warmup_steps: None,
    "defaults": lambda warmup_steps: LionGuard(warmup_steps=warmup_steps),
    "recover": lambda warmup_steps: LionGuard(warmup_steps=warmup_steps, on_divergence="recover"),
}
COLUMNS = ["kind", "optimizer", "metric", "without", "with", "range", "ended", "skipped", "clipped", "rewinds"]
COLUMNS += ["unsaved", "events", "verdict"]


@dataclass(frozen=True)
class Run:
    """One line of the CSV file: what was run, and what came of it."""

    kind: str
    optimizer: str
    seed: int
    mode: str
    outcome: Outcome

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.kind, self.optimizer, self.seed, self.mode


RUN_COLUMNS = ["kind", "optimizer", "seed", "mode", *(entry.name for entry in fields(Outcome))]


def read_runs(path: Path) -> dict[tuple[str, str, int, str], Run]:
    """The runs of a CSV file that `append_run` has written; none if there is no file."""
    if not path.exists():
        return {}
    runs = {}
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            values = {entry.name: json.loads(line[entry.name]) for entry in fields(Outcome)}
            run = Run(line["kind"], line["optimizer"], int(line["seed"]), line["mode"], Outcome(**values))
            runs[run.key] = run
    return runs


def append_run(path: Path, run: Run) -> None:
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if not file.tell():
            writer.writerow(RUN_COLUMNS)
        writer.writerow([*run.key, *(json.dumps(value) for value in asdict(run.outcome).values())])


def cells(row: Row) -> list[str]:
    """One line of the table."""
    events: Counter[str] = Counter()
    for outcome in row.guarded:
        events.update(outcome.events)
    steps, skipped, clipped, rewinds, unsaved = (
        sum(getattr(outcome, name) for outcome in row.guarded)
        for name in ("steps", "skipped", "clipped", "rewinds", "unsaved")
    )
    return [
        row.kind.name,
        row.optimizer,
        row.kind.metric_name + (" (higher is better)" if row.kind.higher_is_better else ""),
        _number(row.mean_without),
        _number(row.mean_guarded),
        _number(row.spread) if len(row.without) > 1 else "-",
        f"{row.ended} of {len(row.guarded)}" if row.ended else "-",
        str(skipped),
        f"{clipped} ({clipped / max(1, steps):.2%})" if clipped else "0",
        str(rewinds),
        f"{unsaved / max(1, steps):.1%}" if unsaved else "0",
        ", ".join(f"{kind} {count}" for kind, count in events.items()) or "-",
        row.verdict,
    ]


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "lost"


def rows_of(runs: dict[tuple[str, str, int, str], Run], mode: str, guard: str, seeds: Sequence[int]) -> list[Row]:
    """One row for each kind and optimizer of which a seed was run both without the guard and in `mode`."""
    rows = []
    for kind in KINDS.values():
        for optimizer in OPTIMIZERS:
            pairs = [
                (runs[kind.name, optimizer, seed, "none"].outcome, runs[kind.name, optimizer, seed, mode].outcome)
                for seed in seeds
                if (kind.name, optimizer, seed, "none") in runs and (kind.name, optimizer, seed, mode) in runs
            ]
            if pairs:
                without, guarded = (list(column) for column in zip(*pairs, strict=True))
                rows.append(Row(kind, optimizer, without, guarded, recovers=guard == "recover"))
    return rows


def markdown(rows: Sequence[Row], command: str) -> str:
    """The table, with the command that made it and the number of harmed rows."""
    harmed = sum(row.is_harmed for row in rows)
    lines = [f"`{command}`: {harmed} of {len(rows)} harmed.", "", "| " + " | ".join(COLUMNS) + " |"]
    lines += ["|" + "|".join(["---"] * 3 + ["---:"] * 8 + ["---"] * 2) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "/") for cell in cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help="names of kinds (default: all)")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--guard", choices=list(MODES), default="defaults", help="none: only the runs without")
    length: dict[str, Any] = {"type": lambda text: None if text == "auto" else float(text), "default": 0.0}
    parser.add_argument("--warmup-steps", **length, help="of the guard, or auto: as long as it chooses (default: 0)")
    parser.add_argument("--runs", type=Path, required=True, help="CSV file to which runs are added")
    parser.add_argument("--output", type=Path, help="Markdown file of the table")
    parser.add_argument("--only-table", action="store_true", help="run nothing; the table of what there is")
    arguments = parser.parse_args()
    if unknown := set(arguments.kinds) - set(KINDS):
        parser.error(f"unknown kinds {sorted(unknown)}; there are {list(KINDS)}")
    torch.set_num_threads(1)
    mode = arguments.guard
    if mode != "none":
        mode += f", warmup_steps={'auto' if arguments.warmup_steps is None else format(arguments.warmup_steps, 'g')}"
    runs = read_runs(arguments.runs)
    jobs = [(name, o, seed) for seed in arguments.seeds for name in arguments.kinds for o in arguments.optimizers]
    for name, optimizer, seed in [] if arguments.only_table else jobs:
        for key_mode in dict.fromkeys(("none", mode)):
            if (name, optimizer, seed, key_mode) in runs:
                continue
            make_guard = MODES["none" if key_mode == "none" else arguments.guard]
            outcome = train(KINDS[name], optimizer, seed, make_guard(arguments.warmup_steps))
            run = Run(name, optimizer, seed, key_mode, outcome)
            runs[run.key] = run
            append_run(arguments.runs, run)
            print(f"{name}, {optimizer}, seed {seed}, {key_mode}: {outcome.metric:.4g}, {outcome.seconds:.1f} s")
    if mode == "none":
        return
    rows = [row for row in rows_of(runs, mode, arguments.guard, arguments.seeds) if row.kind.name in arguments.kinds]
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*cells(row))
    Console(width=220).print(table)
    print(f"{sum(row.is_harmed for row in rows)} of {len(rows)} harmed")
    if arguments.output is not None:
        command = ["scripts/healthy_report.py", "--guard", arguments.guard, "--seeds", *map(str, arguments.seeds)]
        if arguments.warmup_steps != 0:
            command += ["--warmup-steps", mode.rpartition("=")[2]]
        arguments.output.write_text(markdown(rows, " ".join(command)))


if __name__ == "__main__":
    main()
