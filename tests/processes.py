"""Processes: commands in one that has imported the libraries already, and several that belong together."""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LIMIT_SECONDS = 120
IMPORTED = [
    "lion_lightning.commands.predict",
    "lion_lightning.training.run",
    "lion_lightning.recipes.bert_mlm.module",
    "lion_lightning.recipes.image_classification.module",
]


def run_python(
    words: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None, limit_seconds: float = 300
) -> subprocess.CompletedProcess[str]:
    """What `python WORDS...` does in `folder`, without the ten seconds that its imports would take.

    It runs in a fork of a server process that has made them, and ends without exit handlers. Not for tests of what of
    this package is imported, or from where.

    Args:
        words: a script and its arguments, or `-m`, a module and its arguments.
        folder: the working folder.
        environment: instead of this process's; variables that libraries read when they are imported have no effect.
        limit_seconds: the process is killed, and the test fails, after this time.
    """
    (answer,) = run_python_together([words], folder, [environment], limit_seconds)
    return answer


def run_python_together(
    commands: Sequence[Sequence[str]],
    folder: Path,
    environments: Sequence[Mapping[str, str] | None],
    limit_seconds: float,
) -> list[subprocess.CompletedProcess[str]]:
    """Several of `run_python` at the same time."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(IMPORTED)
    with tempfile.TemporaryDirectory() as place:
        started = []
        try:
            for number, (words, environment) in enumerate(zip(commands, environments, strict=True)):
                pipes = [Path(place) / f"{name}-{number}" for name in ("stdout", "stderr")]
                for pipe in pipes:
                    pipe.touch()
                variables = dict(os.environ if environment is None else environment)
                process = server.Process(target=_run, args=(list(words), folder, variables, pipes), name="MainProcess")
                process.start()
                started.append((words, process, pipes))
            for words, process, _ in started:
                process.join(limit_seconds)
                if process.is_alive():
                    raise TimeoutError(f"{' '.join(words)} has not ended after {limit_seconds} s")
        finally:
            for _, process, _ in started:
                process.kill()
                process.join()
        return [
            subprocess.CompletedProcess(
                list(words), process.exitcode, *(pipe.read_text(encoding="utf-8") for pipe in pipes)
            )
            for words, process, pipes in started
        ]


def _run(words: list[str], folder: Path, environment: dict[str, str], pipes: list[Path]) -> None:
    """Become the process that `python WORDS...` would be."""
    for number, pipe in enumerate(pipes, 1):
        os.dup2(os.open(pipe, os.O_WRONLY), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    is_module = words[0] == "-m"
    paths = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:0] = [str(folder if is_module else Path(words[0]).resolve().parent), *paths]
    sys.argv = words[is_module:]
    if is_module:
        sys.modules.pop(f"{words[1]}.__main__", None)  # it warns of a module that is there already
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


def run_together(
    commands: Sequence[Sequence[str]],
    folder: Path,
    environments: Sequence[Mapping[str, str] | None],
    limit_seconds: float,
) -> list[str]:
    """What each printed. Fails with the end of it if one does not exit with 0, and leaves none running."""
    started = [
        subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for command, environment in zip(commands, environments, strict=True)
    ]
    try:
        outputs = [process.communicate(timeout=limit_seconds)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for rank, (process, output) in enumerate(zip(started, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank}:\n{output[-4000:]}"
    return outputs


def torchrun(
    processes: int, jobs: list[dict[str, Any]], folder: Path, root: Path, *options: str, fails: bool = False
) -> str:
    """What jobs of `tests.reliability.ranks` printed. Fails with the end of it if they do not end as they should."""
    file = folder / f"jobs-{processes}-{jobs[0]['name']}.json"
    file.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [*options, "-m", "tests.reliability.ranks", str(file), str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=root, **pipes) as process:  # type: ignore[call-overload]
        try:
            output, errors = process.communicate(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its ranks, which have sessions of their own
            raise
    assert (process.returncode != 0) == fails, output[-2000:] + errors[-6000:]
    return output + errors
