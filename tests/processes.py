"""Processes that belong together, started and waited for."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LIMIT_SECONDS = 120


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
