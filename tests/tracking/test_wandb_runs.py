"""Weights & Biases runs, read back with W&B's own `wandb leet inspect`."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from lion_lightning.tracking.runs import read_run
from lion_lightning.tracking.wandb import RunLogger, choose_mode
from lion_lightning.training.report import print_commands
from lion_lightning.training.run import run

TUNED = Path(__file__).parents[2] / "conf/tuned/image_classification_adamw.yaml"

QUICK = ("trainer.max_steps=4", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "export=false")


@functools.cache  # loading W&B's command line takes seconds
def wandb_cli(*arguments: str) -> str:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def summary(folder: Path) -> dict[str, Any]:
    return json.loads(wandb_cli("--summary", "--json", str(folder)))


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in wandb_cli("--json", str(folder)).splitlines())
    return [line[kind] for line in lines if line["type"] == kind]


def runs_below(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.rglob("offline-run-*") if entry.is_dir())


def train(compose: Callable[..., Any], folder: Path, *overrides: str) -> float:
    folder.mkdir(parents=True, exist_ok=True)
    return run(compose("recipe=image_classification", f"run_dir={folder}", *QUICK, *overrides))


@pytest.fixture(scope="module")
def finished(compose: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """One offline run, and the best metric it returned."""
    folder = tmp_path_factory.mktemp("finished")
    best = train(compose, folder, "optim=adamw", "seed=3", "trainer.max_steps=12", "trainer.val_check_interval=2")
    (logged,) = runs_below(folder)
    return logged, best


def test_a_run_says_who_it_is(finished: tuple[Path, float]) -> None:
    seen = summary(finished[0])
    assert seen["name"] == "image_classification-adamw-s3"
    assert seen["project"] == "lion_lightning"
    assert set(seen["tags"]) == {"image_classification", "adamw", "digits", "vit_micro"}
    (about,) = records(finished[0], "run")
    assert about["run_group"] == "image_classification-digits-vit_micro-12x64x1"
    assert about["job_type"] == "train"


def test_a_finished_run_is_finished(finished: tuple[Path, float]) -> None:
    seen = summary(finished[0])
    assert (seen["state"], seen["exit_code"]) == ("finished", 0)


def test_the_configuration_is_nested_and_resolved(finished: tuple[Path, float]) -> None:
    config = summary(finished[0])["config"]
    tuned = OmegaConf.load(TUNED).optim
    assert (config["optim"]["lr"], config["optim"]["betas"]) == (tuned.lr, tuned.betas)
    assert config["model"]["config"]["hidden_size"] == 64
    assert config["data"]["seed"] == config["seed"] == 3
    assert not [key for key in config if "/" in key or "." in key], "flattened"
    assert "${" not in json.dumps(config)


def test_summaries_are_the_best_or_the_last_by_exact_name(finished: tuple[Path, float]) -> None:
    logged, best = finished
    kept = summary(logged)["summary"]
    history = [row["item"] for row in records(logged, "history")]
    values = {name: [row[name] for row in history if name in row] for name in ("val/top1", "val/loss", "train/loss")}
    assert len(values["val/top1"]) == 6
    assert kept["val/top1"] == {"max": pytest.approx(max(values["val/top1"]))}
    assert kept["val/loss"] == {"min": pytest.approx(min(values["val/loss"]))}
    assert kept["train/loss"] == {"last": pytest.approx(values["train/loss"][-1])}
    assert kept["val/top1"]["max"] == pytest.approx(best, rel=1e-6)
    assert len(values["train/loss"]) == 12, "a step is missing"


def test_speed_and_data_are_logged_under_their_names(finished: tuple[Path, float]) -> None:
    kept = summary(finished[0])["summary"]
    for name in (
        "perf/samples_per_second",
        "perf/step_ms",
        "perf/data_wait",
        "perf/peak_memory_gib",
        "trainer/global_step",
    ):
        assert name in kept, name
    assert kept["data/samples_seen"] == 12 * 64
    assert {"lr/AdamW/decay", "lr/AdamW/no_decay", "guard/warmup_factor"} <= set(kept)


def test_the_environment_is_left_as_it_was(finished: tuple[Path, float]) -> None:
    assert "WANDB_MODE" not in os.environ
    assert "WANDB_RUN_ID" not in os.environ


@pytest.mark.slow
def test_a_crash_is_closed_as_failed_and_the_next_run_is_a_new_one(
    compose: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lion_lightning.recipes.image_classification.module as module

    with monkeypatch.context() as broken:
        broken.setattr(module.ImageClassifier, "on_validation_epoch_end", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(compose, tmp_path / "crashed")
    train(compose, tmp_path / "healthy")
    (crashed,), (healthy,) = runs_below(tmp_path / "crashed"), runs_below(tmp_path / "healthy")
    assert (summary(crashed)["state"], summary(crashed)["exit_code"]) == ("failed", 1)
    assert (summary(healthy)["state"], summary(healthy)["exit_code"]) == ("finished", 0)
    assert summary(crashed)["run_id"] != summary(healthy)["run_id"]


def test_a_run_that_the_guard_ends_has_the_guards_exit_code(
    compose: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lion_lightning.recipes.image_classification.module as module
    from lion_lightning.guard.callback import TrainingStopped

    honest = module.ImageClassifier.training_step
    monkeypatch.setattr(module.ImageClassifier, "training_step", lambda *a: honest(*a) * float("nan"))
    with pytest.raises(TrainingStopped):
        train(compose, tmp_path)
    logged = read_run(tmp_path)
    assert (logged.state, logged.exit_code) == ("failed", 42)


@pytest.mark.slow
def test_a_sweep_makes_separate_finished_runs_of_one_group(root: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "train.py", "-m", "recipe=image_classification", "optim=lion,adamw", *QUICK,
        f"hydra.sweep.dir={tmp_path}",
    ]  # fmt: skip
    subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=120)
    seen = [summary(folder) for folder in runs_below(tmp_path)]
    assert sorted(one["name"] for one in seen) == ["image_classification-adamw-s1", "image_classification-lion-s1"]
    assert len({one["run_id"] for one in seen}) == 2
    assert [(one["state"], one["exit_code"]) for one in seen] == [("finished", 0)] * 2
    assert len({one["config"]["group"] for one in seen}) == 1
    assert {one["config"]["optim"]["name"] for one in seen} == {"lion", "adamw"}
    assert all(one["summary"]["trainer/global_step"] in (3, 4) for one in seen), "one job logged into the other's run"


@pytest.mark.parametrize(
    ("asked", "environment", "mode"),
    [
        (None, {}, "offline"),
        (None, {"WANDB_API_KEY": "k"}, "online"),
        (None, {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        (None, {"WANDB_MODE": "disabled"}, "disabled"),
        ("offline", {"WANDB_API_KEY": "k"}, "offline"),
        ("online", {"WANDB_MODE": "offline"}, "online"),
    ],
)
def test_the_mode_follows_the_setting_then_the_environment_then_the_key(
    asked: str | None, environment: dict[str, str], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert choose_mode(asked) == mode


def test_an_unknown_mode_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mode must be one of online, offline, disabled, got 'of'"):
        RunLogger(project="p", run_name="n", group="g", save_dir=str(tmp_path), mode="of")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["new", "my runs; 'quoted' $HOME", ":dog: [bold]" + "x" * 90])
def test_offline_gives_the_command_to_upload_for_any_shell_and_width(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = RunLogger(project="p", run_name="n", group="g", save_dir=str(tmp_path / name), mode="offline")
    line = logger.describe()
    (folder,) = runs_below(tmp_path)
    logger.finish(0)
    assert "offline" in line
    print_commands(Console(width=40), [line])
    assert capsys.readouterr().out == f"{line}\n", "wrapped, or changed by rich"
    command = line.partition("upload with: ")[2]
    typed = subprocess.run(["sh", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True)
    assert typed.stdout.splitlines() == ["wandb", "sync", str(folder)]
