"""The cases of interrupt_cases.py in a process of their own, whose forks inherit no threads of other tests."""

import os
import subprocess
import sys
from pathlib import Path


def test_every_case_passes(root: Path) -> None:
    options = ["-n", "0", "-p", "no:cacheprovider", "-o", "addopts="]
    command = [sys.executable, "-m", "pytest", *options, "tests/optim/interrupt_cases.py"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=560, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
