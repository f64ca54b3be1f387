"""Runs written by W&B itself, read back through W&B's own reader."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lion_lightning.tracking.runs import UnreadableRun, find_runs, read_file, read_run
from lion_lightning.tracking.wandb import RunLogger

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two finished runs and one that failed."""
    place = tmp_path_factory.mktemp("runs")
    for number, (optimizer, code) in enumerate((("lion", 0), ("adamw", 0), ("lion", 42))):
        logger = RunLogger(
            project="p", run_name=f"{optimizer}-{number}", group="g", save_dir=str(place / str(number)), mode="offline"
        )
        logger.log_hyperparams({"optim": {"name": optimizer, "lr": 1e-3}, "seed": number})
        for step, loss in enumerate((3.0, 1.0, float("nan"))):
            logger.log_metrics({"val/loss": loss + number, "train/loss": 9.0}, step=step)
        logger.finish(code)
    return place


@pytest.fixture(scope="module")
def runs(folder):
    return {run.name: run for run in map(read_file, find_runs(folder))}


def test_a_run_comes_back_as_it_was_logged(runs):
    assert set(runs) == {"lion-0", "adamw-1", "lion-2"}
    run = runs["adamw-1"]
    assert (run.state, run.exit_code, run.group, run.setting("seed")) == ("finished", 0, "g", 1)
    assert run.config["optim"] == {"name": "adamw", "lr": 1e-3}
    steps, values = run.curve("val/loss")
    assert steps.tolist() == [1, 2, 3]
    assert values[:2].tolist() == [4.0, 2.0]
    assert values[2] != values[2], "the loss that was not a number is still there"
    assert "cores" in run.hardware
    assert run.created.startswith("20")
    assert len(run.id) == 8


def test_a_failed_run_says_so(runs):
    assert (runs["lion-2"].state, runs["lion-2"].exit_code) == ("failed", 42)


def test_a_service_that_began_in_another_folder_writes_where_the_run_is(folder, tmp_path, monkeypatch):
    """As one does that a parent process left in WANDB_SERVICE; `folder` has begun it."""
    monkeypatch.chdir(tmp_path)
    logger = RunLogger(project="p", run_name="n", group="g", save_dir="run", mode="offline")
    logger.log_metrics({"val/loss": 3.0}, step=0)
    logger.finish(0)
    assert [read_file(file).curve("val/loss")[1].tolist() for file in find_runs(tmp_path)] == [[3.0]]


def test_a_run_is_found_once_beside_latest_run(folder, tmp_path):
    shutil.copytree(folder / "0", tmp_path / "0", symlinks=False)  # `latest-run` is now a folder of its own
    assert [file.parent.name.startswith("offline-run-") for file in find_runs(tmp_path)] == [True]


def test_a_corrupt_file_does_not_take_the_others_with_it(folder, tmp_path, capfd):
    whole = find_runs(folder)[0]
    damaged, noise, empty = (tmp_path / f"run-{name}.wandb" for name in ("damaged", "noise", "empty"))
    data = bytearray(whole.read_bytes())
    damaged.write_bytes(bytes(data[: len(data) // 2]))
    noise.write_bytes(os.urandom(5000))
    empty.write_bytes(b"")
    read = [read_file(file) for file in (noise, whole, empty, damaged)]
    assert isinstance(read[0], UnreadableRun)
    assert "run-noise.wandb" in str(read[0])
    assert read[1].name in ("lion-0", "adamw-1", "lion-2")
    assert "killed before W&B wrote its first block" in str(read[2])
    half = read[3]
    assert isinstance(half, UnreadableRun) or half.state == "running", "a torn file was never closed"
    assert capfd.readouterr().out == "", "the reader's output is not ours"


def test_no_such_folder_is_named(tmp_path):
    with pytest.raises(UnreadableRun, match="there is no such folder"):
        find_runs(tmp_path / "nowhere")
    assert find_runs(tmp_path) == []


KILLED = """
import os, signal, sys, time
from lion_lightning.tracking.wandb import RunLogger
logger = RunLogger(project="p", run_name="killed", group="g", save_dir=sys.argv[1], mode="offline")
logger.log_hyperparams({"optim": {"name": "lion"}, "seed": 1})
for step in range(400):
    logger.log_metrics({"val/loss": 1.0, **{f"filler/{i}": i / 7 for i in range(20)}}, step=step)
time.sleep(1)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_killed_run_is_running_until_it_has_been_quiet_and_crashed_then(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == -9
    (file,) = find_runs(tmp_path)
    run = read_run(file)
    assert (run.name, run.state, run.exit_code) == ("killed", "running", None)
    assert run.last_step > 100
    # A copy: W&B's own process outlives the killed one for a moment and may still write.
    quiet = shutil.copy(file, tmp_path / "run-quiet.wandb")
    long_ago = time.time() - 3600
    os.utime(quiet, (long_ago, long_ago))
    assert read_run(quiet).state == "crashed"
