"""Reading finished and unfinished W&B runs from disk, through W&B's own public reader (`wandb leet inspect`)."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 120


class UnreadableRun(ValueError):
    """A folder or file that W&B's reader cannot read as a run."""


@dataclass(frozen=True)
class Run:
    """One W&B run as it stands on disk.

    Attributes:
        name, state: what it was called, and `finished`, `failed`, `running`, ... in W&B's words.
        config: the nested configuration.
        summary: what stands for the run, by metric; a metric with a `min`, `max` or `last` is a dictionary.
        history: a dictionary per logged row, in order; `trainer/global_step` is the axis.
    """

    folder: Path
    name: str
    state: str
    config: dict[str, Any]
    summary: dict[str, Any]
    history: list[dict[str, Any]]

    def curve(self, metric: str) -> tuple[list[int], list[float]]:
        """Optimizer steps and the values of `metric` at them."""
        rows = [row for row in self.history if metric in row]
        return [row["trainer/global_step"] + 1 for row in rows], [float(row[metric]) for row in rows]


def find_runs(folder: Path) -> list[Path]:
    """The run folders at or below `folder` (`.../wandb/offline-run-*` and `run-*`), oldest first."""
    return sorted({file.parent for file in folder.rglob("run-*.wandb")}, key=lambda path: path.name)


def read_run(folder: Path) -> Run:
    """Read a run folder or a `.wandb` file.

    Raises:
        UnreadableRun: W&B's reader does not take it; the message is W&B's.
    """
    summary = json.loads(_inspect(folder, "--summary"))
    history = [dict(record["history"]["item"]) for record in _records(folder) if record.get("type") == "history"]
    return Run(
        folder=folder,
        name=summary["name"],
        state=summary["state"],
        config=summary["config"],
        summary=summary["summary"],
        history=history,
    )


def _records(folder: Path) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in _inspect(folder).splitlines() if line.startswith("{"))


def _inspect(folder: Path, *flags: str) -> str:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *flags, str(folder)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    if answer.returncode:
        raise UnreadableRun(f"{folder}: {(answer.stderr or answer.stdout).strip()}")
    return answer.stdout
