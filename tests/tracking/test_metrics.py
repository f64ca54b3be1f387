"""docs/metrics.md lists what real runs log: every key, and none that no recipe logs. The smoothed loss is exact."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lion_lightning.tracking.runs import Run, read_run
from lion_lightning.training.callbacks import LOSS_HALF_LIFE_STEPS, SmoothedLoss
from lion_lightning.training.run import run

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
MAX_KEYS = 45
OPTIMIZER_STEPS = 30
WORDS = ("alpha", "beta", "gamma", "delta", "epsilon")
EVERYTHING = (
    "optim=lion", f"trainer.max_steps={OPTIMIZER_STEPS}", "trainer.val_check_interval=15", "guard.telemetry_every=2",
    "trainer.log_every_n_steps=1", "trainer.accumulate_grad_batches=2", "data.batch_size=8", "export=false",
    "model.config.num_hidden_layers=1", "+guard.thresholds.slow_half_life=10",  # divergence has a limit from step 10 on
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(compose: Any, short_prose: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A short run of each recipe, of text classification with classes and with values, under its name."""
    folder = tmp_path_factory.mktemp("runs")
    texts = [f"{WORDS[n % 5]} {WORDS[n // 5 % 5]} {n}" for n in range(200)]
    for name, labels in (("classes", ["odd", "even"] * 100), ("values", [str(n % 7) for n in range(200)])):
        rows = [f"{text},{label}" for text, label in zip(texts, labels, strict=True)]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    text = ["data.vocab_size=256", "data.sequence_length=16", f"data.cache_dir={folder / 'cache'}"]
    labeled = ["recipe=text_classification", "data=labeled_files", *text]
    recipes = {
        "bert_mlm": ["recipe=bert_mlm", "data=text_files", f"data.path={short_prose}", *text],
        "image_classification": ["recipe=image_classification", "data.source.val_fraction=0.05"],
        "classes": [*labeled, f"data.path={folder / 'classes.csv'}"],
        "values": [
            *labeled, f"data.path={folder / 'values.csv'}", "data.source.regression=true", "recipe.monitor=val/spearman"
        ],
    }  # fmt: skip
    for name, settings in recipes.items():
        run(compose(*settings, *EVERYTHING, f"run_dir={folder / name}"))
    return {name: read_run(folder / name) for name in recipes}


def keys(run: Run) -> set[str]:
    """The names that a run logged, less W&B's own; `lr/<optimizer>/<group>` stands for all rates."""
    own = {name for name in run.metrics if not name.startswith("_")}
    return {re.sub(r"^lr/.*", "lr/<optimizer>/<group>", name) for name in own}


def test_every_key_is_documented_and_every_documented_key_is_logged(runs: dict[str, Run]) -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in lines if line.startswith("| `")]
    documented = {row[0].strip("`") for row in rows}
    assert len(documented) == len(rows), "a key twice"
    assert all(row[2].endswith(".") for row in rows), "a sentence each"
    assert set().union(*map(keys, runs.values())) == documented


@pytest.mark.parametrize("name", ["bert_mlm", "image_classification", "classes", "values"])
def test_a_run_logs_at_most_45_keys(runs: dict[str, Run], name: str) -> None:
    logged = {key for key in runs[name].metrics if not key.startswith("_")}
    assert 30 < len(logged) <= MAX_KEYS, sorted(logged)


def test_the_smoothed_loss_lies_amid_the_raw_one_with_micro_batches_too(runs: dict[str, Run]) -> None:
    for logged in runs.values():
        smoothed, loss = logged.curve("train/loss_smoothed")[1], logged.curve("train/loss")[1]
        assert len(smoothed) == OPTIMIZER_STEPS
        assert loss.min() < smoothed[-1] < loss.max()


class Trainer(SimpleNamespace):
    global_step, log_every_n_steps, accumulate_grad_batches = 10, 10, 1


def smooth(callback: SmoothedLoss, losses: list[float], micro_batches: int = 1) -> float:
    """The average after `losses`, one per micro-batch."""
    logged: dict[str, Any] = {}
    module: Any = SimpleNamespace(log=logged.__setitem__)
    trainer: Any = Trainer(accumulate_grad_batches=micro_batches)
    for loss in losses:
        callback.on_train_batch_end(trainer, module, {"loss": torch.tensor(loss / micro_batches)}, None, 0)
    return float(logged["train/loss_smoothed"])


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_smoothed_loss_halves_in_its_half_life(micro_batches: int) -> None:
    callback = SmoothedLoss()
    assert smooth(callback, [2.0]) == pytest.approx(2.0), "no bias towards zero"
    smooth(callback, [1.0] * 1000)
    steps = [0.0] * LOSS_HALF_LIFE_STEPS * micro_batches
    assert smooth(callback, steps, micro_batches) == pytest.approx(0.5, rel=1e-3)


def test_a_loss_that_is_not_finite_leaves_the_average_alone() -> None:
    assert smooth(SmoothedLoss(), [3.0, float("nan"), float("inf")]) == pytest.approx(3.0)


def test_a_resumed_average_goes_on_bit_for_bit() -> None:
    losses = torch.rand(60, generator=torch.Generator().manual_seed(1)).tolist()
    whole, resumed = SmoothedLoss(), SmoothedLoss()
    first = SmoothedLoss()
    smooth(first, losses[:33])
    resumed.load_state_dict(first.state_dict())
    assert smooth(resumed, losses[33:]) == smooth(whole, losses)
