"""Labeled text from tables and GLUE: what is read is what was written, and what is wrong is told or counted."""

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from lion_lightning.errors import ConfigError
from lion_lightning.recipes.tables import Row
from lion_lightning.recipes.text.corpus import is_held_out
from lion_lightning.recipes.text_classification.labels import label_splits
from lion_lightning.recipes.text_classification.sources import Glue, LabeledFiles, PythonPackages

ROWS = [
    ("a film, worth seeing", "good"),
    ('"quoted", he said', "good"),
    ("two\nlines", "bad"),
    ("zwölf Boxkämpfer", "bad"),
    ("null", "good"),
    ("NA", "bad"),
]


def write_csv(file: Path, rows: Any, header: tuple[str, ...] = ("text", "label")) -> Path:
    with file.open("w", encoding="utf-8", newline="") as opened:
        csv.writer(opened).writerows([header, *rows])
    return file


def write_tsv(file: Path, rows: Any) -> Path:
    lines = ["text\tlabel", *(f"{text.replace(chr(10), ' ')}\t{label}" for text, label in rows)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def write_jsonl(file: Path, rows: Any) -> Path:
    file.write_text("".join(json.dumps({"text": text, "label": label}) + "\n\n" for text, label in rows))
    return file


def write_parquet(file: Path, rows: Any) -> Path:
    Dataset.from_dict({"text": [text for text, _ in rows], "label": [label for _, label in rows]}).to_parquet(file)
    return file


WRITERS: dict[str, Callable[[Path, Any], Path]] = {
    "csv": write_csv, "tsv": write_tsv, "jsonl": write_jsonl, "parquet": write_parquet
}  # fmt: skip


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_table_is_read_as_it_was_written(suffix: str, tmp_path: Path) -> None:
    train = WRITERS[suffix](tmp_path / f"train.{suffix}", ROWS)
    splits = LabeledFiles(str(train), val_path=str(train)).load()
    expected = [text.replace("\n", " ") if suffix == "tsv" else text for text, _ in ROWS]
    assert splits.train.texts == splits.val.texts == expected
    assert splits.classes == ("bad", "good")
    assert splits.train.labels == [1, 1, 0, 0, 1, 0]
    assert not splits.left_out


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(suffix: str, tmp_path: Path) -> None:
    train = WRITERS[suffix](tmp_path / f"train.{suffix}", ROWS)
    plain = LabeledFiles(str(train), val_path=str(train)).load()
    train.write_bytes(b"\xef\xbb\xbf" + train.read_bytes())
    assert LabeledFiles(str(train), val_path=str(train)).load() == plain


def test_the_names_of_classes_that_a_parquet_file_declares_are_kept(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["spam", "ham"])})
    columns = {"text": ["buy now", "see you", "free"], "label": [0, 1, 0]}
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "mail.parquet")
    mail = str(tmp_path / "mail.parquet")
    splits = LabeledFiles(mail, val_path=mail).load()
    assert splits.classes == ("spam", "ham")
    assert splits.train.labels == [0, 1, 0]


def test_a_folder_says_by_its_names_what_is_validation(tmp_path: Path) -> None:
    write_csv(tmp_path / "train-1.csv", ROWS[:3])
    write_csv(tmp_path / "train-2.csv", ROWS[3:])
    write_csv(tmp_path / "dev.csv", ROWS[:2])
    write_csv(tmp_path / "test.csv", [("secret", "")])
    for name in ("trainers", "values", "developers"):  # words that only begin like those
        write_csv(tmp_path / f"{name}.csv", [("another table", "good")])
    splits = LabeledFiles(str(tmp_path)).load()
    assert (len(splits.train), len(splits.val)) == (6, 2)


def test_without_a_validation_file_a_share_is_held_out_and_copies_stay_together(tmp_path: Path) -> None:
    rows = [(f"text {number % 200}", number % 2) for number in range(1000)]
    splits = LabeledFiles(str(write_csv(tmp_path / "all.csv", rows)), val_fraction=0.25).load()
    assert len(splits.train) + len(splits.val) == 1000
    assert 150 < len(splits.val) < 350
    assert not set(splits.train.texts) & set(splits.val.texts)
    assert splits.classes == ("0", "1")


def test_of_a_few_rows_one_is_held_out(tmp_path: Path) -> None:
    for count in (3, 4, 5):
        rows = [("alone", "z"), *[(f"text {number}", "x") for number in range(count - 1)]]
        splits = LabeledFiles(str(write_csv(tmp_path / f"{count}.csv", rows)), val_fraction=1e-6).load()
        assert (len(splits.train), len(splits.val)) == (count - 1, 1)
        assert "alone" in splits.train.texts
    values = write_csv(tmp_path / "values.csv", [("a", "0.5"), ("b", "4.75")])
    splits = LabeledFiles(str(values), regression=True, val_fraction=1e-6).load()
    assert (len(splits.train), len(splits.val)) == (1, 1)
    alone = str(write_csv(tmp_path / "alone.csv", [("a", "x"), ("b", "y"), ("", "y")]))
    with pytest.raises(ConfigError, match=r"none of the 2 usable rows can be held out .* data\.val_path="):
        LabeledFiles(alone).load()


def test_a_class_that_chance_would_hold_out_whole_is_kept(tmp_path: Path) -> None:
    rows = [(f"text {number}", f"class {number // 2}") for number in range(400)]
    file = str(write_csv(tmp_path / "rare.csv", rows))
    splits = LabeledFiles(file, val_fraction=0.5).load()
    assert len(splits.classes) == 200
    assert set(splits.val.labels) < set(splits.train.labels)
    held = {text for text, _ in rows if is_held_out(text, 0.5)}
    assert set(splits.val.texts) < held
    assert len(splits.val) > 60
    assert len(splits.train) + len(splits.val) == 400


def test_pairs_have_two_texts(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "pairs.csv", [("a", "b", 0), ("c", "d", 1), ("e", "", 1)], ("one", "two", "same"))
    source = LabeledFiles(str(file), str(file), text_column="one", second_text_column="two", label_column="same")
    splits = source.load()
    assert (splits.train.texts, splits.train.seconds) == (["a", "c"], ["b", "d"])
    assert splits.left_out == {"an empty text": 2}


def test_values_are_kept_as_they_are(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "values.csv", [("a", "0.5"), ("b", "4.75")])
    splits = LabeledFiles(str(file), str(file), regression=True).load()
    assert splits.train.labels == [0.5, 4.75]
    assert splits.classes == ()


def test_numbered_classes_are_ordered_as_numbers_and_holes_make_no_new_ones() -> None:
    rows = [Row("a", None, 10.0, 1), Row("b", None, 2, 2), Row("c", None, float("nan"), 3), Row("d", None, "2", 4)]
    splits = label_splits(rows, rows)
    assert splits.classes == ("2", "10")
    assert splits.train.labels == [1, 0, 0]
    assert splits.left_out == {"no label": 2}


def test_rows_with_holes_are_counted_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "holes.csv"
    file.write_text("text,label\na,x\nb,\n,y\nc,y\n  ,x\nd\ne,x,surplus\n")
    with caplog.at_level(logging.WARNING):
        splits = LabeledFiles(str(file), str(file)).load()
    assert splits.train.texts == ["a", "c"]
    assert splits.left_out == {"no label": 6, "an empty text": 4}
    assert "10 rows are left out: 6 with no label, 4 with an empty text" in caplog.text


@pytest.mark.parametrize(
    ("content", "options", "told"),
    [
        ("text,class\na,x\n", {}, r"there is no column label; there are text, class"),
        ("text,label,text\na,x,b\n", {}, r"several columns have the name text; there are text, label, text"),
        ("", {}, r"there is no column text, label; there are none"),
        ("text,label\na,x\nb,\n,x\n", {"max_left_out": 1}, r"over 1 rows cannot be used .*row 3 of train"),
        ("text,label\na,\nb,\n", {}, r"the train split has no usable row \(left out: 4 with no label\)"),
        ("text,label\na,x\nb,x\n", {}, r"all 2 training rows have the label 'x'; two classes are needed"),
        ("text,label\na,x\nb,2\n", {"regression": True}, r"must be a number: row 1 of train has 'x'"),
        ("text,label\na,1\nb,1_5\n", {"regression": True}, r"must be a number: row 2 of train has '1_5'"),
        ("text,label\n" + "".join(f"a,{n}.5\n" for n in range(1200)), {}, r"1,200 different labels .*regression=true"),
    ],
)
def test_a_table_that_cannot_be_learned_from_is_told_in_a_line(
    tmp_path: Path, content: str, options: dict[str, Any], told: str
) -> None:
    file = tmp_path / "table.csv"
    file.write_text(content)
    with pytest.raises(ConfigError, match=told) as caught:
        LabeledFiles(str(file), str(file), **options).load()
    assert len(str(caught.value).splitlines()) == 1


def test_a_class_that_only_validation_has_is_named(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "train.csv", [("a", "x"), ("b", "y")])
    val = write_csv(tmp_path / "val.csv", [("a", "x"), ("b", "z"), ("c", "z")])
    with pytest.raises(ConfigError, match=r"1 labels of validation are in no training row: 'z' \(2 rows\)"):
        LabeledFiles(str(train), str(val)).load()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("latin.csv", "text,label\ncaf\xe9,x\n".encode("latin-1"), r"latin.csv is not UTF-8 \(byte 0xe9"),
        ("latin.jsonl", '{"text": "caf\xe9", "label": 1}'.encode("latin-1"), r"latin.jsonl is not UTF-8"),
        (
            "long.csv",
            b"text,label\n" + b"a" * (2**24 + 1) + b",x\n",
            r"long.csv: the row that begins in line 2 is not CSV \(field larger",
        ),
        ("torn.jsonl", b'{"text": "a", "label": 1}\n{"text": ', r"torn.jsonl, line 2 is no JSON"),
        ("list.jsonl", b'["a", 1]\n', r"line 1 must be an object"),
        ("torn.parquet", b"PAR1 and no more", r"torn.parquet cannot be read"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=told) as caught:
        LabeledFiles(str(tmp_path / name)).load()
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (None, "needs data.path="),
        ("/nowhere.csv", "there is no such file"),
        ("FOLDER", "no train"),
        ("notes.doc", "must be"),
    ],
)
def test_a_path_that_cannot_be_is_named(tmp_path: Path, path: str | None, told: str) -> None:
    (tmp_path / "notes.doc").touch()
    place = {"FOLDER": str(tmp_path), "notes.doc": str(tmp_path / "notes.doc")}.get(path or "", path)
    with pytest.raises(ConfigError, match=told):
        LabeledFiles(place)


def test_another_validation_file_has_another_fingerprint(tmp_path: Path) -> None:
    tables = [str(write_csv(tmp_path / f"{name}.csv", ROWS[:count])) for name, count in (("a", 6), ("b", 5), ("c", 4))]
    prints = [LabeledFiles(tables[0], val).fingerprint() for val in (None, *tables[1:])]
    assert len(set(prints)) == 3


def test_a_changed_table_has_another_fingerprint(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "table.csv", ROWS)
    before = LabeledFiles(str(file)).fingerprint()
    assert LabeledFiles(str(file)).fingerprint() == before
    assert LabeledFiles(str(file), label_column="text").fingerprint() != before
    write_csv(file, ROWS[:-1])
    assert LabeledFiles(str(file)).fingerprint() != before


def test_the_embedded_texts_are_of_twelve_packages_and_none_twice() -> None:
    splits = PythonPackages().load()
    assert len(splits.classes) == 12
    assert {"asyncio", "decimal", "logging"} <= set(splits.classes)
    texts = splits.train.texts + splits.val.texts
    assert len(set(texts)) == len(texts) > 1000
    assert 0.15 < len(splits.val) / len(texts) < 0.25
    assert np.bincount(splits.val.labels).min() >= 3


# GLUE in the hub's schema.

SECRET = -1


def hub_folder(
    folder: Path, task: str, columns: dict[str, list[Any]], label: Any, validation: str = "validation"
) -> Path:
    features = Features(
        {**{name: Value("string") for name in columns if name != "label"}, "label": label, "idx": Value("int32")}
    )
    rows = Dataset.from_dict({**columns, "idx": list(range(len(columns["label"])))}, features=features)
    (folder / task).mkdir(parents=True)
    for split in ("train", validation):
        rows.to_parquet(folder / task / f"{split}-00000-of-00001.parquet")
    return folder


def test_a_glue_task_of_one_text(tmp_path: Path) -> None:
    columns = {"sentence": ["fine", "dull", "odd"], "label": [1, 0, SECRET]}
    hub_folder(tmp_path, "sst2", columns, ClassLabel(names=["negative", "positive"]))
    splits = Glue("sst2", str(tmp_path)).load()
    assert (splits.train.texts, splits.train.labels, splits.train.seconds) == (["fine", "dull"], [1, 0], None)
    assert splits.classes == ("negative", "positive")
    assert splits.left_out == {"no label": 2}


def test_a_glue_task_of_pairs_with_its_own_validation_split(tmp_path: Path) -> None:
    columns = {"premise": ["p", "q", "r"], "hypothesis": ["h", "i", "j"], "label": [2, 0, 1]}
    label = ClassLabel(names=["entailment", "neutral", "contradiction"])
    hub_folder(tmp_path, "mnli", columns, label, "validation_matched")
    splits = Glue("mnli", str(tmp_path)).load()
    assert (splits.val.seconds, splits.val.labels) == (["h", "i", "j"], [2, 0, 1])


def test_the_glue_task_of_values(tmp_path: Path) -> None:
    columns = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [4.5, 0.25]}
    splits = Glue("stsb", str(hub_folder(tmp_path, "stsb", columns, Value("float32")))).load()
    assert (splits.train.labels, splits.classes) == ([4.5, 0.25], ())


def test_glue_is_asked_of_the_hub_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        rows = Dataset.from_dict({"sentence": ["a", "b"], "label": [0, 1]})
        return datasets.DatasetDict(train=rows, validation=rows)

    monkeypatch.setattr("lion_lightning.recipes.text_classification.sources.load_dataset", load)
    assert len(Glue("cola").load().train) == 2
    assert asked == [(("nyu-mll/glue", "cola"), {})]


def test_a_glue_task_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.task must be one of cola, sst2, .* got 'sst'"):
        Glue("sst")
    with pytest.raises(ConfigError, match=r"there is no rte/train-\*.parquet"):
        Glue("rte", str(tmp_path))
    with pytest.raises(ConfigError, match=r"data.task=rte cannot be loaded: .*data.path= takes a folder"):
        Glue("rte").load()  # offline


def test_a_validation_file_that_is_named_is_not_trained_on(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", ROWS)
    holdout = write_csv(tmp_path / "train_holdout.csv", [("held out", "good"), ("too", "bad")])
    source = LabeledFiles(str(tmp_path), val_path=str(holdout))
    splits = source.load()
    assert (len(splits.train), splits.val.texts) == (len(ROWS), ["held out", "too"])
    assert source.account() == f"2 on disk = 1 training tables + 1 validation tables ({holdout})"


def test_columns_with_numbers_for_names(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("0,1\n" + "".join(f"text {number},{number % 2}\n" for number in range(60)))
    splits = LabeledFiles(str(table), text_column=0, label_column=1).load()  # type: ignore[arg-type]  # as Hydra reads them
    assert splits.classes == ("0", "1")
    with pytest.raises(ConfigError, match=r"data.source.text_column=null: it must be the name of a column"):
        LabeledFiles(str(table), text_column=None)  # type: ignore[arg-type]


def test_numbers_of_classes_that_pandas_wrote_as_floats_are_the_same_classes(tmp_path: Path) -> None:
    write_csv(tmp_path / "train-1.csv", [(f"a {number}", number % 2) for number in range(40)])
    write_csv(
        tmp_path / "train-2.csv", [("no label", ""), *((f"b {number}", float(number % 2)) for number in range(40))]
    )
    assert LabeledFiles(str(tmp_path)).load().classes == ("0", "1")


def test_a_column_of_another_type_does_not_matter(tmp_path: Path) -> None:
    """A map, as Spark writes it, which `datasets` does not know."""
    kinds = pyarrow.map_(pyarrow.string(), pyarrow.int64())
    columns = {"text": [f"text {n}" for n in range(60)], "label": [n % 2 for n in range(60)]}
    table = pyarrow.table({**columns, "extra": pyarrow.array([[("a", 1)]] * 60, kinds)})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    assert LabeledFiles(str(tmp_path)).load().classes == ("0", "1")


def test_declared_names_that_look_like_numbers_stay(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["1.0", "2.0"])})
    columns = {"text": [f"text {number}" for number in range(60)], "label": [number % 2 for number in range(60)]}
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")
    assert LabeledFiles(str(tmp_path)).load().classes == ("1.0", "2.0")


def test_a_second_column_with_a_number_for_a_name(tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    table.write_text("0,1,2\n" + "".join(f"a {number},b {number},{number % 2}\n" for number in range(60)))
    source = LabeledFiles(str(table), text_column=0, second_text_column=1, label_column=2)  # type: ignore[arg-type]
    assert source.load().train.seconds is not None
