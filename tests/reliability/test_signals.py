"""Signals end a run at a step boundary, saved, with the exit code that is documented; sick runs are not saved."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer

import lion_lightning.training.run as run_module
from lion_lightning.training.checkpoint.files import (
    CheckpointFailed,
    DurableCheckpointIO,
    load,
    newest_valid,
    step_files,
    verify,
)
from lion_lightning.training.signals import StopFlag, TrainingInterrupted

DIGITS = (
    "recipe=image_classification", "logger=none", "export=false", "data.batch_size=16", "trainer.max_steps=6",
    "trainer.val_check_interval=3", "model.config.num_hidden_layers=1", "model.config.hidden_size=32",
    "model.config.num_attention_heads=2", "model.config.intermediate_size=32", "data.source.val_fraction=0.05",
)  # fmt: skip
Act = Callable[[Trainer], None]


class At(Callback):
    """Does something after a step, and says whether the run is healthy."""

    def __init__(self, step: int, act: Act, sick_from: int = 10**9) -> None:
        self.step, self.act, self.sick_from, self.steps = step, act, sick_from, 0

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.steps += 1
        if trainer.global_step == self.step:
            self.act(trainer)

    def is_healthy(self) -> bool:
        return self.steps < self.sick_from


@pytest.fixture
def go(compose: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., float]:
    """Train the digits in `tmp_path`, with a callback."""
    build = run_module.progress

    def trained(callback: Callback | None = None, *overrides: str) -> float:
        more = [] if callback is None else [callback]
        monkeypatch.setattr(run_module, "progress", lambda *arguments: [*more, *build(*arguments)])
        return run_module.run(compose(*DIGITS, f"run_dir={tmp_path}", *overrides))

    return trained


def send(signum: int) -> Act:
    return lambda trainer: os.kill(os.getpid(), signum)


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)],
    ids=lambda value: str(value),
)
def test_a_signal_ends_the_run_saved_at_the_step(go: Any, tmp_path: Path, signum: int, code: int) -> None:
    before = signal.getsignal(signum)
    with pytest.raises(TrainingInterrupted, match=r"after step 2: saved in .*; resume=auto goes on") as stopped:
        go(At(2, send(signum)))
    assert stopped.value.code == stopped.value.exit_code == code
    assert signal.getsignal(signum) is before
    path, wrong = newest_valid(tmp_path / "checkpoints")
    assert path is not None
    assert not wrong
    assert verify(path).global_step == 2
    assert load(tmp_path / "checkpoints/last.ckpt")["global_step"] == 2


def test_two_signals_are_one(go: Any, tmp_path: Path) -> None:
    def twice(trainer: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingInterrupted):
        go(At(1, twice))
    assert newest_valid(tmp_path / "checkpoints")[0] is not None


def test_a_second_ctrl_c_interrupts_at_once_but_not_under_a_launcher() -> None:
    with StopFlag(alone=True) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with StopFlag(alone=False) as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT


def test_a_signal_at_the_last_step_lets_the_run_end(go: Any, tmp_path: Path) -> None:
    """Only its validation is left, and a resumed run would not get to it."""
    best = go(At(6, send(signal.SIGTERM)))
    assert load(tmp_path / "checkpoints/last.ckpt")["global_step"] == 6
    counter = At(0, lambda trainer: None)
    assert go(counter, "resume=auto") == best, "a finished run is told again"
    assert counter.steps == 0


def test_a_sick_run_is_not_saved(go: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    go(At(0, lambda trainer: None, sick_from=5), "checkpoint.every_n_steps=1")
    folder = tmp_path / "checkpoints"
    assert [load(path)["global_step"] for path in step_files(folder)] == [3, 4]
    assert load(folder / "last.ckpt")["global_step"] == 4
    assert load(folder / "best.ckpt")["global_step"] == 3
    assert caplog.text.count("is not saved: the guard reports a fault") == 1


def test_a_run_that_is_fit_again_at_its_end_has_a_best_one(go: Any, tmp_path: Path) -> None:
    """Its last validation came while the guard watched a raised loss; at the end no step is left to watch."""

    class Watching(At):
        def on_train_end(self, trainer: Trainer, *_: Any) -> None:
            self.sick_from = 10**9

    go(Watching(0, lambda trainer: None, sick_from=1))
    folder = tmp_path / "checkpoints"
    assert load(folder / "last.ckpt")["global_step"] == load(folder / "best.ckpt")["global_step"] == 6


def test_a_signal_does_not_save_a_sick_run(go: Any, tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted, match="after step 4: not saved, because the guard reports a fault"):
        go(At(4, send(signal.SIGTERM), sick_from=4), "checkpoint.every_n_steps=1")
    assert load(tmp_path / "checkpoints/last.ckpt")["global_step"] == 3


def test_every_so_many_minutes_a_run_is_saved(go: Any, tmp_path: Path) -> None:
    go(At(0, lambda trainer: None), "checkpoint.every_minutes=1e-6", "checkpoint.keep=100")
    steps = [load(path)["global_step"] for path in step_files(tmp_path / "checkpoints")]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_that_cannot_be_written_ends_the_run(go: Any, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"

    def lose(trainer: Trainer) -> None:
        folder.rename(tmp_path / "before")
        folder.write_text("a file where the folder was: root may write into any folder")

    with pytest.raises(CheckpointFailed, match=r"FileExistsError.*the ones before it are as they were") as failed:
        go(At(3, lose), "checkpoint.every_n_steps=1")
    assert failed.value.exit_code == 74
    assert verify(tmp_path / "before/last.ckpt").global_step == 2


def test_ordinary_checkpoint_plugins_are_refused(tmp_path: Path) -> None:
    from lion_lightning.training.checkpoint.policy import RunCheckpoint

    trainer = Trainer(callbacks=[RunCheckpoint(tmp_path)], logger=False, accelerator="cpu", enable_progress_bar=False)
    with pytest.raises(TypeError, match="DurableCheckpointIO"):
        trainer.checkpoint_callbacks[0].setup(trainer, None, "fit")
    assert DurableCheckpointIO().error is None


@pytest.mark.slow
def test_a_real_process_group_gets_a_signal(root: Path, tmp_path: Path, go: Any) -> None:
    """As a terminal or a scheduler sends it: to the loader's workers too, which the run still needs."""
    command = [sys.executable, "train.py", *DIGITS, "trainer.max_steps=1000000", "data.num_workers=2",
               "checkpoint.every_n_steps=5", f"hydra.run.dir={tmp_path}"]  # fmt: skip
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                               start_new_session=True)  # fmt: skip
    folder, deadline = tmp_path / "checkpoints", time.monotonic() + 120
    while not (folder / "last.ckpt").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    _, told = process.communicate(timeout=60)  # scripts/signal_test.py measures how long it takes
    assert process.returncode == 143, told
    assert "Traceback" not in told
    assert "stopped by signal 15 after step" in told
    path, wrong = newest_valid(folder)
    assert path is not None
    assert not wrong
    step = verify(path).global_step
    assert f"after step {step}: saved" in told
    counter = At(0, lambda trainer: None)
    go(counter, "resume=auto", f"trainer.max_steps={step + 2}")
    assert counter.steps == 2
