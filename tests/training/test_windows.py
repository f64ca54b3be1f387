"""A run without what Windows lacks: the module `resource`, and the signals SIGUSR1, SIGUSR2 and SIGALRM."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import contextlib, signal, sys, types
with contextlib.suppress(ImportError):
    import psutil  # its part for this platform needs what is hidden
import lightning.pytorch, torch.utils.data, transformers.modeling_utils  # these ask for the platform, not for the names

reduced = types.ModuleType("signal")
hidden = ("SIGUSR1", "SIGUSR2", "SIGALRM", "alarm")
vars(reduced).update({name: value for name, value in vars(signal).items() if name not in hidden})
sys.modules["signal"], sys.modules["resource"] = reduced, None
from lion_lightning.__main__ import main
main()
"""


@pytest.mark.slow
def test_a_short_run(root: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    settings = ["recipe=image_classification", f"run_dir={tmp_path / 'run'}", "logger=csv", "trainer.max_steps=2"]
    settings += ["data.batch_size=64", "trainer.val_check_interval=2", "export=false", "trainer.accelerator=cpu"]
    command = [sys.executable, str(program), *settings]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    assert "GiB at most" not in done.stdout
