"""The WSD schedule, and several lengths of a run from the checkpoints of one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lion_lightning.hyperparams import wsd
from lion_lightning.training.checkpoint.files import load
from lion_lightning.training.run import run

TRUNK_STEPS, BRANCH_STEPS, BRANCH_AT = 20, 10, 8
SMALL = (
    "recipe=image_classification", "schedule=wsd", "logger=none", "export=false", "data.limit_train_samples=64",
    "data.batch_size=16", "model.config.num_hidden_layers=1", "model.config.hidden_size=32",
    "model.config.num_attention_heads=2", "model.config.intermediate_size=32", "trainer.val_check_interval=4",
    "guard.warmup_steps=3", "checkpoint.keep=9", "data.source.val_fraction=0.05",
)  # fmt: skip


def test_the_peak_is_held_and_the_last_steps_decay_to_the_end() -> None:
    factor = wsd(100, decay=0.2, final=0.1)
    assert [factor(step) for step in (0, 50, 80)] == [1.0, 1.0, 1.0]
    assert factor(85) == pytest.approx(1 - 0.9 * 0.5), "1 - sqrt: half of the way after a quarter of the decay"
    assert factor(100) == factor(1000) == pytest.approx(0.1)
    falling = [factor(step) for step in range(80, 101)]
    assert falling == sorted(falling, reverse=True)
    assert len(set(falling)) == len(falling)


def test_a_short_run_decays_for_one_step_at_least() -> None:
    assert [wsd(3, decay=0.01)(step) for step in range(4)] == [1.0, 1.0, 1.0, 0.0]
    assert [wsd(4, decay=1.0)(step) for step in (0, 1, 4)] == [1.0, 0.5, 0.0]


@pytest.mark.parametrize("decay", [0.0, -0.1, 1.5])
def test_an_impossible_decay_is_refused_with_its_value(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"decay must be in \(0, 1\], got {decay}"):
        wsd(10, decay=decay)
    with pytest.raises(ValueError, match=r"final must be in \[0, 1\], got -1"):
        wsd(10, final=-1)


def test_a_shorter_run_from_a_checkpoint_of_a_longer_one_is_the_shorter_run(
    compose: Callable[..., Any], tmp_path: Path
) -> None:
    def train(name: str, steps: int, *overrides: str) -> dict[str, Any]:
        folder = tmp_path / name
        run(compose(*SMALL, f"trainer.max_steps={steps}", f"run_dir={folder}", *overrides))
        return load(folder / "checkpoints" / f"step-{steps:09d}.ckpt")

    train("trunk", TRUNK_STEPS)
    checkpoint = tmp_path / "trunk" / "checkpoints" / f"step-{BRANCH_AT:09d}.ckpt"
    branched = train("branch", BRANCH_STEPS, f"resume={checkpoint}")
    direct = train("direct", BRANCH_STEPS)
    assert branched["lr_schedulers"] == direct["lr_schedulers"]
    for name, weight in direct["state_dict"].items():
        assert torch.equal(branched["state_dict"][name], weight), name
