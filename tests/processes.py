"""Processes that belong together, started and waited for."""

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


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
