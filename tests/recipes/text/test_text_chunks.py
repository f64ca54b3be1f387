"""TextChunks of a stream: every byte of the text is in one of them."""

from collections import Counter
from itertools import chain
from pathlib import Path

import pytest

import lion_lightning.recipes.text.text_chunks as chunks_module
from lion_lightning.errors import ConfigError
from lion_lightning.recipes.text.text_chunks import ChunkSample, FileChunks, HubChunks, _read

pytestmark = pytest.mark.usefixtures("small_chunks")


TEXTS = {
    "paragraphs": "One paragraph.\n\nAnother one,\nof two lines.\n\n" * 300,
    "lines": "A line with some words in it.\n" * 500,
    "one line": "word " * 4000,
    "no spaces": "x" * 20_000,
    "many bytes a character": "漢字かな" * 2000,
    "some": "naïve café — " * 900,
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("size", [997, 1000, 1024, 3001])
def test_pieces_of_a_file_are_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, size: int
) -> None:
    monkeypatch.setattr(chunks_module, "CUT_WITHIN_BYTES", 500)
    file = tmp_path / "text.txt"
    file.write_bytes(TEXTS[kind].encode())
    total = file.stat().st_size
    read = [_read(file, first, min(first + size, total)) for first in range(0, total, size)]
    assert "".join(read) == TEXTS[kind]
    assert max(len(text.encode()) for text in read) <= size + 500


def test_the_pieces_of_several_files_have_all_their_documents(library: Path) -> None:
    pieces = FileChunks(str(library))
    assert len(pieces) == 10
    words = Counter(
        word for piece in range(len(pieces)) for document in pieces.documents(piece) for word in document.split()
    )
    assert words == Counter(word for file in library.iterdir() for word in file.read_text().split())


def test_byte_order_marks_and_windows_lines_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert list(FileChunks(str(tmp_path)).documents(0)) == ["one\ntwo"]


def test_a_dataset_is_read_by_row_groups_and_never_whole(hub_folder: Path) -> None:
    pieces = HubChunks(str(hub_folder))
    assert len(pieces) == 12
    documents = [list(pieces.documents(piece)) for piece in range(12)]
    assert [len(piece) for piece in documents] == [10] * 12
    assert len(set(chain.from_iterable(documents))) == 120
    assert list(pieces.documents(7)) == documents[7]
    assert list(ChunkSample(pieces).documents()) == list(chain.from_iterable(documents))


def test_a_row_group_that_is_too_long_says_what_to_do(hub_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks_module, "MAX_CHUNK_CHARACTERS", 500)
    with pytest.raises(
        ConfigError, match=r"chunk 3 is longer than 500 characters; stream parquet .*refs/convert/parquet"
    ):
        list(HubChunks(str(hub_folder)).documents(3))


def test_a_sample_is_spread_evenly_over_the_text(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = FileChunks(str(library))
    monkeypatch.setattr(FileChunks, "chunks_in_sample", 4)
    assert len(pieces) == 10
    sample = ChunkSample(pieces)
    assert list(sample.documents()) == [text for piece in (0, 3, 6, 9) for text in pieces.documents(piece)]
    monkeypatch.setattr(FileChunks, "chunks_in_sample", 99)
    assert ChunkSample(pieces).chosen == list(range(10))
