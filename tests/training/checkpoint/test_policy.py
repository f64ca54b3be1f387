"""A checkpoint that a run cannot go on from: one line that names the file, what it lacks, and what to do."""

import logging
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lion_lightning.errors import ConfigError
from lion_lightning.training.checkpoint.files import CheckpointFailed, load, marker_of, newest_valid, step_path
from lion_lightning.training.checkpoint.policy import KEY, RunCheckpoint
from lion_lightning.training.checkpoint.resume import WAY_OUT, restoring
from lion_lightning.training.checkpoint.sharded_state import load_sharded
from lion_lightning.training.performance import Throughput
from lion_lightning.training.run import run

SETTINGS = (
    "recipe=image_classification", "logger=none", "export=false", "data.batch_size=16", "trainer.val_check_interval=2",
    "data.limit_train_samples=32", "model.config.num_hidden_layers=1", "model.config.hidden_size=32",
    "model.config.num_attention_heads=2", "model.config.intermediate_size=32",
)  # fmt: skip
Checkpoint = dict[str, Any]


@pytest.fixture(scope="module")
def train(compose: Any) -> Callable[..., float]:
    def trained(folder: Path, steps: int, *settings: str) -> float:
        return run(compose(*SETTINGS, f"run_dir={folder}", f"trainer.max_steps={steps}", *settings))

    return trained


@pytest.fixture(scope="module")
def saved(train: Callable[..., float], tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """What a run of two steps left."""
    folder = tmp_path_factory.mktemp("saved")
    train(folder, 2)
    return load(folder / "checkpoints/last.ckpt")


@pytest.fixture
def resume(train: Callable[..., float], tmp_path: Path, saved: Checkpoint) -> Callable[..., float]:
    """Go on from a checkpoint after it was changed, by a function or by leaving out what a path of keys leads to."""

    def resumed(change: Callable[[Checkpoint], Any] | tuple[str, ...], *settings: str) -> float:
        checkpoint = deepcopy(saved)
        if callable(change):
            change(checkpoint)
        else:
            part = checkpoint
            for key in change[:-1]:
                part = part[key]
            del part[change[-1]]
        torch.save(checkpoint, tmp_path / "old.ckpt")
        return train(tmp_path / "run", 3, f"resume={tmp_path / 'old.ckpt'}", *settings)

    return resumed


def without_decay_groups(checkpoint: Checkpoint) -> None:
    checkpoint["optimizer_states"][0]["param_groups"].pop()


MISFITS: dict[str, tuple[Any, str]] = {
    "tokens_seen": (("callbacks", "Throughput", "tokens_seen"), "the checkpoint lacks 'tokens_seen'"),
    "best_step": (("callbacks", "RunCheckpoint", "best_step"), "the checkpoint lacks 'best_step'"),
    **{
        key: ((key,), f"the checkpoint lacks '{key}'")
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "loops", "global_step", KEY)
    },
    "a fact": ((KEY, "seed"), "the checkpoint lacks 'seed'"),
    "loop": (("loops", "fit_loop"), "the checkpoint lacks 'fit_loop'"),
    "no optimizer": (
        lambda kept: kept["optimizer_states"].clear(),
        "optimizer_states: 0 in the checkpoint, 1 in this run",
    ),
    "no schedule": (lambda kept: kept["lr_schedulers"].clear(), "lr_schedulers: 0 in the checkpoint, 1 in this run"),
    "groups": (without_decay_groups, "the checkpoint does not fit (state_dict has parameter groups of sizes"),
    "a path": (lambda kept: kept.update(x=Path("x")), "it is no checkpoint, or one that holds more than tensors"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_a_checkpoint_lacks_is_named_in_one_line(resume: Callable[..., float], tmp_path: Path, name: str) -> None:
    change, told = MISFITS[name]
    with pytest.raises(ConfigError) as refused:
        resume(change)
    line = str(refused.value)
    assert line.startswith(f"resume={tmp_path / 'old.ckpt'}: ")
    assert told in line
    assert line.endswith(WAY_OUT)
    assert "\n" not in line
    assert "weights_only" not in line, "torch advises to switch it off"


def test_nothing_missing_goes_on(resume: Callable[..., float]) -> None:
    assert resume(lambda kept: None) > 0


def test_the_version_that_wrote_it_is_kept(saved: Checkpoint) -> None:
    assert saved[KEY]["version"] in WAY_OUT


def test_another_model_is_told_in_one_line(resume: Callable[..., float]) -> None:
    with pytest.raises(ConfigError, match=r"old\.ckpt: the checkpoint does not fit \(.*size mismatch") as told:
        resume(lambda kept: None, "model.config.hidden_size=16")
    assert len(str(told.value)) < 1000
    assert "\n" not in str(told.value)


def test_other_data_is_told_in_one_line(resume: Callable[..., float]) -> None:
    with pytest.raises(ConfigError, match=r"the data is not that of the run: limit_train_samples was 32 and is now 48"):
        resume(lambda kept: None, "data.limit_train_samples=48")


def test_a_best_value_of_another_metric_is_not_compared_with(
    train: Callable[..., float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, 2)
    with caplog.at_level(logging.WARNING, "lion_lightning"):
        loss = train(tmp_path, 3, "resume=auto", "recipe.monitor=val/loss", "recipe.mode=min")
    assert loss > 1, "an accuracy would be less"
    assert "was of max val/top1; the next validation makes the first of min val/loss" in caplog.text


def test_a_later_checkpoint_of_another_process_is_not_removed(
    train: Callable[..., float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, 2)
    begin = RunCheckpoint.on_train_start

    def late(self: RunCheckpoint, *arguments: Any) -> None:
        begin(self, *arguments)
        for file in (step_path(self.folder, 2), marker_of(step_path(self.folder, 2))):
            shutil.copy(file, file.with_name(file.name.replace("2.ckpt", "9.ckpt")))

    monkeypatch.setattr(RunCheckpoint, "on_train_start", late)
    with pytest.raises(CheckpointFailed, match=r"another run has written step-000000009\.ckpt"):
        train(tmp_path, 4, "resume=auto")
    assert newest_valid(tmp_path / "checkpoints") == (step_path(tmp_path / "checkpoints", 9), [])
    assert load(tmp_path / "checkpoints/last.ckpt")["global_step"] == 2


def test_a_file_of_something_else_is_refused(train: Callable[..., float], tmp_path: Path) -> None:
    (tmp_path / "notes.ckpt").write_bytes(b"hello")
    with pytest.raises(ConfigError, match=r"resume=.*notes\.ckpt: it is no checkpoint"):
        train(tmp_path / "run", 3, f"resume={tmp_path / 'notes.ckpt'}")


def test_a_broken_state_of_the_newest_checkpoint_is_named_by_auto(
    train: Callable[..., float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as older:
        older.setattr(Throughput, "state_dict", lambda self: {"samples_seen": self.samples_seen})
        train(tmp_path, 2)
    with pytest.raises(ConfigError, match=r"step-000000002\.ckpt: the checkpoint lacks 'tokens_seen'"):
        train(tmp_path, 3, "resume=auto")
    shutil.rmtree(tmp_path / "checkpoints")
    assert train(tmp_path, 3, "resume=auto") > 0, "what the line says to do"


def test_a_callback_without_a_state_is_told(resume: Callable[..., float], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lion_lightning"):
        resume(("callbacks", "LionGuard"))
    assert "the checkpoint has no state of LionGuard" in caplog.text
    assert "Throughput" not in caplog.text


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_part_that_shards_lack_is_named(tmp_path: Path) -> None:
    dcp.save({"state_dict": {"w": torch.ones(3)}}, checkpoint_id=tmp_path / "sharded", no_dist=True)
    wanted = {"state_dict": {"w": torch.zeros(3)}, "optimizer_0": {"state": {"w": torch.zeros(3)}}}
    misfit = r"sharded: the checkpoint does not fit \(.*optimizer_0\.state\.w"
    with pytest.raises(ConfigError, match=misfit), restoring(tmp_path / "sharded"):
        load_sharded(wanted, tmp_path / "sharded", alone=True)


def test_a_failure_in_training_is_no_fault_of_the_checkpoint(
    resume: Callable[..., float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, *_: Any) -> None:
        raise KeyError("tokens_seen")

    monkeypatch.setattr(Throughput, "on_train_batch_end", broken)
    with pytest.raises(KeyError, match="tokens_seen"):
        resume(lambda kept: None)


def test_another_rank_that_is_gone_is_no_fault_of_the_checkpoint() -> None:
    with pytest.raises(RuntimeError, match="Connection closed"), restoring(Path("a.ckpt")):
        raise RuntimeError("Connection closed by peer")
