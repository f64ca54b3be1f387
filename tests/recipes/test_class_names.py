"""Classes are mapped by their names, file by file and split by split; what cannot be mapped is an error."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value

from lion_lightning.errors import ConfigError
from lion_lightning.recipes.image_classification.sources import ImageFiles
from lion_lightning.recipes.text_classification.sources import Glue, LabeledFiles
from tests.recipes.written_images import CLASSES, colors_agree, encoded, load, picture, write_parquet

BACKWARDS = ("owl", "dog", "cat")


def images(file: Path, names: list[str], declared: tuple[str, ...]) -> None:
    features = Features({"image": Image(), "label": ClassLabel(names=list(declared))})
    rows = {"image": [picture(name) for name in names], "label": [declared.index(name) for name in names]}
    Dataset.from_dict(rows, features=features).to_parquet(file)


def texts(file: Path, names: list[str], declared: tuple[str, ...] | None = CLASSES) -> Path:
    kind: Any = Value("int64") if declared is None else ClassLabel(names=list(declared))
    features = Features({"text": Value("string"), "label": kind})
    order = declared or CLASSES
    rows = {
        "text": [f"about a {name}, {n}" for n, name in enumerate(names)],
        "label": [order.index(name) for name in names],
    }
    Dataset.from_dict(rows, features=features).to_parquet(file)
    return file


def named(splits: Any) -> list[tuple[str, str]]:
    return [
        (text, splits.classes[label])
        for side in (splits.train, splits.val)
        for text, label in zip(side.texts, side.labels, strict=True)
    ]


@pytest.mark.parametrize("second", ["train-1.parquet", "validation.parquet"])
def test_image_files_that_number_the_classes_differently_keep_the_names(tmp_path: Path, second: str) -> None:
    images(tmp_path / "train-0.parquet", ["cat", "dog", "owl"] * 4, CLASSES)
    images(tmp_path / second, ["owl", "cat", "dog", "cat"], BACKWARDS)
    splits = load(tmp_path)
    assert splits.classes == CLASSES
    assert len(splits.train) + len(splits.val) == 16
    assert colors_agree(splits.train, CLASSES)
    assert colors_agree(splits.val, CLASSES)


def test_images_of_numbered_classes_have_them_in_their_order(tmp_path: Path) -> None:
    """A column of numbers with a hole is one of floats in pandas, and in CSV all are words."""
    names = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"]
    for name in names:
        (tmp_path / "folders" / name).mkdir(parents=True)
        picture("cat").save(tmp_path / "folders" / name / "0.png")
    numbers = pa.array([*map(float, names)] * 2)
    write_parquet(tmp_path / "train.parquet", [encoded(picture("cat"))] * len(numbers), numbers)
    assert list(load(tmp_path / "folders").classes) == names
    assert list(load(tmp_path / "train.parquet").classes) == names


def test_image_files_with_bare_numbers_beside_declared_names_are_refused(tmp_path: Path) -> None:
    images(tmp_path / "train.parquet", ["cat", "dog", "owl"] * 4, CLASSES)
    write_parquet(tmp_path / "validation.parquet", [encoded(picture("cat"))] * 4, pa.array([0, 1, 0, 1]))
    with pytest.raises(ConfigError, match="some files declare names for the numbers of their classes"):
        load(tmp_path)


def test_images_of_one_class_are_refused(tmp_path: Path) -> None:
    images(tmp_path / "train.parquet", ["cat"] * 6, CLASSES)
    with pytest.raises(ConfigError, match=r"all \d training images have the class 'cat'; two are needed"):
        load(tmp_path)


@pytest.mark.parametrize("second", ["train-1.parquet", "validation.parquet"])
def test_text_files_that_number_the_classes_differently_keep_the_names(tmp_path: Path, second: str) -> None:
    texts(tmp_path / "train-0.parquet", ["cat", "dog", "owl"] * 20)
    texts(tmp_path / second, ["owl", "cat", "dog", "cat"], BACKWARDS)
    splits = LabeledFiles(str(tmp_path), val_fraction=0.5).load()
    assert splits.classes == CLASSES
    assert len(named(splits)) == 64
    assert all(text.startswith(f"about a {name},") for text, name in named(splits))


def test_a_text_file_with_bare_numbers_beside_declared_names_is_refused(tmp_path: Path) -> None:
    texts(tmp_path / "train-0.parquet", ["cat", "dog", "owl"] * 4)
    texts(tmp_path / "train-1.parquet", ["cat", "dog"], None)
    texts(tmp_path / "validation.parquet", ["cat", "dog"])
    with pytest.raises(ConfigError, match=r"1 training rows have the label '0', none of the names that other"):
        LabeledFiles(str(tmp_path)).load()


def test_splits_of_a_glue_task_are_mapped_by_name(tmp_path: Path) -> None:
    for split, names in (("train", CLASSES[:2]), ("validation", CLASSES[1::-1])):
        features = Features({"sentence": Value("string"), "label": ClassLabel(names=list(names))})
        rows = {"sentence": [f"about a {name}" for name in names], "label": [0, 1]}
        (tmp_path / "cola").mkdir(exist_ok=True)
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "cola" / f"{split}-0.parquet")
    splits = Glue("cola", str(tmp_path)).load()
    assert [splits.classes[label] for label in splits.val.labels] == ["dog", "cat"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["pos", "pos ", "neg"], r"the labels 'pos' \(2 times\) and 'pos ' \(2 times\) differ only in spaces"),
        (["1", "①", "2"], r"the labels '1' \(2 times\) and '①' \(2 times\) differ only"),
        (["1", "01", "2"], r"the labels '1' \(2 times\) and '01' \(2 times\) differ only"),
        ([["pos"], "neg", "neg"], r"row 1 of train has the label \['pos'\], a list; a class is one word or number"),
        (
            [{"is": "pos"}, "neg"],
            r"row 1 of train has the label \{'is': 'pos'\}, a dict; a class is",
        ),
        (["pos", "pos"], r"all 2 training rows have the label 'pos'; two classes are needed"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_one_message(tmp_path: Path, labels: list[Any], message: str) -> None:
    file = tmp_path / "table.jsonl"
    file.write_text("".join(json.dumps({"text": "some words", "label": label}) + "\n" for label in labels))
    with pytest.raises(ConfigError, match=message) as caught:
        LabeledFiles(str(file), str(file)).load()
    assert len(str(caught.value).splitlines()) == 1


def test_digits_of_other_scripts_are_names(tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_text("text,label\na,②\nb,①\nc,10\nd,9\n")
    assert LabeledFiles(str(file), str(file)).load().classes == ("9", "10", "①", "②")


def test_image_labels_that_differ_in_spaces_are_one_message(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [encoded(picture("cat"))] * 6, pa.array(["cat", "cat ", "dog"] * 2))
    with pytest.raises(ConfigError, match=r"'cat' \(2 times\) and 'cat ' \(2 times\) differ only in spaces"):
        ImageFiles(str(tmp_path)).open()
