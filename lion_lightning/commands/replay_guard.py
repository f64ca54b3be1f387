"""What the guard would have seen in an old run under other thresholds, without training.

    lion-replay-guard outputs/bert_mlm-lion-s1/2026-01-01_10-00-00
    lion-replay-guard guard.csv --set outlier_z=6 --set divergence_steps=10

RUN is a guard.csv, the folder of a run that holds one, or an offline W&B run, of which only the logged steps are known.
The thresholds it had are read from the config.yaml beside it; without one they are the defaults.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from yaml import YAMLError

from lion_lightning.guard.events import read_trace
from lion_lightning.guard.reading import Reading
from lion_lightning.guard.recovery import ON_DIVERGENCE, Remedy
from lion_lightning.guard.replay import Replayed, Settings, changed, logged_readings, replay, settings_of
from lion_lightning.tracking.runs import STEP, find_runs, read_run

STRETCHES_SHOWN = 12
LOGGED_ONLY = (
    "Only the {count} logged steps of {last} are known: a rule that counts steps counts logged ones, and what is not "
    "finite was not logged. A guard.csv has every step."
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        readings, own, remark = read(options.run)
        asked = replace(own, on_divergence=options.on_divergence or own.on_divergence)
        asked = replace(asked, thresholds=changed(own.thresholds, options.set))
        seen = [replay(readings, rules) for rules in ([own] if asked == own else [own, asked])]
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console()
    console.print(table(seen), *verdicts(seen, readings), *([remark] if remark else []), sep="\n")
    return 0


def read(place: Path) -> tuple[dict[int, list[Reading]], Settings, str]:
    """Readings, the rules the run had, and what has to be said about them.

    Raises:
        ValueError: there is nothing to replay.
    """
    trace = place / "guard.csv" if place.is_dir() else place
    if trace.suffix == ".csv" and trace.is_file():
        config = trace.parent / "config.yaml"
        try:
            rules = settings_of(OmegaConf.load(config)) if config.is_file() else Settings()  # type: ignore[arg-type]
        except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
            raise ValueError(f"{config} cannot be read: {' '.join(str(error).split())}") from error
        return _some(read_trace(trace), place), rules, ""
    if not place.exists():
        raise ValueError(f"{place}: there is no such file or folder")
    if place.is_dir() and not find_runs(place):
        raise ValueError(f"{place}: neither a guard.csv nor a W&B run is in there")
    run = read_run(place)
    readings = logged_readings(run.history, STEP)
    found = _some({0: readings} if readings else {}, place)
    return found, settings_of(run.config), LOGGED_ONLY.format(count=len(readings), last=run.last_step)


def _some(readings: dict[int, list[Reading]], place: Path) -> dict[int, list[Reading]]:
    if not readings:
        raise ValueError(f"{place}: holds no readings of the guard")
    return readings


def table(seen: Sequence[list[Replayed]]) -> Table:
    """Events by kind: how many and at which steps, for each set of rules."""
    made = Table(title="What the guard sees")
    made.add_column("event", no_wrap=True)
    for heading in ("was", "asked")[: len(seen)]:
        made.add_column(heading, justify="right")
        made.add_column("steps", overflow="fold")
    labels = dict.fromkeys(event.label for events in seen for event in sorted(events, key=lambda event: event.step))
    for label in labels:
        cells: list[str] = []
        for events in seen:
            steps = [event.step for event in events if event.label == label]
            cells += [str(len(steps)), stretches(steps)]
        made.add_row(label, *cells)
    if not labels:
        made.add_row("nothing", *["0", ""] * len(seen))
    return made


def stretches(steps: Sequence[int]) -> str:
    """Steps with neighbours joined: `3, 7-9`; of many the first few."""
    if not steps:
        return ""
    parts = [[steps[0], steps[0]]]
    for before, step in pairwise(steps):
        if step == before + 1:
            parts[-1][1] = step
        elif step != before:
            parts.append([step, step])
    shown = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts[:STRETCHES_SHOWN])
    return shown + (", ..." if len(parts) > STRETCHES_SHOWN else "")


def verdicts(seen: Sequence[list[Replayed]], readings: dict[int, list[Reading]]) -> list[str]:
    """Sentences under the table."""
    every = [reading for rows in readings.values() for reading in rows]
    skipped = sum(reading.skipped for reading in every)
    clipped = sum(reading.factor > 1 and not reading.skipped for reading in every)
    lines = [f"{len(every)} readings up to step {max(reading.step for reading in every)}; "
             f"the run itself clipped {clipped} steps and skipped {skipped}."]  # fmt: skip
    for heading, events in zip(("As it was", "As asked"), seen, strict=False):
        if events and events[-1].remedy is Remedy.STOP:
            lines.append(f"{heading}, the run stops at step {events[-1].step}.")
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a guard.csv, the folder of a run, or an offline W&B run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a threshold to try; may be repeated"
    )
    parser.add_argument("--on-divergence", choices=ON_DIVERGENCE, help="what a divergence leads to")
    return parser
