"""`callbacks=ema`: the average is right, and validation, checkpoints, resumes and the export take the right weights."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import AutoModelForImageClassification

import lion_lightning.training.run as run_module
from lion_lightning.errors import ConfigError
from lion_lightning.training.callbacks import AverageWeights
from lion_lightning.training.checkpoint.files import load
from lion_lightning.training.checkpoint.sharded import ShardedStrategy
from lion_lightning.training.signals import TrainingInterrupted

DECAY = 0.5
TINY = (
    "recipe=image_classification", "logger=none", "export=false", "data.batch_size=16", "trainer.max_steps=6",
    "trainer.val_check_interval=3", "data.source.val_fraction=0.05",
)  # fmt: skip
AVERAGED = ("callbacks=ema", f"callbacks.ema.decay={DECAY}")
VIT = (
    "model.config.num_hidden_layers=1", "model.config.hidden_size=32", "model.config.num_attention_heads=2",
    "model.config.intermediate_size=32",
)  # fmt: skip
RESNET = (
    "model=resnet18", "model.config.embedding_size=4", "model.config.hidden_sizes=[4,8]", "model.config.depths=[1,1]"
)  # fmt: skip
State = dict[str, torch.Tensor]


class Watch(Callback):
    """Keeps the weights after each step and in each validation, and may act in the middle of a validation."""

    def __init__(self, in_validation: Callable[[Trainer], None] | None = None) -> None:
        self.steps: list[State] = []
        self.validated: list[State] = []
        self.in_validation = in_validation

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.steps.append(copied(pl_module))

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.validated.append(copied(pl_module))
        if self.in_validation and trainer.global_step == 3:
            self.in_validation(trainer)


def copied(module: LightningModule) -> State:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.fixture
def go(compose: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Watch]:
    """Train the digits in a folder with the average on, and watch."""
    build = run_module.progress

    def trained(
        folder: Path,
        *overrides: str,
        watch: Watch | None = None,
        model: tuple[str, ...] = VIT,
        averaged: tuple[str, ...] = AVERAGED,
    ) -> Watch:
        watch = watch or Watch()
        monkeypatch.setattr(run_module, "progress", lambda *arguments: [watch, *build(*arguments)])
        run_module.run(compose(*TINY, *averaged, *model, f"run_dir={folder}", *overrides))
        return watch

    return trained


def average_of(states: list[State]) -> State:
    """The definition, in float64."""
    kept = {name: value.double() for name, value in states[0].items()}
    for updates, state in enumerate(states[1:], 1):
        decay = min(DECAY, (1 + updates) / (10 + updates))
        kept = {name: decay * kept[name] + (1 - decay) * value for name, value in state.items()}
    return kept


def assert_same(one: State, two: State) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.mark.parametrize("model", [VIT, RESNET], ids=["vit", "resnet"])
def test_validation_checkpoints_and_export_take_the_average(
    go: Callable[..., Watch], tmp_path: Path, model: tuple[str, ...]
) -> None:
    watch = go(tmp_path, "export=true", model=model)
    expected = average_of(watch.steps)
    kept = load(tmp_path / "checkpoints/last.ckpt")
    for name, value in expected.items():
        if value.numel() and watch.steps[0][name].is_floating_point():
            torch.testing.assert_close(kept["state_dict"][name].double(), value, rtol=1e-5, atol=1e-7, msg=name)
        else:
            assert torch.equal(kept["state_dict"][name], watch.steps[-1][name]), name
    assert_same(watch.validated[-1], kept["state_dict"])
    assert_same(watch.steps[-1], kept["current_model_state"])
    assert any(not torch.equal(watch.steps[-1][name], kept["state_dict"][name]) for name in expected)
    best = load(tmp_path / "checkpoints/best.ckpt")["state_dict"]
    exported = AutoModelForImageClassification.from_pretrained(tmp_path / "export").state_dict()
    assert_same(exported, {name.removeprefix("model."): best[name] for name in best if name.startswith("model.")})


def test_a_resumed_run_has_the_same_weights_and_average(go: Callable[..., Watch], tmp_path: Path) -> None:
    go(tmp_path / "whole")
    whole = load(tmp_path / "whole/checkpoints/last.ckpt")

    def stop(trainer: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingInterrupted):
        go(tmp_path / "parts", watch=Watch(in_validation=stop))
    middle = load(tmp_path / "parts/checkpoints/last.ckpt")
    assert middle["global_step"] == 3
    watch = go(tmp_path / "parts", "resume=auto")
    resumed = load(tmp_path / "parts/checkpoints/last.ckpt")
    assert len(watch.steps) == 3, "the first three steps are not taken again"
    assert_same(resumed["state_dict"], whole["state_dict"])
    assert_same(resumed["current_model_state"], whole["current_model_state"])


def test_a_run_without_it_trains_as_a_run_with_it(go: Callable[..., Watch], tmp_path: Path) -> None:
    averaged = go(tmp_path / "with").steps[-1]
    plain = go(tmp_path / "without", averaged=()).steps[-1]
    assert_same(averaged, plain)
    assert "current_model_state" not in load(tmp_path / "without/checkpoints/last.ckpt")


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"decay must be in \[0, 1\), got {decay}"):
        AverageWeights(decay)


def test_sharded_weights_are_refused() -> None:
    trainer = SimpleNamespace(strategy=ShardedStrategy())
    with pytest.raises(ConfigError, match=r"callbacks=ema: the weights of trainer.strategy=fsdp2 are sharded"):
        AverageWeights().setup(trainer, LightningModule(), "fit")  # type: ignore[arg-type]
