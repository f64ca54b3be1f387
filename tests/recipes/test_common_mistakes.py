"""Mistakes that people make: the one line that answers names the setting, its value and what is allowed."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lion_lightning import Lion, LionGuard, LionMixin, from_adamw
from lion_lightning.__main__ import CONFIG_FOLDER, report_error
from lion_lightning.command_line import check_arguments

if TYPE_CHECKING:
    from conftest import Compose

IMAGES = ("recipe=image_classification",)
IMAGE_FILES = (*IMAGES, "data=image_files")
TEXT_FILES = ("data=text_files",)
TABLE = ("recipe=text_classification", "data=labeled_files")


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of every kind, for settings that want another."""
    folder = tmp_path_factory.mktemp("places")
    for name in ("empty", "texts", "images/a", "images/b", "run/export", "run/checkpoints"):
        (folder / name).mkdir(parents=True)
    (folder / "texts" / "one.txt").write_text("A short text.")
    (folder / "run" / "checkpoints" / "step-000000005.ckpt").touch()
    for place in ("a/0.png", "b/1.png"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "images" / place)
    rows = [f"text number {number},{number / 7:.4f}" for number in range(60)]
    (folder / "values.csv").write_text("\n".join(["text,label", *rows]))
    (folder / "renamed.csv").write_text("\n".join(["text,class", *rows]))
    return folder


@pytest.fixture
def answer(compose: Compose, places: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """The line and the exit code with which the command line answers to these arguments; PLACES is `places`."""
    from lion_lightning.training.run import run

    def call(given: list[str]) -> None:
        names = {argument.partition("=")[0] for argument in given}
        ours = [
            f"run_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}", "trainer.max_steps=1", "logger=none",
            "export=false",
        ]  # fmt: skip
        try:
            check_arguments(given, CONFIG_FOLDER)
            run(compose(*(setting for setting in ours if setting.partition("=")[0] not in names), *given))
        except Exception as error:
            report_error(error)

    def answered(*arguments: str) -> tuple[str, int]:
        with pytest.raises(SystemExit) as stopped:
            call([argument.replace("PLACES", str(places)) for argument in arguments])
        return capsys.readouterr().err.strip().splitlines()[-1], stopped.value.code

    return answered


SPELLING = {
    "optim=lyon": ("optim/lyon", "adamw", "did you mean lion?"),
    "model=modernbert": ("model/modernbert", "did you mean modernbert_tiny"),
    "trainer.max_step=100": ("trainer.max_step", "did you mean trainer.max_steps"),
    "optim.learning_rate=1e-3": ("optim.learning_rate", "did you mean optim.lr?"),
    "epochs=3": ("epochs", "did you mean trainer.max_epochs"),
    "optimizer=adamw": ("optimizer", "did you mean optim?"),
    "data.path=FOLDER": ("data.path", "the chosen data has no such setting", "text_files"),
    "data.task=cola": ("data.task", "these have it: data=glue"),
    "bert_mlm": ("bert_mlm: a setting is key=value", "did you mean recipe=bert_mlm?"),
    "optim.lr": ("optim.lr: a setting is key=value without spaces",),  # `optim.lr = 1e-3` is three arguments
    "optim.betas=[0.9,0.99": ("optim.betas=[0.9,0.99", "bracket"),
    "data.path=/a=b": ("data.path=/a=b", "quotes", """'data.path="/a=b"'"""),
}
NUMBERS = {
    "trainer.max_steps=0": ("trainer.max_steps", "at least 1", "0"),
    "trainer.max_steps=-1": ("trainer.max_steps", "at least 1", "-1"),
    "trainer.max_steps=many": ("trainer.max_steps", "whole number", "'many'"),
    "trainer.max_epochs=0": ("trainer.max_epochs", "above 0", "0"),
    "trainer.devices=two": ("trainer.devices=two", "1 to"),
    "trainer.devices=0": ("trainer.devices=0", "1 to"),
    "trainer.precision=16-true": ("trainer.precision", "bf16-true", "'16-true'"),
    "trainer.gradient_clip_val=-1": ("trainer.gradient_clip_val", "at least 0", "-1"),
    "trainer.gradient_clip_val=norm": ("trainer.gradient_clip_val", "at least 0", "'norm'"),
    "trainer.max_steps=true": ("trainer.max_steps", "whole number", "True"),
    "trainer.devices=true": ("trainer.devices=True", "1 to"),
    "trainer.deterministic=abc": ("trainer.deterministic", "true or false", "'abc'"),
    "trainer.timeout_minutes=-3": ("trainer.timeout_minutes", "above 0", "-3"),
    "trainer.check_replicas_every=often": ("trainer.check_replicas_every", "at least 0", "'often'"),
    "data.seed=abc": ("data.seed", "whole number", "'abc'"),
    "data.source.val_fraction=half": ("data.val_fraction", "between 0 and 1", "'half'"),
    "model.config.hidden_size=big": ("model.config", "hidden_size", "int", "'big'"),
    "model.config.hidden_size=-3": ("recipe.module", "-3"),
    "model.config.num_hidden_layers=-3": ("model.config.num_hidden_layers", "at least 0", "-3"),
    "model.config.hidden_dropout_prob=2": ("model.config.hidden_dropout_prob", "[0, 1)", "2"),
    "recipe.module.flip=maybe": ("recipe.module.flip", "true or false", "'maybe'"),
    "recipe.module.attention=true": ("recipe.module.attention", "sdpa", "True"),
    "recipe.module.randaugment_magnitude=strong": ("recipe.module.randaugment_magnitude", "[0, 30]", "'strong'"),
    "export=maybe": ("export", "true or false", "'maybe'"),
    "seed=abc": ("seed", "whole number", "'abc'"),
    "data.batch_size=0": ("data.batch_size", "at least 1", "0"),
    "data.batch_size=big": ("data.batch_size", "whole number", "'big'"),
    "data.batch_size=5000": ("5000", "1438", "lower data.batch_size"),
    "optim.lr=-1e-3": ("lr=-0.001", "0 or above"),
    "optim.lr=high": ("lr='high'", "0 or above"),
    "optim.betas=[1.0,0.99]": ("betas=(1.0, 0.99)", "two numbers in [0, 1)"),
    "optim.betas=0.9": ("betas=0.9", "two numbers in [0, 1)"),
    "optim.weight_decay=-1": ("weight_decay=-1", "0 or above"),
    "guard.warmup_steps=false": ("warmup_steps", "at least 0", "False"),
    "guard.warmup_steps=lots": ("warmup_steps", "at least 0", "'lots'"),
    "guard.on_divergence=rewind": ("on_divergence", "recover", "'rewind'"),
    "checkpoint.keep=0": ("keep", "at least 1", "0"),
    "recipe.mode=lower": ("mode", "min, max", "'lower'"),
}
PLACED = {
    (*IMAGE_FILES, "data.path=PLACES/empty"): ("data.path=", "no parquet file and no image", "0 on disk"),
    (*IMAGE_FILES, "data.path=PLACES/texts"): ("data.path=", "no parquet file and no image", "such as one.txt"),
    (*IMAGE_FILES, "data.path=PLACES/texts/one.txt"): ("one.txt is no .parquet file", "one folder of images per class"),
    (*IMAGE_FILES, "data.path=PLACES/nowhere"): ("data.path=", "no such file or folder"),
    (*TEXT_FILES, "data.path=PLACES/images"): ("data.path=", "no .txt or .md file", "such as a/0.png"),
    (*TEXT_FILES, "data.path=PLACES/images/a/0.png"): ("0.png is not UTF-8", "is it a text file?"),
    (*TEXT_FILES, "data.path=PLACES/texts"): ("fills no block", "give more text"),
    (*TABLE, "data.path=PLACES/texts"): ("data.path=", "no train* file", ".csv", "not used: no table, such as"),
    (*TABLE, "data.path=PLACES/values.csv"): ("only text of its class", "data.source.regression=true"),
    (*TABLE, "data.path=PLACES/renamed.csv"): ("no column label", "text, class", "data.source.label_column"),
    (*IMAGES, "model=bert_mini"): ("recipe=image_classification", "not bert", "try model=vit_micro"),
    (*IMAGES, "resume=PLACES/nowhere.ckpt"): ("nowhere.ckpt", "no such checkpoint file"),
    (*IMAGES, "resume=PLACES/run"): ("is the folder of a run", "resume=auto"),
    (*IMAGES, "resume=PLACES/empty"): ("holds no checkpoint",),
    (*IMAGES, "run_dir=PLACES/run"): ("holds checkpoints of a run", "resume=auto", "another run_dir="),
    (*IMAGES, "run_dir=PLACES/texts/one.txt/run"): ("one.txt", "Not a directory", "run_dir=FOLDER"),
    ("model.pretrained=PLACES/run",): ("cannot be opened", "run/export is one", "model.pretrained"),
    ("model.pretrained=PLACES/nowhere/at/all",): ("no such folder", "model.pretrained"),
}


@pytest.mark.parametrize("argument", SPELLING)
def test_a_misspelt_argument(answer: Any, argument: str) -> None:
    line, code = answer(argument)
    assert code == 2
    assert all(part in line for part in ("error: ", *SPELLING[argument])), line


@pytest.mark.parametrize("argument", NUMBERS)
def test_a_value_that_cannot_work(answer: Any, argument: str) -> None:
    line, code = answer(*IMAGES, argument)
    assert code == 2
    assert all(part in line for part in ("error: ", *NUMBERS[argument])), line


def test_a_rate_that_is_no_number(answer: Any) -> None:
    line, code = answer(*IMAGES, "optim=adamw", "optim.lr=true")
    assert code == 2
    assert "error: optim.lr must be a number, got True" in line


def test_an_option_of_the_second_optimizer_in_one(answer: Any) -> None:
    line, code = answer(*IMAGES, "optim=muon", "tuned=none", "optim.lion.betas=0.9")
    assert code == 2
    assert "optim: betas=0.9 is not allowed: use two numbers in [0, 1)" in line


@pytest.mark.parametrize("arguments", PLACED, ids=" ".join)
def test_a_path_or_a_choice_that_does_not_belong(answer: Any, arguments: tuple[str, ...]) -> None:
    line, code = answer(*arguments)
    assert code == 2
    assert all(part in line for part in ("error: ", *PLACED[arguments])), line


def test_half_precision_on_a_cpu(answer: Any) -> None:
    line, code = answer(*IMAGES, "trainer.accelerator=cpu", "trainer.precision=16-mixed")
    assert code == 2
    assert all(part in line for part in ("trainer.precision=16-mixed", "GPU", "bf16-mixed"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_rights(answer: Any, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    line, code = answer(*IMAGES, f"run_dir={tmp_path}/closed/run")
    assert code == 2
    assert "Permission denied" in line
    assert "run_dir=FOLDER" in line


def test_of_two_mistakes_one_is_told(answer: Any) -> None:
    assert "data.batch_size" in answer(*IMAGES, "optim.lr=-1", "data.batch_size=0")[0]


class Digits(LionMixin, LightningModule):
    """A module of one's own."""

    def __init__(self, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        super().__init__()
        self.optimizer_factory = partial(Lion, **{"lr": 1e-4, "weight_decay": 1.0, **options})
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).to(dtype)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def fitted(module: LightningModule, steps: int = 20, samples: int = 128) -> Trainer:
    """`module`, trained on noise on the CPU with the guard."""
    images, labels = torch.rand(samples, 64), torch.randint(10, (samples,))
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", callbacks=[LionGuard(warmup_steps=0.05)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(images, labels), batch_size=64))
    return trainer


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr": -1e-3}, ("lr=-0.001", "0 or above")),
        ({"lr": "1e-3"}, ("lr='1e-3'", "finite number")),
        ({"betas": (1.0, 0.99)}, (r"betas=\(1.0, 0.99\)", "two numbers")),
        ({"betas": 0.9}, ("betas=0.9", "two numbers")),
        ({"dtype": torch.float16}, ("float16", "bfloat16")),
    ],
)
def test_options_of_a_module_of_ones_own(options: dict[str, Any], named: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=".*".join(named)):
        fitted(Digits(**options))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lr": 0.0}, "lr=0: no weight will move"),
        ({"lr": 1e-3, "weight_decay": 0.01}, r"numbers for AdamW: Lion\(\*\*from_adamw"),
        ({"lr": 9e-2}, "far too high"),
    ],
)
def test_rates_that_train_badly_are_told_before_training(
    options: dict[str, Any], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    fitted(Digits(**options))
    findings = [record.message for record in caplog.records if "LionGuard, step 0" in record.message]
    assert re.search(told, findings[0])
    assert not [line for line in findings if "as good as none" in line and "lr=0" in line]


def test_a_right_module_is_trained_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    assert fitted(Digits()).global_step == 20
    assert not [record.message for record in caplog.records if "LionGuard" in record.message]


def test_the_rest_of_an_epoch_is_no_small_batch(caplog: pytest.LogCaptureFixture) -> None:
    fitted(Digits(), samples=128 + 5)
    assert not [record.message for record in caplog.records if "effective batch" in record.message]
    fitted(Digits(), samples=20)
    assert [record.message for record in caplog.records if "the effective batch is 20 samples" in record.message]


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_the_mixin_after_the_module_is_refused(package: str) -> None:
    module = pytest.importorskip(package).LightningModule
    with pytest.raises(TypeError, match="Behind has LightningModule before LionMixin"):
        type("Behind", (module, LionMixin), {})


def test_an_optimizer_factory_that_makes_nothing_is_refused() -> None:
    module = Digits()
    module.optimizer_factory = from_adamw(lr=1e-3)  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"optimizer_factory is a dict.*partial\(Lion, \*\*from_adamw"):
        fitted(module)


def test_a_rate_that_yaml_read_as_text() -> None:
    with pytest.raises(ValueError, match="lr must be a number, got the text '1e-3'"):
        from_adamw(lr="1e-3")  # type: ignore[arg-type]
