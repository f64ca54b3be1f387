"""Datasets in the hub's format, through the library that reads them, and what can be wrong with one."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lion_lightning.errors import ConfigError
from lion_lightning.recipes.bert_mlm.data import TextBlocks
from lion_lightning.recipes.text.corpus import HubText, join_rows
from lion_lightning.recipes.text.text_chunks import HubChunks

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
    with pytest.raises(ConfigError, match=r"train\.parquet cannot be read: Parquet magic bytes") as error:
        HubText(str(tmp_path / "train.parquet")).fingerprint()
    assert "\n" not in str(error.value)


UNUSUAL = ['"two" are, one', "NA", "null", "None", "nan", "1e5", "", " spaced ", "back\\slash"]


@pytest.mark.parametrize("name", ["table.csv", "table.tsv", "table.csv.gz", "folder/train.tsv", "folder/train.csv.gz"])
def test_every_text_of_a_table_is_as_it_was_written(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    rows = [*ROWS, *UNUSUAL, '"a quote that is not closed', "after it"]
    written = io.StringIO()
    if ".tsv" in name:
        written.write("number\ttext\n" + "".join(f"{number}\t{row}\n" for number, row in enumerate(rows)))
    else:
        csv.writer(written).writerows([("number", "text"), *enumerate(rows)])
    content = written.getvalue().encode()
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    path = str(file.parent if name.startswith("folder") else file)
    assert list(HubText(path).documents()) == rows
    chunks = HubChunks(path)
    assert [text for chunk in range(len(chunks)) for text in chunks.documents(chunk)] == rows


def test_a_row_with_another_number_of_fields_than_the_header_is_named(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("text\none\ntwo, three\n")
    told = (
        r"table.csv: row 2 after the header has 2 fields, the header 1; a comma inside a text needs quotes around it$"
    )
    with pytest.raises(ConfigError, match=told):
        HubText(str(tmp_path)).fingerprint()
    with pytest.raises(ConfigError, match=told):
        list(HubChunks(str(tmp_path / "table.csv")).documents(0))
    (tmp_path / "table.csv").write_text("text,text,x\na,b,c\n")
    with pytest.raises(ConfigError, match=r"data.column=text is there twice in .*table.csv, which has text, text, x"):
        HubText(str(tmp_path)).fingerprint()


def test_the_splits_of_a_folder_of_tables(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("text\n" + "".join(f"{split} {number}\n" for number in range(4)))
    assert list(HubText(str(tmp_path), split="test[:2]").documents()) == ["test 0", "test 1"]
    before = HubText(str(tmp_path)).fingerprint()
    with pytest.raises(ConfigError, match=r"validation.*train.*test"):
        HubText(str(tmp_path), split="validation").fingerprint()
    (tmp_path / "train.csv").write_text("text\nanother\n")
    assert HubText(str(tmp_path)).fingerprint() != before
    assert list(HubText(str(tmp_path)).documents()) == ["another"]


def test_a_table_whose_card_says_how_it_is_read_is_left_to_the_library(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text;x\na, b;1\n")
    (tmp_path / "README.md").write_text(
        '---\nconfigs:\n- config_name: default\n  data_files: train.csv\n  sep: ";"\n---\n'
    )
    assert list(HubText(str(tmp_path)).documents()) == ["a, b"]


BROKEN = {
    "torn.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 999)[:-20], r"ended before the end-of-stream marker"),
    "bad.jsonl.gz": (gzip.compress(b"text")[:10] + b"\xff" * 99, r"cannot be opened .*while decompressing"),
    "torn.csv.gz": (gzip.compress(b"text\na\n" * 999)[:-20], r"torn.csv.gz cannot be read: .*end-of-stream marker"),
    "bad.jsonl": (b'{"text": "a"}\n{"text": ', r"bad.jsonl, train\): JSON parse error: .* row 1"),
    "empty.jsonl": (b"", r"cannot be opened .*empty.jsonl.*: there is nothing in it"),
    "latin.jsonl": ('{"text": "caf\xe9"}\n'.encode("latin-1"), r"latin.jsonl is not UTF-8 \(byte 13 .*iconv"),
    "latin.txt": ("caf\xe9\n".encode("latin-1"), r"latin.txt is not UTF-8 \(byte 3 .*convert it"),
    "latin.csv": ("text\ncaf\xe9\n".encode("latin-1"), r"latin.csv is not UTF-8 \(byte 0xe9\).*convert it"),
    "notes.doc": (b"text", r"notes.doc must be a folder or a file of .parquet, .*\.md, or one of these in \.gz"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_cause_of_an_unreadable_file_is_told(tmp_path: Path, name: str) -> None:
    content, told = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=told) as error:
        list(HubText(str(tmp_path / name)).documents())
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=told):
        list(HubChunks(str(tmp_path / name)).documents(0))
    assert "An error occurred" not in str(error.value)


def test_shards_without_rows_are_told_and_left_out(tmp_path: Path) -> None:
    """Spark writes such a shard for each empty partition, and `datasets` takes the size of its batches from it."""
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "train-0.parquet")
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "train-1.parquet")
    assert list(HubText(str(tmp_path)).documents()) == ["a", "b"]
    account = HubText(str(tmp_path)).account()
    assert account == "2 on disk = 1 read + 1 not used: without rows, such as train-0.parquet"
    chunks = HubChunks(str(tmp_path))
    assert chunks.account == account
    assert [text for number in range(len(chunks)) for text in chunks.documents(number)] == ["a", "b"]


@pytest.mark.parametrize("corpus", [HubText, HubChunks])
def test_the_shard_that_is_broken_is_named(tmp_path: Path, corpus: type[HubText] | type[HubChunks]) -> None:
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "train-0.parquet")
    (tmp_path / "train-1.parquet").write_bytes(b"PAR1 torn off PAR1")
    with pytest.raises(ConfigError, match=r"train-1\.parquet cannot be read: Parquet file size is 18"):
        corpus(str(tmp_path)).fingerprint()


def test_a_markdown_file_is_text(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("# Notes\nand a line\n")
    assert list(HubText(str(tmp_path / "notes.md")).documents()) == ["# Notes", "and a line"]


def test_a_wrong_regular_expression_is_one_line(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.document_start=\*row is no regular expression: nothing to repeat"):
        list(HubText(str(folder), document_start="*row").documents())


def test_brackets_in_a_name_are_no_pattern(tmp_path: Path) -> None:
    for name in ("train[1].txt", "train1.txt"):
        (tmp_path / name).write_text(name)
    assert list(HubText(str(tmp_path / "train[1].txt")).documents()) == ["train[1].txt"]
    (tmp_path / "words [v2]").mkdir()
    (tmp_path / "words [v2]" / "train.txt").write_text("a line")
    with pytest.raises(ConfigError, match=r"words \[v2\]: `datasets` takes .* brackets .*; rename it"):
        HubText(str(tmp_path / "words [v2]")).fingerprint()


def test_files_behind_a_link_to_their_folder_count_once(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert HubText(str(tmp_path / "link")).account() == HubText(str(folder)).account()


def test_links_into_a_cache_count_by_their_own_names(tmp_path: Path, folder: Path) -> None:
    """As in a snapshot of the hub's cache, where the files are called by a hash."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    (blobs / "0a1b2c").write_bytes((folder / "data" / "validation-00000-of-00001.parquet").read_bytes())
    (snapshot / "train.parquet").symlink_to(blobs / "0a1b2c")
    (snapshot / "README.md").write_text("# Words")
    assert HubText(str(snapshot)).account() == "2 on disk = 1 read + 1 not used: not .parquet, such as README.md"
