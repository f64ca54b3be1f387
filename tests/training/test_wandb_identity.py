"""Which W&B run a resumed run is: online the same one, offline a new one of the same group."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wandb

from lion_lightning.errors import ConfigError
from lion_lightning.tracking.runs import Run, find_runs, read_file
from lion_lightning.training.run import run

SETTINGS = (
    "recipe=image_classification", "logger=wandb", "export=false", "data.batch_size=64", "trainer.val_check_interval=2",
    "model.config.num_hidden_layers=1", "model.config.hidden_size=32", "model.config.num_attention_heads=2",
    "model.config.intermediate_size=32", "group=g",
)  # fmt: skip


@pytest.fixture
def train(compose: Callable[..., Any]) -> Callable[..., float]:
    def trained(folder: Path, steps: int, *settings: str) -> float:
        return run(compose(*SETTINGS, f"run_dir={folder}", f"trainer.max_steps={steps}", *settings))

    return trained


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What W&B was asked for, by runs that take themselves for online; they are begun offline."""
    asked: list[dict[str, Any]] = []
    begin = wandb.init

    def init(**arguments: Any) -> Any:
        asked.append(arguments)
        return begin(**{**arguments, "mode": "offline", "resume": None})

    monkeypatch.setattr(wandb, "init", init)
    return asked


@pytest.mark.slow
def test_online_a_resumed_run_is_the_same_run(
    train: Callable[..., float], tmp_path: Path, online: list[dict[str, Any]]
) -> None:
    settings = ("logger.mode=online", "schedule=constant", "guard.warmup_steps=1")
    for steps in (2, 4):
        train(tmp_path / "a", steps, *settings, "resume=auto")
    train(tmp_path / "b", 6, *settings, f"resume={tmp_path / 'a/checkpoints/last.ckpt'}")
    first, second, elsewhere = (arguments["id"] for arguments in online)
    assert first == second == (tmp_path / "a/wandb_run_id").read_text()
    assert elsewhere != first, "another folder, another run"
    assert [arguments["mode"] for arguments in online] == ["online"] * 3
    assert online[1]["resume"] == "allow"


def test_online_a_run_without_a_checkpoint_starts_afresh(
    train: Callable[..., float], tmp_path: Path, online: list[dict[str, Any]]
) -> None:
    (tmp_path / "wandb_run_id").write_text("abcd1234")
    train(tmp_path, 2, "logger.mode=online", "resume=auto")
    assert online[0]["id"] != "abcd1234"
    assert (tmp_path / "wandb_run_id").read_text() == online[0]["id"]


@pytest.mark.slow
def test_offline_a_resumed_run_is_a_new_one_of_the_group(train: Callable[..., float], tmp_path: Path) -> None:
    for steps in (2, 4):
        train(tmp_path, steps, "logger.mode=offline", "schedule=constant", "guard.warmup_steps=1", "resume=auto")
    runs = [seen for seen in map(read_file, find_runs(tmp_path)) if isinstance(seen, Run)]
    assert len({seen.id for seen in runs}) == len(runs) == 2
    assert {seen.group for seen in runs} == {"g"}
    assert not (tmp_path / "wandb_run_id").exists()


@pytest.mark.parametrize("setting", ["logger.project='a/b'", f"logger.tags=[{'x' * 65}]"])
def test_a_name_that_wandb_does_not_take_is_one_line(train: Callable[..., float], tmp_path: Path, setting: str) -> None:
    with pytest.raises(ConfigError, match=r"logger=wandb: (Invalid project name 'a/b'|.*\n.*\n.*Tags must be)"):
        train(tmp_path, 2, setting)
    assert not (tmp_path / "checkpoints").exists()
