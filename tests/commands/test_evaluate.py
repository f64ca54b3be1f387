"""`mode=eval` gives what the run's validation gave; `mode=predict` gives an answer or a reason for every input."""

import contextlib
import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from omegaconf import DictConfig
from PIL import Image
from transformers import AutoModelForImageClassification, CLIPImageProcessorPil

from lion_lightning.__main__ import runner
from lion_lightning.command_line import run_folder, text_of
from lion_lightning.commands.evaluate import evaluate
from lion_lightning.commands.predict import predict
from lion_lightning.errors import ConfigError
from lion_lightning.recipes.image_classification.airbench import AirbenchConfig
from lion_lightning.recipes.image_classification.cifar_resnet import CifarResNetConfig
from lion_lightning.recipes.image_classification.module import ImageClassifier
from lion_lightning.training.run import run
from tests.processes import run_python

Compose = Callable[..., DictConfig]


@pytest.fixture(scope="module")
def digits(compose: Compose, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The folder of a short run on the digits, and its best top-1."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    short = ["trainer.max_steps=40", "trainer.val_check_interval=20", "logger=none", f"run_dir={folder}"]
    return folder, run(compose("recipe=image_classification", *short))


@pytest.fixture(scope="module")
def masked(compose: Compose, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a shorter run of a smaller BERT."""
    folder = tmp_path_factory.mktemp("runs") / "bert"
    text = tmp_path_factory.mktemp("text") / "words.txt"
    text.write_text("\n\n".join(f"the cat number {n} sat on mat {n % 7} and slept" for n in range(2000)))
    small = ["data.sequence_length=32", "data.vocab_size=300", "model.config.hidden_size=32", "data.batch_size=8"]
    short = ["trainer.max_steps=3", "logger=none", f"run_dir={folder}", f"data.path={text}"]
    run(compose("recipe=bert_mlm", "data=text_files", "model.config.intermediate_size=64", *small, *short))
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    with (folder / "predictions.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_eval_is_the_best_validation_of_the_run(
    compose: Compose, digits: tuple[Path, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, best = digits
    assert evaluate(compose(f"ckpt={folder}", f"run_dir={tmp_path}")) == best
    kept = json.loads((tmp_path / "eval.json").read_text())
    assert kept["val/top1"] == best
    assert "best.ckpt" in kept["ckpt"]
    assert f"{best:.4f}" in capsys.readouterr().out
    last = folder / "checkpoints" / "last.ckpt"
    assert evaluate(compose(f"ckpt={last}", f"run_dir={tmp_path}")) <= best


def test_eval_on_the_command_line_takes_the_runs_configuration(
    digits: tuple[Path, float], root: Path, tmp_path: Path
) -> None:
    folder, best = digits
    answer = evaluated(root, tmp_path, f"ckpt={folder}")
    assert answer.returncode == 0, answer.stderr
    (kept,) = tmp_path.glob("outputs/eval/*/eval.json")
    assert json.loads(kept.read_text())["val/top1"] == pytest.approx(best)


def test_every_file_of_a_folder_is_predicted_or_told(
    compose: Compose, digits: tuple[Path, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, draw = tmp_path / "pictures", np.random.default_rng(0)
    (pictures / "deeper").mkdir(parents=True)
    for number in range(40):
        pixels = draw.integers(0, 256, (8 + number, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / ("deeper" if number % 2 else "") / f"{number}.png")
    (pictures / "broken.png").write_bytes((pictures / "0.png").read_bytes()[:60])
    (pictures / "notes.txt").write_text("no picture")
    share = predict(compose(f"ckpt={digits[0]}", f"input={pictures}", f"run_dir={tmp_path}"))
    rows = rows_of(tmp_path)
    assert len(rows) == 42
    assert share == pytest.approx(40 / 42)
    assert {Path(row["input"]).name for row in rows if "error" in row} == {"broken.png", "notes.txt"}
    assert "42: 40 predicted, 2 could not be used" in capsys.readouterr().out
    # The same from the export, without the training data.
    predict(compose(f"ckpt={digits[0] / 'export'}", f"input={pictures / '0.png'}", f"run_dir={tmp_path}"))
    (one,) = rows_of(tmp_path)
    same = next(row for row in rows if row["input"] == one["input"])
    assert one["label"] == same["label"]
    assert one["score"] == pytest.approx(same["score"], abs=1e-6)


@pytest.mark.parametrize("ending", ["txt", "csv", "jsonl", "parquet"])
def test_texts_of_every_format_are_predicted_in_order(
    compose: Compose, masked: Path, tmp_path: Path, ending: str
) -> None:
    texts = [f"the {'[MASK]' if n % 5 else 'cat'} number {n} sat on [MASK]" for n in range(70)]
    texts[3], texts[4], file = "no mask", "", tmp_path / f"texts.{ending}"
    texts[5] = "cat " * 600 + "[MASK]"
    if ending != "txt":  # words that another reader takes for a missing value
        texts[6] = "NA"
    table = Dataset.from_dict({"text": texts})
    if ending == "txt":
        file.write_text("\n".join(texts))
    else:
        {"csv": table.to_csv, "jsonl": table.to_json, "parquet": table.to_parquet}[ending](str(file))  # type: ignore[operator]
    share = predict(compose(f"ckpt={masked}", f"input={file}", f"run_dir={tmp_path}"))
    rows = rows_of(tmp_path)
    told = ["has no [MASK]", "row 5 has no text", "is longer than 32 tokens, and a [MASK] is cut off"]
    told += ["has no [MASK]"] * (ending != "txt")
    assert [row["error"] for row in rows if "error" in row] == told
    assert share == pytest.approx((70 - len(told)) / 70)
    assert [row["input"] for row in rows if "fills" in row] == [
        text for text in texts if "[MASK]" in text and len(text) < 100
    ]
    assert all(len(row["fills"]) == row["input"].count("[MASK]") for row in rows if "fills" in row)


def test_a_line_ends_where_an_editor_ends_it(compose: Compose, masked: Path, tmp_path: Path) -> None:
    lines = ["the [MASK] sat", "the\u2028[MASK]\x0csat\x85on", "", "cat [MASK]"]
    (tmp_path / "lines.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    predict(compose(f"ckpt={masked}", f"input={tmp_path / 'lines.txt'}", f"run_dir={tmp_path}"))
    assert [row["input"] for row in rows_of(tmp_path)] == lines


@pytest.mark.skipif(sys.platform != "linux", reason="names are UTF-8 elsewhere")
def test_a_picture_whose_name_is_not_utf8_is_predicted(
    compose: Compose, digits: tuple[Path, float], tmp_path: Path
) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    for name in (b"caf\xe9.png", b"b.png"):
        shutil.copy(tmp_path / "one.png", os.fsencode(tmp_path / "pictures") + b"/" + name)
    assert predict(compose(f"ckpt={digits[0]}", f"input={tmp_path / 'pictures'}", f"run_dir={tmp_path}")) == 1
    assert [Path(row["input"]).name for row in rows_of(tmp_path)] == ["b.png", "caf\\udce9.png"]


def test_what_turns_out_unreadable_leaves_no_predictions_that_seem_whole(
    compose: Compose, masked: Path, tmp_path: Path
) -> None:
    file, out = tmp_path / "late.txt", tmp_path / "out"
    file.write_bytes(b"the [MASK] sat\n" * 2000 + b"caf\xe9")
    out.mkdir()
    (out / "predictions.jsonl").write_text("of an earlier input")
    with pytest.raises(ConfigError, match=r"late.txt is not UTF-8 \(byte 0xe9\); it looks like .*iconv"):
        predict(compose(f"ckpt={masked}", f"input={file}", f"run_dir={out}"))
    assert len((out / "predictions.unfinished").read_text().splitlines()) > 100
    assert not (out / "predictions.jsonl").exists()


def test_a_checkpoint_is_exported_once(
    compose: Compose, digits: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []
    export = ImageClassifier.export
    spied = lambda self, *given: (folders.append(given[0]), export(self, *given))  # noqa: E731
    monkeypatch.setattr(ImageClassifier, "export", spied)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    last = digits[0] / "checkpoints" / "last.ckpt"
    assert predict(compose(f"ckpt={last}", f"input={tmp_path / 'a.png'}", f"run_dir={tmp_path}")) == 1
    assert len(folders) == 1


@pytest.mark.parametrize("text", ["the [MASK] sat", "the [MASK] number 7 sat on [MASK]"])
def test_one_text_is_predicted_too(compose: Compose, masked: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "one.txt").write_text(text)
    assert predict(compose(f"ckpt={masked}", f"input={tmp_path / 'one.txt'}", f"run_dir={tmp_path}")) == 1
    (row,) = rows_of(tmp_path)
    assert [len(fill) for fill in row["fills"]] == [5] * text.count("[MASK]")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ([], "need ckpt=PATH"),
        (["ckpt=/nowhere"], "ckpt=/nowhere: there is no such"),
        (["ckpt=https://host/x.ckpt"], "not a URL"),
        (["ckpt={folder}"], "holds no run"),
        (["ckpt={folder}/damaged.ckpt", "input={folder}/texts.txt"], "damaged.ckpt"),
        (["ckpt={run}"], "needs input=PATH"),
        (["ckpt={run}", "input=/nowhere"], "input=/nowhere: there is no such"),
        (["ckpt={run}", "input={folder}/texts.pdf"], r"\.txt, \.csv"),
        (["ckpt={run}", "input={folder}/other.csv"], "no column text; there are a, b"),
        (["ckpt={run}", "input={folder}/twice.csv"], "there are several columns text; there are text, text"),
        (["ckpt={run}", "input={folder}/torn.parquet"], "torn.parquet"),
        (["ckpt={run}", "input={folder}/bad.csv.gz"], "bad.csv.gz cannot be read: .*while decompressing"),
    ],
)
def test_what_cannot_be_predicted_is_one_error(
    compose: Compose, masked: Path, tmp_path: Path, settings: list[str], told: str
) -> None:
    (tmp_path / "damaged.ckpt").write_bytes(b"no checkpoint")
    (tmp_path / "texts.pdf").write_bytes(b"%PDF")
    (tmp_path / "texts.txt").write_text("the [MASK]")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "twice.csv").write_text("text,text\n1,2\n")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    (tmp_path / "bad.csv.gz").write_bytes(gzip.compress(b"text")[:10] + b"\xff" * 99)
    given = [setting.format(folder=tmp_path, run=masked) for setting in settings]
    with pytest.raises(ConfigError, match=told) as error:
        predict(compose(*given, f"run_dir={tmp_path}/out", "trainer.max_steps=1"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "predictions.jsonl").exists()


def test_a_checkpoint_of_another_model_is_refused(compose: Compose, digits: tuple[Path, float], tmp_path: Path) -> None:
    folder = tmp_path / "moved"
    (folder / "checkpoints").mkdir(parents=True)
    wrong = {"state_dict": {"model.other": torch.ones(2)}, "global_step": 1}
    torch.save(wrong, folder / "checkpoints" / "best.ckpt")
    os.link(digits[0] / "config.yaml", folder / "config.yaml")
    with pytest.raises(ConfigError, match=r"ckpt=.*does not fit"):
        evaluate(compose(f"ckpt={folder}", f"run_dir={tmp_path}"))


def evaluated(root: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run_python([str(root / "train.py"), "mode=eval", *words], folder)


@pytest.fixture(scope="module")
def pictures(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run of the command line on a folder of pictures, whose path another key refers to; and its settings."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for place in ("first", "second"):
        for number in range(60):
            target = folder / place / ("dark", "light")[number % 2]
            target.mkdir(parents=True, exist_ok=True)
            level = 200 * (number % 2)
            pixels = draw.integers(level, level + 50, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(target / f"{number}.png")
    settings = ["recipe=image_classification", "data=image_files", "data.path=first", "data.image_size=8"]
    settings += ["data.limit_train_samples=40", "data.batch_size=8"]
    more = ["trainer.max_steps=4", "trainer.val_check_interval=2", "logger=none", "run_dir=run"]
    answer = run_python([str(root / "train.py"), *settings, *more], folder)
    assert answer.returncode == 0, answer.stderr
    return folder, settings


FIRST_START = """
import sys
from lion_lightning.__main__ import main
sys.argv = ["lion-train", "data=text_files", "data.path=/nowhere"]
try:
    main()
except SystemExit as stop:
    print(stop.code, file=sys.stderr)
sys.argv = ["lion-train", "mode=predict", "ckpt=export", "input=picture.png", "run_dir=out"]
main()
"""


@pytest.mark.parametrize("net", ["airbench", pytest.param("cifar_resnet", marks=pytest.mark.slow)])
def test_what_a_process_that_has_imported_nothing_does(net: str, root: Path, tmp_path: Path) -> None:
    """Beside a package `recipes` of somebody else, on a machine that matplotlib does not know yet.

    A mistake is one line, and an export of a net of this project opens, though transformers does not know it by itself.
    """
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "__init__.py").write_text("raise RuntimeError('not this one')\n")
    configs = {
        "airbench": AirbenchConfig(widths=[24, 24, 24], num_labels=2),
        "cifar_resnet": CifarResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=2),
    }
    AutoModelForImageClassification.from_config(configs[net]).save_pretrained(tmp_path / "export")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path / "export")
    Image.new("RGB", (40, 32)).save(tmp_path / "picture.png")
    environment = {**os.environ, "PYTHONPATH": str(root), "MPLCONFIGDIR": str(tmp_path / "fonts")}
    answer = subprocess.run(
        [sys.executable, "-c", FIRST_START], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert answer.returncode == 0, answer.stderr
    line, code, *_ = answer.stderr.splitlines()
    assert line.startswith("error: data.path=/nowhere: there is no such file or folder")
    assert code == "2"
    (row,) = rows_of(tmp_path / "out")
    assert row["label"].startswith("LABEL_")


def test_a_new_path_reaches_every_key_that_refers_to_it(pictures: tuple[Path, list[str]], root: Path) -> None:
    folder, _ = pictures
    answer = evaluated(root, folder, "ckpt=run", "data.path=nowhere")
    assert answer.returncode == 2
    assert "data.path=nowhere" in answer.stderr
    answer = evaluated(
        root, folder, "ckpt=run", "data.path=second", "data.limit_train_samples=null", "--config-dir", "."
    )
    assert answer.returncode == 0, answer.stderr
    assert "on image_files" in answer.stdout
    other = evaluated(root, folder, "ckpt=run", "recipe=cifar10")
    assert other.returncode == 2
    assert "error: recipe=cifar10: ckpt=" in other.stderr


@contextlib.contextmanager
def renamed(place: Path, name: str) -> Iterator[None]:
    """`place` has another name for a while."""
    moved = place.rename(place.with_name(name))
    try:
        yield
    finally:
        moved.rename(place)


@pytest.mark.parametrize("quoted", ["'~/{}'", '"~/{}"'])
def test_a_run_below_the_home_folder_keeps_its_settings(
    pictures: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, quoted: str
) -> None:
    folder = pictures[0] / "run"
    monkeypatch.setenv("HOME", str(folder.parent))
    assert run_folder(text_of(f"ckpt={quoted.format(folder.name)}")) == folder.resolve()


def test_settings_of_a_run_without_its_command_line_cannot_change(pictures: tuple[Path, list[str]], root: Path) -> None:
    folder, _ = pictures
    with renamed(folder / "run" / "overrides.yaml", "away.yaml"):
        answer = evaluated(root, folder, "ckpt=run", "data.batch_size=4")
        assert answer.returncode == 2
        assert "data.batch_size=4: " in answer.stderr
        assert "lacks overrides.yaml" in answer.stderr
        assert evaluated(root, folder, "ckpt=run").returncode == 0


def test_data_with_other_classes_is_refused(pictures: tuple[Path, list[str]], root: Path) -> None:
    folder, _ = pictures
    with renamed(folder / "second" / "dark", "dusky"):
        answer = evaluated(root, folder, "ckpt=run", "data.path=second")
        assert answer.returncode == 2
        assert "other classes than the run had" in answer.stderr


@pytest.mark.parametrize(
    ("damage", "told"),
    [("[1, 2]", "is not the configuration of a run"), ("a: [", "cannot be read"), ("a: 1", "is not the configuration")],
)
def test_a_foreign_configuration_is_one_line(
    compose: Compose, digits: tuple[Path, float], tmp_path: Path, damage: str, told: str
) -> None:
    (tmp_path / "config.yaml").write_text(damage)
    os.link(digits[0] / "checkpoints" / "best.ckpt", tmp_path / "best.ckpt")
    with pytest.raises(ConfigError, match=told):
        evaluate(compose(f"ckpt={tmp_path / 'best.ckpt'}", f"run_dir={tmp_path}"))


def test_a_checkpoint_far_from_its_run_asks_for_the_run(
    compose: Compose, digits: tuple[Path, float], tmp_path: Path
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    os.link(digits[0] / "checkpoints" / "best.ckpt", tmp_path / "a" / "b" / "best.ckpt")
    with pytest.raises(ConfigError, match="give the folder of its run"):
        evaluate(compose(f"ckpt={tmp_path / 'a' / 'b' / 'best.ckpt'}", f"run_dir={tmp_path}"))


def test_code_beside_an_export_is_never_run(compose: Compose, masked: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    shutil.copytree(masked / "export", folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForMaskedLM": "own.Own"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "t.txt").write_text("the [MASK] sat")
    with pytest.raises(ConfigError, match="no export that can be opened"):
        predict(compose(f"ckpt={folder}", f"input={tmp_path / 't.txt'}", f"run_dir={tmp_path}"))
    assert not (tmp_path / "ran").exists()


def test_brackets_in_a_text_are_shown_as_they_are(
    compose: Compose, masked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "[a].txt"
    file.write_text("[/quote] the [red] cat [MASK]")
    assert predict(compose(f"ckpt={masked}", f"input='{file}'", f"run_dir={tmp_path}")) == 1
    assert "[/quote] the [red] cat [MASK]" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ckpt", "input"])
def test_settings_of_another_mode_do_not_start_a_training(compose: Compose, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=RUN belongs to mode=eval"):
        runner(compose(f"{name}=RUN"))
