"""Text sources: real English, in the same order each time, and mistakes that say what they are."""

import os
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from lion_lightning.training.errors import ConfigError
from recipes.bert_mlm.corpus import PythonDocs, TextFiles, is_held_out, passages


@pytest.fixture(scope="module")
def python_docs() -> list[str]:
    return list(PythonDocs().documents())


def test_python_docs_is_english(python_docs: list[str]) -> None:
    words = Counter(word.strip(".,;:()'\"`*").lower() for document in python_docs for word in document.split())
    total = sum(words.values())
    assert total > 150_000
    # What is common in English prose (the ten commonest words are a fifth of it) is common here.
    commonest = {word for word, _ in words.most_common(25)}
    assert {"the", "a", "to", "of", "is", "and", "in"} <= commonest
    assert 0.15 < sum(count for _, count in words.most_common(10)) / total < 0.35


def test_python_docs_holds_what_it_says(python_docs: list[str]) -> None:
    assert any('The "if" statement is used for conditional execution' in document for document in python_docs)
    assert any("Return a shallow copy of" in document or "Return a list" in document for document in python_docs)
    assert all(isinstance(document, str) and document.strip() for document in python_docs)


def test_python_docs_is_the_same_each_time(python_docs: list[str]) -> None:
    assert list(islice(PythonDocs().documents(), 600)) == python_docs[:600]
    assert PythonDocs().fingerprint() == PythonDocs().fingerprint()


@pytest.fixture
def library(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("second", encoding="utf-8")
    (tmp_path / "a.md").write_text("first", encoding="utf-8")
    (tmp_path / "deep" / "c.txt").write_text("third: naïve café", encoding="utf-8")
    (tmp_path / "deep" / "d.rst").write_text("not text by its name", encoding="utf-8")
    return tmp_path


def read(path: Path | str) -> list[str]:
    return list(TextFiles(str(path)).documents())


def test_a_folder_is_read_with_all_below_it(library: Path) -> None:
    assert read(library) == ["first", "second", "third: naïve café"]


def test_a_file_is_read_whatever_its_name(library: Path) -> None:
    assert read(library / "deep" / "d.rst") == ["not text by its name"]


def test_a_glob_is_read(library: Path) -> None:
    assert read(f"{library}/*.txt") == ["second"]
    assert read(f"{library}/**/*.txt") == ["second", "third: naïve café"]


def test_a_file_with_brackets_in_its_name_is_read(library: Path) -> None:
    (library / "novel [1].txt").write_text("bracketed", encoding="utf-8")
    assert read(library / "novel [1].txt") == ["bracketed"]


def test_a_home_folder_is_expanded(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(library))
    assert read("~/deep") == ["third: naïve café"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read(tmp_path) == ["hello"]


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no \.txt or \.md file") as error:
        TextFiles(str(tmp_path))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("path", ["/nowhere", "/nowhere/*.txt"])
def test_a_missing_file_is_named(path: str) -> None:
    with pytest.raises(ConfigError, match="no such file or folder") as error:
        TextFiles(path)
    assert f"data.path={path}" in str(error.value)


@pytest.mark.parametrize("path", [None, ""])
def test_no_path_says_what_is_wanted(path: str | None) -> None:
    with pytest.raises(ConfigError, match=r"needs data\.path="):
        TextFiles(path)


def test_a_file_that_is_not_utf8_is_named_with_the_byte(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes("na\xefve".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.txt is not UTF-8 \(byte 2 is 0xef\)") as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


def test_the_fingerprint_changes_with_what_it_reads(library: Path) -> None:
    seen = [TextFiles(str(library)).fingerprint()]
    assert TextFiles(str(library)).fingerprint() == seen[0]
    (library / "b.txt").write_text("second, longer")
    seen.append(TextFiles(str(library)).fingerprint())
    stat = (library / "b.txt").stat()
    (library / "b.txt").write_text("SECOND, LONGER")
    os.utime(library / "b.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    seen.append(TextFiles(str(library)).fingerprint())
    (library / "e.txt").write_text("new")
    seen.append(TextFiles(str(library)).fingerprint())
    (library / "b.txt").unlink()
    seen.append(TextFiles(str(library)).fingerprint())
    assert len(set(seen)) == len(seen)


def test_passages_keep_every_paragraph_in_order() -> None:
    paragraphs = [f"paragraph {number} " + "word " * (number % 37) for number in range(300)]
    cut = list(passages("\n\n".join(paragraphs), size=500))
    assert "\n\n".join(cut).split("\n\n") == paragraphs
    assert all(500 <= len(passage) < 900 for passage in cut[:-1])
    assert list(passages("", size=500)) in ([], [""])


def test_what_is_held_out_is_a_share_decided_by_content_alone() -> None:
    documents = [f"document {number}" for number in range(20_000)]
    held = [document for document in documents if is_held_out(document, 0.05)]
    assert abs(len(held) / 20_000 - 0.05) < 5 * (0.05 * 0.95 / 20_000) ** 0.5
    assert held == [document for document in documents if is_held_out(document, 0.05)]
    assert set(held) <= {document for document in documents if is_held_out(document, 0.2)}
    assert not any(is_held_out(document, 0.0) for document in documents)
    assert all(is_held_out(document, 1.0) for document in documents)
