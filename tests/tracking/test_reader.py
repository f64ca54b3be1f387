"""Runs written by W&B itself, read back by `tracking.runs`, and drawn."""

import subprocess
import sys
from pathlib import Path

import pytest

from lion_lightning.tracking.runs import UnreadableRun, find_runs, read_run
from lion_lightning.tracking.wandb import RunLogger

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two finished runs and one that failed."""
    place = tmp_path_factory.mktemp("runs")
    for number, (optimizer, code) in enumerate((("lion", 0), ("adamw", 0), ("lion", 1))):
        logger = RunLogger(
            project="p", run_name=f"{optimizer}-{number}", group="g", save_dir=str(place), mode="offline"
        )
        logger.log_hyperparams({"optim": {"name": optimizer, "lr": 1e-3}, "recipe": {"monitor": "val/loss"}})
        logger.define_summaries({"val/loss": "min"})
        for step, loss in enumerate((3.0, 1.0, 2.0)):
            logger.log_metrics({"val/loss": loss + number, "train/loss": 9.0}, step=step)
        logger.finish(code)
    return place


def test_a_run_comes_back_as_it_was_logged(folder):
    runs = [read_run(place) for place in find_runs(folder)]
    by_name = {run.name: run for run in runs}
    assert set(by_name) == {"lion-0", "adamw-1", "lion-2"}
    run = by_name["adamw-1"]
    assert run.state == "finished"
    assert run.config["optim"] == {"name": "adamw", "lr": 1e-3}
    assert run.summary["val/loss"] == {"min": 2.0}
    assert run.curve("val/loss") == ([1, 2, 3], [4.0, 2.0, 3.0])
    assert run.curve("nothing") == ([], [])


def test_a_failed_run_says_so(folder):
    states = {run.name: run.state for run in map(read_run, find_runs(folder))}
    assert states["lion-2"] != "finished"


def test_a_corrupt_file_is_named(tmp_path):
    broken = tmp_path / "run-x.wandb"
    broken.write_bytes(b"not a run")
    with pytest.raises(UnreadableRun, match=r"run-x\.wandb"):
        read_run(broken)
    assert find_runs(tmp_path) == [tmp_path]


def test_plot_runs_draws_a_picture_and_refuses_an_empty_folder(folder, tmp_path):
    script = ROOT / "scripts" / "plot_runs.py"
    output = tmp_path / "curve.png"
    done = subprocess.run(
        [sys.executable, script, folder, "--output", output], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "3 of 3 runs" in done.stdout
    assert output.read_bytes().startswith(b"\x89PNG")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused = subprocess.run([sys.executable, script, empty], capture_output=True, text=True, cwd=ROOT, check=False)
    assert refused.returncode == 2
    assert "no W&B run in" in refused.stderr
