"""Lion on two real processes (gloo): DTensor shards, FSDP2, DDP, gradient release and the state's way through them."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.optim.distributed_checks import CHECKS

LIMIT_SECONDS = 240


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_agree_with_each_other_and_with_one(root: Path, tmp_path: Path) -> None:
    """All checks of distributed_checks.py in one pair of processes: starting them costs more than checking."""
    command = [sys.executable, "-m", "tests.optim.distributed_checks"]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "rendezvous")],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=LIMIT_SECONDS)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for rank, (process, output) in enumerate(zip(started, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank}:\n{output[-4000:]}"
        assert all(check.__name__ in output for check in CHECKS)
