"""Tables on disk: their columns, and one clear message for each that cannot be read."""

import gzip
from pathlib import Path

import pytest

from lion_lightning.errors import ConfigError
from lion_lightning.recipes.tables import Columns, Row, columns_of, label_name, read_table


def test_a_key_that_the_first_line_lacks_is_a_column(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n{"label": "x", "text": "b"}\n')
    assert list(columns_of(file)) == ["text", "label"]
    assert list(read_table(file, Columns("text", "label"))) == [Row("a", None, None, 1), Row("b", None, "x", 2)]


@pytest.mark.parametrize("read", [columns_of, lambda file: list(read_table(file, Columns("text", "label")))])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\nvoilà,x\n".encode("utf-16"), r"a.csv is not UTF-8 \(byte 0xff\); it looks like utf_16"),
        ("a.csv", "text,label\nvoilà,x\n".encode("latin-1"), r"a.csv is not UTF-8 \(byte 0xe0\)"),
        ("a.parquet", b"PAR1 and nothing more", "a.parquet cannot be read: Parquet"),
        ("a.csv.gz", gzip.compress(b"text,label\n" * 99)[:25] + b"\xff" * 9, "a.csv.gz cannot be read: Error -3"),
        ("a.csv.gz", gzip.compress(b"text,label\n" * 99)[:15], "a.csv.gz cannot be read: Compressed file ended"),
        ("a.csv.gz", b"text,label\n", "a.csv.gz cannot be read: Not a gzipped file"),
    ],
    ids=["utf-16", "latin-1", "broken parquet", "corrupted gzip", "cut gzip", "no gzip"],
)
def test_a_table_that_cannot_be_read_is_one_line(tmp_path: Path, name: str, content: bytes, message: str, read) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as told:
        read(file)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("cell", [None, "", " ", "\t\n", "\u00a0", float("nan")])
def test_a_cell_without_a_word_is_no_label(cell: str | float | None) -> None:
    assert label_name(cell, "row 1") is None


def test_a_missing_column_comes_with_the_hint_of_the_caller(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("name,label\n")
    with pytest.raises(ConfigError, match=r"no column text; there are name, label \(.* data.source.text_column"):
        list(read_table(tmp_path / "a.csv", Columns("text", "label")))
    with pytest.raises(ConfigError, match=r"there are name, label \(write it\)"):
        list(read_table(tmp_path / "a.csv", Columns("text", "label"), hint="write it"))
