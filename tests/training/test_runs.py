"""Whole runs through `training.run.run`: they learn, return what they monitored, go on, and leave what they promise."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from omegaconf import OmegaConf

import lion_lightning.recipes.bert_mlm.module as bert_module
from lion_lightning.errors import ConfigError
from lion_lightning.training.run import run

RUN_FILES = (
    "config.yaml",
    "checkpoints/best.ckpt",
    "checkpoints/best.safetensors",
    "checkpoints/last.ckpt",
    "export/model.safetensors",
    "export/README.md",
)
Go = Callable[..., float]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CPython's documentation topics, a file for each: half a megabyte of real English."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("text")
    for number, name in enumerate(sorted(topics)):
        (folder / f"{number:03}.txt").write_text(topics[name], encoding="utf-8")
    return folder


@pytest.fixture
def bert(compose: Any, text: Path, tmp_path: Path) -> Go:
    """Train the default model at half its width on the text; further overrides as on the command line."""

    def go(*overrides: str) -> float:
        folder = tmp_path / "bert"
        shutil.rmtree(folder, ignore_errors=True)  # a run does not start where another one was
        small = ["data.sequence_length=32", "data.vocab_size=512", "data.val_fraction=0.02"]
        small += ["model.config.hidden_size=64", "model.config.intermediate_size=128"]
        where = [f"data.path={text}", f"run_dir={folder}", "logger=none"]
        return run(compose("recipe=bert_mlm", "data=text_files", *small, *where, *overrides))

    return go


@pytest.fixture
def digits(compose: Any, tmp_path: Path) -> Go:
    """Train the small ViT on the digits; further overrides as on the command line."""

    def go(*overrides: str) -> float:
        folder = tmp_path / "digits"
        shutil.rmtree(folder, ignore_errors=True)
        return run(compose("recipe=image_classification", "logger=none", f"run_dir={folder}", *overrides))

    return go


def small_resnet(width: int) -> list[str]:
    sizes = [f"model.config.embedding_size={width}", f"model.config.hidden_sizes=[{width},{2 * width}]"]
    return ["model=resnet18", *sizes, "model.config.depths=[1,1]"]


class Losses(Callback):
    """Keeps the training loss of every step, the position of every sample, and the trainer."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.positions: list[int] = []
        self.trainer: Trainer | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        self.positions += batch["sample"].tolist()
        self.trainer = trainer


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Losses]:
    """A fresh observer of the next run."""
    import lion_lightning.training.run as run_module

    build = run_module.progress

    def attach() -> Losses:
        losses = Losses()
        monkeypatch.setattr(run_module, "progress", lambda *arguments: [losses, *build(*arguments)])
        return losses

    return attach


@pytest.mark.slow
def test_bert_gets_under_the_unigram_entropy_with_lion(bert: Go, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = ["model=bert_tiny", "model.config.intermediate_size=256"]
    optim = ["optim.lr=1e-3", "optim.betas=[0.9,0.99]", "optim.weight_decay=0.01"]
    best = bert(*model, *optim, "data.val_fraction=0.1", "trainer.max_steps=400", "trainer.val_check_interval=100")
    said = capsys.readouterr().out
    entropy = float(said.split("unigram entropy")[1].split()[0])
    assert best < entropy - 0.25, "a model that looks at no context gets to the entropy, no lower"
    for name in RUN_FILES:
        assert (tmp_path / "bert" / name).is_file(), name
    assert f"best val/loss  {best:.4f}" in said
    assert said.count("[MASK]") == 3


@pytest.mark.slow
def test_a_resnet_reads_digits_with_lion(digits: Go, tmp_path: Path) -> None:
    no_crop = "recipe.module.crop_padding=0"
    assert digits(*small_resnet(32), no_crop, "trainer.max_steps=200", "trainer.val_check_interval=50") > 0.9
    for name in RUN_FILES:
        assert (tmp_path / "digits" / name).is_file(), name


@pytest.mark.parametrize(
    "optim",
    ["lion", "adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("signum", "adafactor", "sgd", "muon"))],
)
def test_every_optimizer_lowers_the_loss_of_bert(bert: Go, watch: Callable[[], Losses], optim: str) -> None:
    seen = watch()
    bert(
        f"optim={optim}",
        "data.limit_train_samples=64",
        "trainer.max_steps=40",
        "trainer.val_check_interval=40",
        "export=false",
    )
    assert len(seen.losses) == 40
    assert sum(seen.losses[-5:]) / 5 < sum(seen.losses[:5]) / 5 - 0.02


def test_the_control_lowers_the_loss_on_digits(digits: Go, watch: Callable[[], Losses]) -> None:
    seen = watch()
    digits("optim=adamw", *small_resnet(16), "trainer.max_steps=40", "trainer.val_check_interval=40", "export=false")
    assert sum(seen.losses[-5:]) / 5 < sum(seen.losses[:5]) / 5 - 0.1


QUICK = ("data.batch_size=16", "trainer.val_check_interval=4", "export=false")


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_best_value_of_the_monitored_metric_is_returned(
    bert: Go, tmp_path: Path, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: list[float] = []
    compute = bert_module.BertMLM.on_validation_epoch_end

    def noted(module: Any) -> None:
        values.append(float(module.val_loss.compute()))
        compute(module)

    monkeypatch.setattr(bert_module.BertMLM, "on_validation_epoch_end", noted)
    best = bert("trainer.max_steps=10", f"schedule={schedule}", *QUICK)
    assert len(values) == 3, "every four steps, and at the end"
    assert best == pytest.approx(min(values), rel=1e-6)
    stored = torch.load(tmp_path / "bert/checkpoints/best.ckpt", weights_only=True)
    assert stored["global_step"] == (4, 8, 10)[values.index(min(values))]


def test_a_run_is_the_same_twice_and_differs_by_seed(bert: Go, watch: Callable[[], Losses]) -> None:
    losses = []
    for seed in (1, 1, 2):
        seen = watch()
        bert("trainer.max_steps=6", f"seed={seed}", *QUICK)
        losses.append(seen.losses)
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_without_a_logger_no_log_is_written_and_a_resumed_run_has_what_it_had(
    bert: Go, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bert("trainer.max_steps=2", *QUICK)
    assert sorted(entry.name for entry in (tmp_path / "bert").iterdir()) == ["checkpoints", "config.yaml", "guard.csv"]
    kept = OmegaConf.load(tmp_path / "bert/config.yaml")
    assert kept.trainer.max_steps == 2
    assert "${" not in (tmp_path / "bert/config.yaml").read_text(), "the configuration is kept resolved"
    checkpoint = tmp_path / "kept.ckpt"
    (tmp_path / "bert/checkpoints/last.ckpt").rename(checkpoint)
    changes = {
        "seed=2": "seed was 1 and is now 2",
        "optim.lr=1e-9": r"optim\.lr was 0\.\d+ and is now 1e-09",
        "optim.cautious_decay=true": r"optim\.cautious_decay was False and is now True",
        "data.batch_size=8": "effective batch size was 16 and is now 8",
    }
    for change, named in changes.items():
        with pytest.raises(ConfigError, match=rf"resume: {named}; a resumed run keeps what it was"):
            bert("trainer.max_steps=4", *QUICK, change, f"resume={checkpoint}")
    allowed = ("schedule.final=0.5", "trainer.gradient_clip_val=1.0")
    bert("trainer.max_steps=4", *QUICK, *allowed, f"resume={checkpoint}")
    assert (
        "resume: schedule.final was 0.0 and is now 0.5; trainer.gradient_clip_val was None and is now 1.0"
        in caplog.text
    )


def test_a_refused_resume_leaves_the_run_as_it_is(compose: Any, digits: Go, tmp_path: Path) -> None:
    digits("trainer.max_steps=4", *QUICK)
    files = [file for file in (tmp_path / "digits").rglob("*") if file.is_file()]
    kept = {file: file.read_bytes() for file in files}
    again = (
        "recipe=image_classification",
        f"run_dir={tmp_path / 'digits'}",
        "resume=auto",
        "trainer.max_steps=8",
        *QUICK,
    )
    for change in ("seed=2", "optim=adamw", "data.limit_train_samples=640", "model.config.num_hidden_layers=1"):
        with pytest.raises(ConfigError, match="resume"):
            run(compose(*again, change, "logger=wandb", "tuned=none"))
        assert {file: file.read_bytes() for file in files} == kept, change
        assert not (tmp_path / "digits/wandb").exists() or change not in ("seed=2", "optim=adamw")


def test_repeating_a_run_that_is_over_repairs_it_and_logs_nothing(compose: Any, digits: Go, tmp_path: Path) -> None:
    """A kill after the last checkpoint, while it was given its other names; `resume=auto` then exports the best."""
    folder = tmp_path / "digits"
    best = digits("trainer.max_steps=4", *QUICK[:-1])
    places = [folder / "checkpoints" / name for name in ("best.ckpt", "best.safetensors", "last.ckpt")]
    whole = {place: place.read_bytes() for place in places} | {folder / "export": None}
    for place in places:
        place.unlink()
        place.with_name(f"{place.name}.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "export")
    again = ("recipe=image_classification", f"run_dir={folder}", "resume=auto", "trainer.max_steps=4", *QUICK[:-1])
    wants_a_logger = "+callbacks.rate._target_=lightning.pytorch.callbacks.LearningRateMonitor"
    assert run(compose(*again, "logger=wandb", wants_a_logger)) == best
    assert all(place.exists() if kept is None else place.read_bytes() == kept for place, kept in whole.items())
    assert not (folder / "wandb").exists()


def test_micro_batches_make_one_optimizer_step(bert: Go, watch: Callable[[], Losses]) -> None:
    whole, parts = watch(), None
    bert("data.batch_size=16", "trainer.max_steps=4", "trainer.val_check_interval=2", "export=false")
    parts = watch()
    bert(
        "data.batch_size=4", "trainer.accumulate_grad_batches=4", "trainer.max_steps=4", "trainer.val_check_interval=2",
        "export=false",
    )  # fmt: skip
    assert parts.trainer is not None
    assert parts.trainer.global_step == 4
    assert parts.positions == whole.positions
    # Lightning has divided each by the number of micro-batches.
    sums = [sum(parts.losses[start : start + 4]) for start in range(0, 16, 4)]
    assert sums == pytest.approx(whole.losses, rel=2e-3)


def test_epochs_become_steps(digits: Go, watch: Callable[[], Losses], tmp_path: Path) -> None:
    seen = watch()
    folder = tmp_path / "not" / "there"  # `run_dir=` on the command line is not Hydra's folder, so nobody has made it
    short = ("data.limit_train_samples=100", "data.batch_size=32", "export=false")
    digits("trainer.max_epochs=2", *short, f"run_dir={folder}")
    assert (folder / "config.yaml").is_file()
    assert seen.trainer is not None
    assert seen.trainer.global_step == 7  # 200 samples in batches of 32
    assert len(seen.positions) == 7 * 32


def test_overfitting_sees_the_same_samples_again_and_again(bert: Go, watch: Callable[[], Losses]) -> None:
    seen = watch()
    bert("debug=overfit", "data.batch_size=8", "trainer.max_steps=5", "trainer.val_check_interval=5", "export=false")
    assert seen.trainer is not None
    assert seen.trainer.datamodule.num_train_samples == 8


@pytest.mark.parametrize(
    ("recipe", "precision"),
    [
        ("bert", "64-true"),
        pytest.param("bert", "bf16-mixed", marks=pytest.mark.slow),
        pytest.param("bert", "bf16-true", marks=pytest.mark.slow),
        pytest.param("digits", "bf16-mixed", marks=pytest.mark.slow),
    ],
)
def test_every_precision_trains(recipe: str, precision: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    go: Go = request.getfixturevalue(recipe)
    best = go(
        f"trainer.precision={precision}", "trainer.max_steps=2", "trainer.val_check_interval=2", "data.batch_size=16"
    )
    assert best == best, "not a number"
    weights = torch.load(tmp_path / recipe / "checkpoints/last.ckpt", weights_only=True)["state_dict"].values()
    kept = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    assert {weight.dtype for weight in weights if weight.is_floating_point()} == {kept}


@pytest.mark.parametrize("logger", ["csv", "tensorboard"])
def test_file_loggers_write_into_the_run_folder(bert: Go, tmp_path: Path, logger: str) -> None:
    bert(f"logger={logger}", "trainer.max_steps=4", "trainer.log_every_n_steps=2", *QUICK)
    folder = tmp_path / "bert"
    if logger == "csv":
        header = next(folder.rglob("metrics.csv")).read_text().splitlines()[0].split(",")
        assert {"train/loss", "val/loss", "val/perplexity", "val/accuracy", "data/unigram_entropy"} <= set(header)
    else:
        assert list(folder.rglob("events.out.tfevents.*"))
    assert not list(folder.rglob("wandb"))


def test_a_resumed_run_keeps_the_csv_that_it_had(compose: Any, tmp_path: Path) -> None:
    common = ["recipe=image_classification", "logger=csv", "export=false", f"run_dir={tmp_path}", "resume=auto"]
    common += ["trainer.log_every_n_steps=1", "trainer.val_check_interval=2"]
    for steps in (2, 4):
        run(compose(*common, f"trainer.max_steps={steps}"))
    logged = {}
    for file in tmp_path.rglob("metrics.csv"):
        with file.open() as lines:
            logged[file.parent.name] = {int(row["step"]) for row in csv.DictReader(lines) if row["train/loss"]}
    assert logged == {"csv": {0, 1}, "from-step-000000002": {2, 3}}
