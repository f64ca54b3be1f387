"""Text files in any place: links, capitals and brackets; every file is read or reported."""

import gzip
import json
from pathlib import Path

import pytest

from lion_lightning.errors import ConfigError
from lion_lightning.recipes.text.corpus import HubText, TextFiles
from lion_lightning.recipes.text.text_chunks import HubChunks
from lion_lightning.recipes.text_classification.data import LabeledTexts
from lion_lightning.recipes.text_classification.sources import LabeledFiles

TABLE = "text,label\n" + "".join(f"some words {number},{('x', 'y')[number % 2]}\n" for number in range(40))


def test_linked_folders_capitals_and_hidden_files(tmp_path: Path) -> None:
    library, books = tmp_path / "library", tmp_path / "books"
    for folder in (library, books / "novels"):
        folder.mkdir(parents=True)
    (books / "novels" / "one.txt").write_text("the first book")
    (library / "TWO.TXT").write_text("the second book")
    (library / "notes.pdf").write_text("no text")
    (library / ".draft.txt").write_text("hidden")
    (library / "novels").symlink_to(books / "novels")
    (library / "three.md").symlink_to(library / "missing.md")
    corpus = TextFiles(str(library))
    assert list(corpus.documents()) == ["the second book", "the first book"]
    assert corpus.account() == (
        "5 on disk = 2 read + 1 not used: hidden, such as .draft.txt + 1 not used: neither .txt nor .md, such as "
        "notes.pdf + 1 not used: a link without a target, such as three.md"
    )


@pytest.mark.parametrize("path", ["books [1]", "books [1]/a [2].txt", "books [1]/*.txt", "books [1]/**/*.txt"])
def test_brackets_in_a_path(tmp_path: Path, path: str) -> None:
    (tmp_path / "books [1]").mkdir()
    (tmp_path / "books [1]" / "a [2].txt").write_text("a book")
    assert list(TextFiles(str(tmp_path / path)).documents()) == ["a book"]


def test_a_glob_finds_a_file_once_and_tells_of_broken_links(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "book.txt").write_text("a book")
    (tmp_path / "a" / "gone.txt").symlink_to(tmp_path / "missing.txt")
    for pattern in ("**/**/*.txt", "a/**"):
        corpus = TextFiles(str(tmp_path / pattern))
        assert list(corpus.documents()) == ["a book"]
        account = corpus.account()
        assert account is not None
        assert account.startswith("2 on disk = 1 read + 1 not used: a link without a target, such as ")
        assert account.endswith("a/gone.txt" if pattern.startswith("*") else "such as gone.txt")
    with pytest.raises(ConfigError, match="there is no such file or folder"):
        TextFiles(str(tmp_path / "a" / "*.txt"))


def test_the_summary_has_the_account(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(TABLE)
    (tmp_path / "test.csv").write_text(TABLE)
    (tmp_path / "README.md").write_text("a table")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "train.csv").write_text(TABLE)
    data = LabeledTexts(LabeledFiles(str(tmp_path)), batch_size=4, cache_dir=str(tmp_path / "cache"))
    data.setup("fit")
    assert data.describe()["files"] == (
        "4 on disk = 1 training tables + 0 validation tables + "
        "1 not used: no table, such as README.md + "
        "1 not used: in a folder below, such as old/train.csv + "
        "1 not used: tables whose names begin with neither train nor val, such as test.csv"
    )


def test_the_account_has_the_validation_table_that_is_named(tmp_path: Path) -> None:
    folder, other = tmp_path / "tables", tmp_path / "other.csv"
    (folder / "below").mkdir(parents=True)
    tables = [folder / "train.csv", folder / "val.csv", folder / "below" / "x.csv"]
    for file in (*tables, other):
        file.write_text(TABLE)
    unused = {
        "val": "1 not used: not data.val_path, such as val.csv",
        "x": "1 not used: in a folder below, such as below/x.csv",
    }
    for val, on_disk, rest in ((other, 4, "val x"), (tables[1], 3, "x"), (tables[2], 3, "val")):
        source = LabeledFiles(str(folder), val_path=str(val))
        assert source.val_files == [val]
        kept = [f"{on_disk} on disk = 1 training tables", f"1 validation tables ({val})"]
        account = source.account()
        assert account is not None
        assert sorted(account.split(" + ")) == sorted([*kept, *(unused[name] for name in rest.split())])
    assert LabeledFiles(str(tables[0]), str(other)).account() == (
        f"2 on disk = 1 training tables + 1 validation tables ({other})"
    )
    assert LabeledFiles(str(other), str(other)).account() == (
        f"1 on disk = 0 training tables + 0 validation tables ({other}) + 1 tables for both"
    )


def test_two_kinds_of_tables_for_one_split_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(TABLE)
    (tmp_path / "train.jsonl").write_text('{"text": "some words 1", "label": "y"}\n')
    with pytest.raises(ConfigError, match=r"the train split is there as .csv and .jsonl, perhaps with the same rows"):
        LabeledFiles(str(tmp_path))


@pytest.mark.parametrize("name", ["table.jsonl.gz", "table.CSV", "table.csv.gz", "table.tsv"])
def test_one_file_of_any_ending(tmp_path: Path, name: str) -> None:
    text = TABLE.replace(",", "\t") if "tsv" in name else TABLE
    if "jsonl" in name:
        rows = [line.split(",") for line in TABLE.splitlines()[1:]]
        text = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
    content = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    splits = LabeledFiles(str(tmp_path / name)).load()
    assert len(splits.train) + len(splits.val) == 40
    assert splits.classes == ("x", "y")
    assert sorted(HubText(str(tmp_path / name)).documents()) == sorted(splits.train.texts + splits.val.texts)


def test_a_table_behind_another_link_has_another_fingerprint(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text(TABLE)
    link = tmp_path / "train.csv"
    link.symlink_to(tmp_path / "a.csv")
    before = LabeledFiles(str(link)).fingerprint()
    assert LabeledFiles(str(link)).fingerprint() == before
    link.unlink()
    link.symlink_to(tmp_path / "b.csv")
    assert LabeledFiles(str(link)).fingerprint() != before


def test_files_of_a_dataset_that_are_not_read_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    (folder / "old").mkdir(parents=True)
    for name in ("train-1.txt", "train-2.txt", "test.txt", "more.jsonl", ".train.txt", "notes.txt"):
        (folder / name).write_text("a line\n")
    (folder / "train-3.txt").symlink_to(folder / "missing.txt")
    unused = (
        "1 not used: hidden, such as .train.txt + 1 not used: not .txt, such as more.jsonl + "
        "1 not used: of no split by its name, such as notes.txt"
    )
    account = HubText(str(folder)).account()
    assert account == (
        f"7 on disk = 2 read + {unused} + 1 not used: of the split test, such as test.txt + "
        "1 not used: a link without a target, such as train-3.txt"
    )
    assert HubChunks(str(folder)).account == account
    both = HubText(str(folder), split="train[:50%]", val_split="test").account()
    assert both == f"7 on disk = 3 read + {unused} + 1 not used: a link without a target, such as train-3.txt"
    assert HubText(str(folder), split="train+test").account() == both
    assert HubText(str(folder / "notes.txt")).account() == "1 on disk = 1 read"
    assert HubText("somebody/some-dataset").account() is None
