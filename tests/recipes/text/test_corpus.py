"""Text sources: real English, in the same order each time, and mistakes that say what they are."""

import os
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

import lion_lightning.recipes.text.corpus as corpus_module
from lion_lightning.errors import ConfigError
from lion_lightning.recipes import files
from lion_lightning.recipes.text.corpus import PythonDocs, TextFiles, is_held_out, passages


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


def at_once(text: str, size: int) -> list[str]:
    """Passages by the definition, of a text that is there as a whole."""
    found: list[str] = []
    kept: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        kept.append(paragraph)
        if sum(map(len, kept)) >= size:
            found.append("\n\n".join(kept))
            kept = []
    return found + (["\n\n".join(kept)] if kept else [])


@pytest.mark.parametrize("piece", [1, 2, 7, 64])
def test_where_a_text_is_cut_for_reading_changes_nothing(prose: Path, piece: int) -> None:
    text = "\n\n \n begin\n\n\n\n" + prose.read_text(encoding="utf-8")[:4000] + "end\n \n\t\nlast\n\n"
    pieces = [text[at : at + piece] for at in range(0, len(text), piece)]
    assert list(passages(pieces, size=100)) == list(passages(text, size=100)) == at_once(text, 100)


def test_one_enormous_line_is_cut_and_nothing_of_it_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "MAX_PARAGRAPH_CHARACTERS", 1000)
    monkeypatch.setattr(files, "CHARACTERS_PER_READ", 300)
    for text in ("word " * 5000, "x" * 25_000):
        (tmp_path / "line.txt").write_text(text)
        found = read(tmp_path)
        assert len(found) > 1
        assert "".join("".join(found).split()) == "".join(text.split())
        assert max(map(len, found)) <= 20_000 + 1300


@pytest.mark.parametrize("ends", ["\n", " "])
def test_a_short_text_without_an_empty_line_can_be_held_out_from(tmp_path: Path, prose: Path, ends: str) -> None:
    text = ends.join(prose.read_text(encoding="utf-8")[:15_000].split())
    (tmp_path / "short.txt").write_text(text)
    found = read(tmp_path)
    assert len(found) > 15
    assert " ".join(found).split() == text.split()
    assert sum(map(len, found)) + len(found) - 1 == len(text)
    assert max(map(len, found)) < 1_000


def test_all_files_that_are_not_utf8_are_told_at_once(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"{number}.txt").write_bytes(b"na\xefve" if number % 2 else b"good")
    with pytest.raises(ConfigError, match=r"1\.txt is not UTF-8 .*; nor are 3\.txt, 5\.txt, 7\.txt$"):
        read(tmp_path)
    for number in range(20, 28):
        (tmp_path / f"{number}.txt").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"; nor are 20\.txt, 21\.txt, .*, 24\.txt and 6 more$"):
        read(tmp_path)


def test_the_byte_is_counted_from_the_beginning_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHARACTERS_PER_READ", 64)
    for place in (0, 63, 64, 1000):
        (tmp_path / "bad.txt").write_bytes("é".encode() * (place // 2) + b"a" * (place % 2) + b"\xff rest")
        with pytest.raises(ConfigError, match=rf"\(byte {place} is 0xff\)"):
            read(tmp_path)


def test_an_unfinished_character_at_the_end_is_told_too(tmp_path: Path) -> None:
    (tmp_path / "cut.txt").write_bytes("naïve é".encode()[:-1])
    with pytest.raises(ConfigError, match=r"cut\.txt is not UTF-8 \(byte 7 is 0xc3\)"):
        read(tmp_path)


def test_an_empty_file_is_an_empty_document(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    assert [document.strip() for document in read(tmp_path)] == [""]
