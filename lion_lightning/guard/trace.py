"""Every step's readings in a CSV file, from which thresholds can be tried without training."""

import csv
import math
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lion_lightning.guard.readings import Reading

COLUMNS = ["optimizer", *(field.name for field in fields(Reading))]
FLUSH_EVERY_ROWS = 100


class Trace:
    """Appends readings to a file (rank 0).

    Args:
        path: made with its folder when the first reading comes; a resumed run goes on in the same file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._rows: list[list[Any]] = []

    @rank_zero_only
    def add(self, optimizer: int, reading: Reading) -> None:
        values = asdict(reading)
        values["bad_ranks"] = " ".join(map(str, reading.bad_ranks))
        values["skipped"] = int(reading.skipped)
        self._rows.append([optimizer, *values.values()])
        if len(self._rows) >= FLUSH_EVERY_ROWS:
            self.flush()

    @rank_zero_only
    def flush(self) -> None:
        """Writes what is still in memory."""
        if not self._rows:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(([COLUMNS] if is_new else []) + self._rows)
        self._rows.clear()


def read_trace(path: str | Path) -> dict[int, list[Reading]]:
    """The readings of each optimizer in the order of their steps; of a step that was repeated, the last.

    Raises:
        ValueError: the file is not a trace.
    """
    found: dict[int, dict[int, Reading]] = {}
    for optimizer, reading in _rows(Path(path)):
        found.setdefault(optimizer, {})[reading.step] = reading
    return {optimizer: [rows[step] for step in sorted(rows)] for optimizer, rows in found.items()}


def _rows(path: Path) -> Iterator[tuple[int, Reading]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise ValueError(f"{path} is not a trace of the guard: its columns are {reader.fieldnames}, not {COLUMNS}")
        for row in reader:
            yield int(row["optimizer"]), _reading(row)


def _reading(row: dict[str, str]) -> Reading:
    whole: dict[str, Any] = {name: int(row[name]) for name in ("step", "batch_size", "micro_batch_size")}
    names = (
        "loss",
        "grad_norm",
        "factor",
        "norm_z",
        "loss_z",
        "backward_loss",
        "flip_rate",
        "cosine",
        "dead",
        "micro_norm",
    )
    numbers: dict[str, Any] = {name: float(row[name] or math.nan) for name in names}
    ranks = tuple(int(rank) for rank in row["bad_ranks"].split())
    return Reading(**numbers, **whole, skipped=row["skipped"] == "1", bad_ranks=ranks)
