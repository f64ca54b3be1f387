"""Lion on two real processes (gloo): DTensor shards, FSDP2, DDP, gradient release and the state's way through them."""

import sys
from pathlib import Path

import pytest

from tests.optim.distributed_checks import CHECKS
from tests.processes import run_together

LIMIT_SECONDS = 240


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_agree_with_each_other_and_with_one(root: Path, tmp_path: Path) -> None:
    """All checks of distributed_checks.py in one pair of processes: starting them costs more than checking."""
    command = [sys.executable, "-m", "tests.optim.distributed_checks"]
    commands = [[*command, rank, str(tmp_path / "rendezvous")] for rank in "01"]
    for output in run_together(commands, root, [None, None], LIMIT_SECONDS):
        assert all(check.__name__ in output for check in CHECKS)
