"""Every fault of tests/faults, without and with the guard, over several seeds: table and picture of docs/guard.md.

    python scripts/fault_report.py --seeds 5 --output docs/guard

Each ratio is the final test loss over that of the clean run of the same seed: without the guard over the clean run
without it, with the guard over the clean run with it. Delay is the number of steps from the fault to the event
that names it.
"""

import argparse
import csv
import functools
import math
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the faults live beside the tests
from lion_lightning import LionGuard
from tests.faults.cases import CASES, FOR_EVER, HIT, Case
from tests.faults.task import Outcome, train

COLUMNS = ["fault", "without: mean", "without: worst", "with: mean", "with: worst", "delay: worst", "seen as", "seeds"]


@dataclass(frozen=True)
class Row:
    """Ratios of final losses of one fault, one for each seed; None where the guard did not name it."""

    case: Case
    without: list[float]
    with_guard: list[float]
    delays: list[int | None]
    stopped: list[bool]

    def cells(self) -> list[str]:
        delays = [delay for delay in self.delays if delay is not None]
        late = str(max(delays)) if len(delays) == len(self.delays) else f"{len(delays)} of {len(self.delays)} named"
        ratios = [*_mean_and_worst(self.without), *_mean_and_worst(self.with_guard)]
        return [self.case.name, *ratios, late, self.case.seen_as, str(len(self.without))]


@functools.cache
def clean_loss(optimizer: object, guarded: bool, seed: int) -> float:
    return train(seed, LionGuard() if guarded else None, optimizer=optimizer).loss


def measure(arguments: tuple[int, int]) -> tuple[int, float, float, int | None, bool]:
    """One fault with one seed: number of the case, ratio without and with the guard, delay, whether it was stopped."""
    number, seed = arguments
    torch.set_num_threads(1)
    case = [*CASES, FOR_EVER][number]
    bare = train(seed, None, case.inject(), optimizer=case.optimizer)
    guarded = train(seed, LionGuard(**case.guard), case.inject(), optimizer=case.optimizer)
    named = guarded.first(case.seen_as, after=HIT)
    without = bare.loss / clean_loss(case.optimizer, False, seed)
    with_guard = guarded.loss / clean_loss(case.optimizer, True, seed)
    return number, without, with_guard, None if named is None else named[1] - HIT, guarded.stopped is not None


def report(seeds: list[int], workers: int) -> list[Row]:
    cases = [*CASES, FOR_EVER]
    jobs = [(number, seed) for seed in seeds for number in range(len(cases))]
    with ProcessPoolExecutor(workers) as pool:
        results = list(pool.map(measure, jobs))
    rows = []
    for number, case in enumerate(cases):
        mine = [result[1:] for result in results if result[0] == number]
        without, with_guard, delays, stopped = (list(column) for column in zip(*mine, strict=True))
        rows.append(Row(case, without, with_guard, delays, stopped))
    return rows


def draw(path: Path, seed: int) -> None:
    """Training loss of a run that one outlier hits: without the guard, with it, with its gate off."""
    case = next(case for case in CASES if case.name == "gradient x1e5")
    runs: dict[str, tuple[Outcome, str, float]] = {
        "no fault, guard": (train(seed, LionGuard()), "#cfd4d8", 5.0),
        "no guard": (train(seed, None, case.inject()), "#c0392b", 1.6),
        "guard, gate off: momentum zeroed": (train(seed, LionGuard(gate=False), case.inject()), "#e08e0b", 1.6),
        "guard: step clipped": (train(seed, LionGuard(), case.inject()), "#2471a3", 1.2),
    }
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for label, (outcome, color, width) in runs.items():
        axes.plot(_smooth(outcome.losses), label=label, color=color, lw=width)
    axes.axvline(HIT, color="black", lw=0.8, ls=":")
    axes.annotate(
        "one gradient x -100,000", (HIT, axes.get_ylim()[1] * 0.92), xytext=(6, 0), textcoords="offset points"
    )
    axes.set(xlabel="optimizer step", ylabel="training loss (mean of 15 steps)", yscale="log")
    axes.set_title("One outlier in the momentum of Lion", loc="left")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.16, 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _smooth(losses: list[float], width: int = 15) -> list[float]:
    finite = [loss if math.isfinite(loss) else math.nan for loss in losses]
    return [statistics.fmean(finite[max(0, i - width) : i + 1]) for i in range(len(finite))]


def _mean_and_worst(ratios: list[float]) -> list[str]:
    return [_number(statistics.fmean(ratios)), _number(max(ratios))]


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) and value < 100 else "lost" if math.isinf(value) else f"{value:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1, 2, ... (default 5)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--output", type=Path, help="folder for faults.csv and outlier.png; none: only the table")
    arguments = parser.parse_args()
    rows = report(list(range(1, arguments.seeds + 1)), arguments.workers)
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*row.cells())
    Console().print(table)
    print(f"{FOR_EVER.name}: stopped in {sum(rows[-1].stopped)} of {len(rows[-1].stopped)} runs")
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        with (arguments.output / "faults.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *(row.cells() for row in rows)])
        draw(arguments.output / "outlier.png", seed=1)


if __name__ == "__main__":
    main()
