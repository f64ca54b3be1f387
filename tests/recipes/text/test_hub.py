"""Datasets in the hub's format, through the library that reads them, and what can be wrong with one."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lion_lightning.errors import ConfigError
from lion_lightning.recipes.bert_mlm.data import TextBlocks
from lion_lightning.recipes.text.corpus import HubText, join_rows

ROWS = [f"Row {number} of a dataset has some words." for number in range(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset as the hub keeps it: parquet files whose names say the split, one value missing."""
    place = tmp_path_factory.mktemp("dataset")
    (place / "data").mkdir()
    parts = {
        "train-00000-of-00002": ROWS[:150],
        "train-00001-of-00002": [*ROWS[150:249], None],
        "validation-00000-of-00001": ROWS[250:],
    }
    for name, rows in parts.items():
        table = pa.table({"text": rows, "likes": list(range(len(rows))), "body": [row or "" for row in rows]})
        pq.write_table(table, place / "data" / f"{name}.parquet")
    return place


def test_the_rows_of_a_split_are_its_documents(folder: Path) -> None:
    assert list(HubText(str(folder)).documents()) == [*ROWS[:249], ""]
    assert list(HubText(str(folder), split="validation").documents()) == ROWS[250:]
    assert list(HubText(str(folder), column="body").documents()) == [*ROWS[:249], ""]
    assert HubText(str(folder)).held_out() is None


def test_a_validation_split_of_its_own_is_kept_for_validation(folder: Path) -> None:
    held_out = HubText(str(folder), val_split="validation").held_out()
    assert held_out is not None
    assert list(held_out) == ROWS[250:]


def test_it_trains_from_the_hubs_format(folder: Path, tmp_path: Path) -> None:
    data = TextBlocks(
        HubText(str(folder), val_split="validation"), batch_size=4, sequence_length=16, vocab_size=300,
        cache_dir=str(tmp_path),
    )  # fmt: skip
    data.setup("fit")
    assert data.ready.counts["documents"] == 249
    assert data.ready.counts["held-out documents"] == 50
    assert data.ready.counts["empty documents"] == 1
    assert "1 empty documents" in data.describe()["documents"]
    text = data.ready.tokenizer.decode(data.ready.val[:, 1:].ravel().tolist())
    assert "row 250 of a dataset" in text
    assert "row 249" not in text


@pytest.mark.parametrize("name", ["lines.jsonl", "table.csv", "plain.txt", "table.parquet"])
def test_single_files_of_several_kinds_are_read(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    if name.endswith(".jsonl"):
        file.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    elif name.endswith(".parquet"):
        pq.write_table(pa.table({"text": ROWS}), file)
    else:
        file.write_text("\n".join(["text", *ROWS] if name.endswith(".csv") else ROWS))
    assert list(HubText(str(file)).documents()) == ROWS


def test_the_fingerprint_changes_with_the_files_the_split_and_the_column(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    seen = []
    for rows in (ROWS[:5], ROWS[5:10]):
        pq.write_table(pa.table({"text": rows, "body": rows}), file)
        seen += [HubText(str(file)).fingerprint(), HubText(str(file), column="body").fingerprint()]
        assert HubText(str(file)).fingerprint() == seen[-2]
    seen.append(HubText(str(file), val_split="train").fingerprint())
    assert len(set(seen)) == 5


def test_rows_are_joined_into_articles() -> None:
    rows = ["", " = One = \n", "", "text\n", " = = Part = = \n", "more\n", None, " = Two = \n", "other\n"]
    found = list(join_rows(rows, "^ = [^=]"))
    assert [" ".join(document.split()) for document in found] == [
        "", "= One = text = = Part = = more", "= Two = other"
    ]  # fmt: skip
    assert list(join_rows(["a", None], None)) == ["a", ""]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"path": None}, r"needs data\.path="),
        ({"path": "/nowhere/at/all"}, r"data\.path=/nowhere/at/all: there is no such file or folder"),
        ({"column": "txet"}, r"data\.column=txet is not in .* which has text, likes, body"),
        ({"column": "likes"}, r"data\.column=likes of .* holds int64, not text"),
        ({"split": "trian"}, r"cannot be opened .*trian.*train"),
        ({"config": "english"}, r"cannot be opened .*english"),
        (
            {"path": "nobody/has-this-dataset"},
            r"the hub cannot be reached, and the dataset is not in its cache \(nobody/",
        ),
    ],
)
def test_what_is_wrong_is_told_in_one_line(folder: Path, wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as error:
        HubText(**{"path": str(folder), **wrong}).fingerprint()
    assert "\n" not in str(error.value)


def test_a_broken_file_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ConfigError, match="cannot be opened") as error:
        HubText(str(tmp_path / "train.parquet")).fingerprint()
    assert "\n" not in str(error.value)
