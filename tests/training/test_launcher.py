"""Sweeps by submitit: `hydra/launcher=slurm` composes where the plugin is installed, and is named where it is not."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from lion_lightning.errors import ConfigError
from lion_lightning.training.build import check
from lion_lightning.training.checkpoint.files import load

PLUGIN = importlib.util.find_spec("submitit")
needs_plugin = pytest.mark.skipif(PLUGIN is None, reason="needs hydra-submitit-launcher (the extra `slurm`)")
QUICK = (
    "recipe=image_classification", "logger=none", "export=false", "trainer.max_steps=8", "trainer.val_check_interval=4",
    "model.config.num_hidden_layers=1", "model.config.hidden_size=32", "model.config.num_attention_heads=2",
    "model.config.intermediate_size=32", "trainer.accelerator=cpu",
)  # fmt: skip


@pytest.mark.skipif(PLUGIN is not None, reason="the plugin is installed")
def test_without_the_plugin_it_is_named(root: Path) -> None:
    """That nothing else suffers is seen in tests/test_config.py, whose processes have nothing to say on stderr."""
    asked = subprocess.run(
        [sys.executable, "train.py", "--cfg", "hydra", "hydra/launcher=slurm"],
        cwd=root, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert asked.returncode == 2
    assert asked.stderr.splitlines() == [asked.stderr.strip()], "one line"
    assert asked.stderr == (
        "error: hydra/launcher=slurm needs a plugin that is not installed: pip install hydra-submitit-launcher\n"
    )


@needs_plugin
def test_with_the_plugin_it_composes(root: Path) -> None:
    with initialize_config_dir(str(root / "conf"), version_base="1.3"):
        cfg = compose("train", ["hydra/launcher=slurm", "hydra.launcher.partition=gpu"], return_hydra_config=True)
    launcher = cfg.hydra.launcher
    assert launcher._target_.endswith(".SlurmLauncher")
    assert (launcher.max_num_timeout, launcher.timeout_min, launcher.partition) == (20, 1440, "gpu")


def test_a_job_of_several_tasks_is_a_job_and_not_a_self_launching_sweep(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hydra.core.hydra_config import HydraConfig

    two = ("trainer.devices=2", "trainer.accelerator=cpu", "hydra.mode=MULTIRUN")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with initialize_config_dir(str(root / "conf"), version_base="1.3"):
        HydraConfig.instance().set_config(compose("train", list(two), return_hydra_config=True))
        cfg = compose("train", [*QUICK, "trainer.devices=2"])
    try:
        with pytest.raises(ConfigError, match="every process would run the whole sweep"):
            check(cfg)
        monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
        check(cfg)
    finally:
        HydraConfig.instance().cfg = None


@needs_plugin
@pytest.mark.slow
def test_a_job_out_of_time_is_saved_and_requeued_and_goes_on(root: Path, tmp_path: Path) -> None:
    """By submitit's local executor: its signal comes as before a time limit, in the middle of a run."""
    command = [
        sys.executable, "train.py", "-m", "hydra/launcher=submitit_local", *QUICK, "trainer.max_steps=600",
        "trainer.val_check_interval=600", "checkpoint.every_n_steps=50", "resume=auto", "seed=1,2",
        f"hydra.sweep.dir={tmp_path}/${{run_stamp:}}",
    ]  # fmt: skip
    sweep = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("*/*/checkpoints/last.ckpt"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    (folder,) = tmp_path.iterdir()
    for process in jobs_of(folder):
        os.kill(process, signal.SIGUSR2)
    _, told = sweep.communicate(timeout=120)
    assert sweep.returncode == 0, told
    assert list(tmp_path.iterdir()) == [folder], "every job in the folder of the sweep, also when it is requeued"
    for number in (0, 1):
        (run,) = folder.glob(f"{number}-*")
        assert load(run / "checkpoints/last.ckpt")["global_step"] == 600
    logs = sorted(folder.glob(".submitit/*/*_log.out"))
    assert len(logs) == 2
    for log in logs:
        told = log.with_suffix(".err").read_text()
        (step,) = re.findall(r"stopped by signal 12 after step (\d+): saved in", told)
        first, second = log.read_text().split("goes on from")[1:]
        assert first.split()[0] == "nothing:"
        assert second.split()[0].endswith(f"checkpoints/step-{int(step):09d}.ckpt"), (
            "from what was saved for the signal"
        )


def jobs_of(sweep: Path) -> list[int]:
    """The processes that run the jobs of a sweep; each has a parent of submitit's own, which restarts it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "submitit.core._submit" in command and str(sweep) in command:
            found.append(int(path.parent.name))
    return found
