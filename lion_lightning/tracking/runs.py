"""Runs as a comparison needs them: identity, state and curves, read from offline W&B files or from a W&B server."""

import json
import math
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    from wandb.apis.public import Run as ServerRun

State = Literal["finished", "failed", "crashed", "running"]
SECONDS = "perf/seconds"
# The metric that holds a run's place on each axis; every row has the optimizer step.
AXES: Mapping[str, str | None] = {
    "steps": None,
    "samples": "data/samples_seen",
    "tokens": "data/tokens_seen",
    "seconds": SECONDS,
}
STEP = "trainer/global_step"
GUARD_EVENTS = "guard/events"
RUNNING_SECONDS = 300  # an unclosed run whose file has not changed for longer counts as crashed
EMPTY_FILE_BYTES = 100
REQUESTS_AT_A_TIME = 8
SERVER_STATES = {"pending": "running", "preempting": "running", "killed": "crashed", "preempted": "crashed"}

RECORD = re.compile(r'\{(?:"num":\d+,)?"type":"(\w+)"')
RECORDS = ("run", "config", "history", "environment", "exit")  # half of the lines are summaries that repeat the history


class UnreadableRun(ValueError):
    """A folder, file or project from which no run can be read. The message says which and why."""


@dataclass(frozen=True, eq=False)
class Run:
    """One W&B run, from disk or from the server.

    Attributes:
        source: The folder or address that it was read from.
        state: `finished`; `failed`, closed with a non-zero exit code; `running`; or `crashed`, never closed.
        config: The nested configuration.
        history: A dictionary per logged row, in order; `trainer/global_step` counts from 0.
        created: Start time, ISO 8601; orders the runs of one seed.
        hardware: Accelerators, processor and cores; empty where unknown.
    """

    source: str
    id: str
    name: str
    group: str
    state: State
    exit_code: int | None
    config: dict[str, Any]
    history: list[dict[str, Any]] = field(repr=False)
    created: str = ""
    hardware: str = ""

    def setting(self, key: str) -> Any:
        """The value of a dotted key of the configuration, such as `optim.lr`; None where it is missing."""
        node: Any = self.config
        for part in key.split("."):
            if not isinstance(node, Mapping) or part not in node:
                return None
            node = node[part]
        return node

    @cached_property
    def metrics(self) -> frozenset[str]:
        """Every name that was logged; the parts of a table or picture, which W&B's reader names apart, count as one."""
        names = frozenset(chain.from_iterable(self.history))
        return frozenset(whole if f"{(whole := name.rpartition('.')[0])}._type" in names else name for name in names)

    @property
    def last_step(self) -> int:
        """Optimizer steps up to the last logged row."""
        return max(map(_steps_of, self.history), default=0)

    def last(self, metric: str) -> float | None:
        """The last finite value of `metric`, None where there is none."""
        _, values = self._by_step(metric)
        finite = values[np.isfinite(values)]
        return float(finite[-1]) if finite.size else None

    def has_axis(self, axis: str) -> bool:
        """Whether the run logged the metric behind `axis`."""
        name = AXES[axis]
        return name is None or name in self.metrics

    def curve(self, metric: str, axis: str = "steps") -> tuple[np.ndarray, np.ndarray]:
        """The curve of a metric, one point per optimizer step: of one step the last value counts.

        Args:
            metric: The logged name.
            axis: A key of `AXES`. Where a row lacks the axis (a validation), its place is interpolated.

        Returns:
            Places on `axis` and values, two float64 arrays of one shape, in the order of steps.
        """
        steps, values = self._by_step(metric)
        return self.place(steps, axis), values

    def place(self, steps: np.ndarray | Sequence[float], axis: str) -> np.ndarray:
        """Translate optimizer steps into places on an axis.

        Args:
            steps: Optimizer steps, counted from 1.
            axis: A key of `AXES`. Past its last logged value the mean rate of the run continues.

        Returns:
            A float64 array of the shape of `steps`; NaN where the run did not log the axis.
        """
        wanted = np.asarray(steps, dtype=float)
        name = AXES[axis]
        if name is None:
            return wanted
        known, places = self._by_step(name)
        if not known.size:
            return np.full_like(wanted, math.nan)
        at, values = np.append(0.0, known), np.append(0.0, places)
        rate = values[-1] / at[-1] if at[-1] else 0.0
        return np.interp(wanted, at, values) + np.maximum(wanted - at[-1], 0) * rate

    def guard_steps(self) -> list[int]:
        """The optimizer steps of the rows in which the guard's count of events rose."""
        steps, events = self._by_step(GUARD_EVENTS)
        return [int(step) for step in steps[np.diff(events, prepend=0.0) > 0]]

    def _by_step(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps in order, and the last value that was logged at each."""
        return self._columns.get(metric, (np.empty(0), np.empty(0)))

    @cached_property
    def _columns(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        columns: dict[str, dict[int, float]] = {}
        for row in self.history:
            for name, value in row.items():
                # W&B's reader writes what JSON has no number for as text.
                if type(value) in (float, int) or (type(value) is str and value in ("NaN", "Infinity", "-Infinity")):
                    columns.setdefault(name, {})[_steps_of(row)] = float(value)
        return {name: tuple(np.array(sorted(one.items()), dtype=float).T) for name, one in columns.items()}


def _steps_of(row: Mapping[str, Any]) -> int:
    """Optimizer steps completed at a row. Lightning counts from 0; runs of other origin have only W&B's own step."""
    return int(row.get(STEP, row.get("_step", 0))) + 1


def find_runs(folder: Path) -> list[Path]:
    """The `.wandb` files at or below `folder`, oldest first; the path of a file yields that file.

    Raises:
        UnreadableRun: There is no such folder or file.
    """
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise UnreadableRun(f"{folder}: there is no such folder")
    # `latest-run` is a link to another run, or a copy of it where links were not kept.
    files = {file.resolve(): file for file in folder.rglob("run-*.wandb") if file.parent.name != "latest-run"}
    return sorted(files.values(), key=lambda file: (file.parent.name, str(file)))


def read_run(place: Path) -> Run:
    """Read one run from a `.wandb` file or from the folder of one run.

    Raises:
        UnreadableRun: It cannot be read, or there are several runs.
    """
    files = find_runs(place)
    if len(files) != 1:
        raise UnreadableRun(f"{place}: {len(files)} runs where one was expected")
    run = read_file(files[0])
    if isinstance(run, UnreadableRun):
        raise run
    return run


def fetch_runs(project: str, group: str | None = None) -> list[Run]:
    """Fetch runs with their whole history through W&B's public API.

    Args:
        project: `entity/project`.
        group: Only runs of this W&B group; None: all of them.

    Raises:
        UnreadableRun: No key, no such project, or no connection; the message is W&B's, in one line.
    """
    import wandb

    try:
        found = wandb.Api().runs(project, filters={"group": group} if group else None, lazy=False)
        with ThreadPoolExecutor(REQUESTS_AT_A_TIME) as pool:
            return list(pool.map(_from_server, list(found)))
    except (wandb.Error, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UnreadableRun(f"--wandb {project}: {reason or type(error).__name__}") from error


def _from_server(run: "ServerRun") -> Run:
    state: Any = SERVER_STATES.get(run.state, run.state)
    return Run(
        source=run.url,
        id=run.id,
        name=run.name or run.id,
        group=run.group or "",
        state=state if state in get_args(State) else "crashed",
        exit_code=None,
        config=dict(run.config),
        history=continued(run.scan_history()),
        created=run.created_at or "",
        hardware=_hardware(run.metadata or {}),
    )


def continued(history: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a run with seconds that go on where it was resumed, which begins them again."""
    rows: list[dict[str, Any]] = []
    spent = last = 0.0
    for row in history:
        if (seconds := row.get(SECONDS)) is not None:
            if seconds < last:
                before = [one[SECONDS] for one in rows if SECONDS in one and one.get(STEP, 0) < row.get(STEP, 0)]
                spent = max(before, default=0.0)
            last, row = seconds, {**row, SECONDS: seconds + spent}
        rows.append(row)
    return rows


def read_file(file: Path) -> Run | UnreadableRun:
    """Read a `.wandb` file with W&B's own reader; the error in the run's place if it cannot be read."""
    from wandb.util import get_core_path

    # What `wandb leet inspect --json` starts; its command line would take seconds to load.
    options = ["--no-observability", "--json", "--run-file", str(file), str(file.parent)]
    records: dict[str, list[dict[str, Any]]] = {}
    with subprocess.Popen(
        [get_core_path(), "leet", "inspect", *options],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
    ) as reader:  # fmt: skip
        complaint = ""
        for line in reader.stdout or ():
            kind = RECORD.match(line)
            if kind is None:
                complaint += line
            elif kind[1] in RECORDS:
                records.setdefault(kind[1], []).append(json.loads(line).get(kind[1], {}))
    if reader.returncode or "run" not in records:
        if file.stat().st_size < EMPTY_FILE_BYTES:
            return UnreadableRun(f"{file}: no data; the run was killed before W&B wrote its first block")
        return UnreadableRun(f"{file}: {complaint.strip() or 'not a W&B file, or its first block is damaged'}")
    about = records["run"][0]
    config: dict[str, Any] = {}
    for record in (about.get("config", {}), *records.get("config", [])):
        config.update(record.get("update", {}))
    config.pop("_wandb", None)
    exit_code = int(records["exit"][-1].get("exit_code", 0)) if "exit" in records else None
    state: State = "running" if time.time() - file.stat().st_mtime < RUNNING_SECONDS else "crashed"
    if exit_code is not None:
        state = "failed" if exit_code else "finished"
    return Run(
        source=str(file.parent),
        id=about.get("run_id", ""),
        name=about.get("display_name", about.get("run_id", file.stem)),
        group=about.get("run_group", ""),
        state=state,
        exit_code=exit_code,
        config=config,
        history=[record["item"] for record in records.get("history", [])],
        created=about.get("start_time", ""),
        hardware=_hardware({key: value for part in records.get("environment", []) for key, value in part.items()}),
    )


def _hardware(metadata: Mapping[str, Any]) -> str:
    """Accelerators, processor and cores, from W&B's description of the machine."""
    accelerators = [gpu.get("name", "GPU") for vendor in ("gpu_nvidia", "gpu_amd") for gpu in metadata.get(vendor, [])]
    processor = " ".join(str(metadata.get("cpu", {}).get("model", "")).replace("(R)", "").split())
    cores = f"{metadata['cpu_count']} cores" if "cpu_count" in metadata else ""
    return ", ".join(part for part in (*accelerators, processor, cores) if part)
