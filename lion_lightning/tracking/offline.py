"""Runs from disk, through W&B's own public reader: `wandb leet inspect --json`.

Starting the command line costs half a second a run, so a few processes load it once and call it for one run after
another: what they call is the entry point that the `wandb` script itself calls.
"""

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib.metadata import entry_points
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from lion_lightning.tracking.runs import Run, State

RUNNING_SECONDS = 300  # a run that was not closed and has been quiet for longer has crashed
RUNS_PER_TASK = 8
WANTED = ("run", "config", "history", "environment", "exit")
_TYPE = re.compile(r'\{(?:"num":\d+,)?"type":"(\w+)"')


class UnreadableRun(ValueError):
    """A folder or file that holds no run that W&B's reader can read. The message says which and why."""


def find_runs(folder: Path) -> list[Path]:
    """The `.wandb` files at or below `folder`, oldest first; a file stands for itself.

    Raises:
        UnreadableRun: there is no such folder or file.
    """
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise UnreadableRun(f"{folder}: there is no such folder")
    # `latest-run` is a link to one of the others, or a copy of it where links were not kept.
    files = {file.resolve(): file for file in folder.rglob("run-*.wandb") if file.parent.name != "latest-run"}
    return sorted(files.values(), key=lambda file: (file.parent.name, str(file)))


def read_runs(files: Sequence[Path]) -> list[Run | UnreadableRun]:
    """Read `.wandb` files; in the place of one that cannot be read stands the error, so that the others remain."""
    if not files:
        return []
    workers = min(len(files), os.cpu_count() or 1)
    # Started afresh, not forked: the caller may have threads, and the processes change their standard output.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_stay_local) as pool:
        chunk = max(1, min(RUNS_PER_TASK, len(files) // workers))
        return list(pool.map(_read_or_error, files, chunksize=chunk))


def read_run(file: Path) -> Run:
    """Read one run: a `.wandb` file, or the folder of one run.

    Raises:
        UnreadableRun: it cannot be read; the message says why.
    """
    (run,) = read_runs([_only_file(file)])
    if isinstance(run, UnreadableRun):
        raise run
    return run


def _only_file(place: Path) -> Path:
    files = find_runs(place)
    if len(files) != 1:
        raise UnreadableRun(f"{place}: {len(files)} runs where one was expected")
    return files[0]


def _stay_local() -> None:
    """Reading a file reports nothing to anybody, and the reader, a Go program, tidies its memory less often."""
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    os.environ.setdefault("GOGC", "400")  # a quarter of its time goes into that


def _read_or_error(file: Path) -> Run | UnreadableRun:
    try:
        records, complaint = _inspect(file)
        return _run_of(file, records, complaint)
    except UnreadableRun as error:
        return error


def _inspect(file: Path) -> tuple[list[dict[str, Any]], str]:
    """The records of `file`, and what the reader said on the side."""
    with _captured() as captured:
        try:
            _wandb_command()(["leet", "inspect", "--json", str(file)])
            code: Any = 0
        except SystemExit as end:
            code = end.code
    output, complaint = captured()
    if code:
        raise UnreadableRun(f"{file}: {complaint or f'the reader ended with code {code}'}")
    return [json.loads(line) for line in output.splitlines() if _is_wanted(line)], complaint


def _is_wanted(line: str) -> bool:
    """Whether a line is a record that a comparison needs: half of the lines are summaries that repeat the history."""
    kind = _TYPE.match(line)
    return kind is not None and kind[1] in WANTED


@cache
def _wandb_command() -> Callable[[list[str]], None]:
    (entry,) = entry_points(group="console_scripts", name="wandb")
    return entry.load()


@contextmanager
def _captured() -> Iterator[Callable[[], tuple[str, str]]]:
    """Catch this process' standard output and error at the level of file descriptors: the reader is a program."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        saved = os.dup(1), os.dup(2)
        sys.stdout.flush()
        texts: list[str] = []
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            yield lambda: (texts[0], texts[1])
        finally:
            for number, descriptor in enumerate(saved, 1):
                os.dup2(descriptor, number)
                os.close(descriptor)
            for stream in (out, err):
                stream.seek(0)
                texts.append(stream.read().decode("utf-8", "replace").strip())


def _run_of(file: Path, records: list[dict[str, Any]], complaint: str) -> Run:
    by_type: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_type.setdefault(record["type"], []).append(record.get(record["type"], {}))
    if "run" not in by_type:
        raise UnreadableRun(f"{file}: {_why_empty(file, complaint)}")
    about = by_type["run"][0]
    return Run(
        source=str(file.parent),
        id=about.get("run_id", ""),
        name=about.get("display_name", about.get("run_id", file.stem)),
        group=about.get("run_group", ""),
        exit_code=_exit_code(by_type.get("exit", [])),
        state=_state(file, by_type.get("exit", [])),
        config=_config([about.get("config", {}), *by_type.get("config", [])]),
        history=[record["item"] for record in by_type.get("history", [])],
        created=about.get("start_time", ""),
        hardware=hardware_of({key: value for part in by_type.get("environment", []) for key, value in part.items()}),
    )


def _why_empty(file: Path, complaint: str) -> str:
    if file.stat().st_size < 100:
        return "no data; the run was killed before W&B wrote its first block"
    return complaint.removeprefix("wandb leet inspect: ") or "not a W&B file, or its first block is damaged"


def _exit_code(exits: list[dict[str, Any]]) -> int | None:
    return int(exits[-1].get("exit_code", 0)) if exits else None


def _state(file: Path, exits: list[dict[str, Any]]) -> State:
    code = _exit_code(exits)
    if code is not None:
        return "failed" if code else "finished"
    return "running" if time.time() - file.stat().st_mtime < RUNNING_SECONDS else "crashed"


def _config(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for record in records:
        config.update(record.get("update", {}))
    return {key: value for key, value in config.items() if key != "_wandb"}


def hardware_of(seen: dict[str, Any]) -> str:
    """Accelerators, processor and cores, from what W&B notes of a machine."""
    accelerators = [gpu.get("name", "GPU") for gpu in [*seen.get("gpu_nvidia", []), *seen.get("gpu_amd", [])]]
    processor = " ".join(str(seen.get("cpu", {}).get("model", "")).replace("(R)", "").split())
    cores = f"{seen['cpu_count']} cores" if "cpu_count" in seen else ""
    return ", ".join(part for part in (*accelerators, processor, cores) if part)
