"""Text that is read a chunk at a time, in any order: what a stream is made of."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np

from lion_lightning.errors import ConfigError

from ..files import fingerprint_of, not_utf8
from .corpus import ROWS_PER_READ, Corpus, find_files, passages
from .hub import account_of, join_rows, load, reading

CHUNK_BYTES = 2**17
CUT_WITHIN_BYTES = 2**16  # a chunk ends at the first good place within this many bytes
MAX_CHUNK_CHARACTERS = 2**26
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class TextChunks(Protocol):
    """Text in numbered chunks.

    Attributes:
        chunks_per_pool: chunks whose blocks are shuffled together.
        chunks_in_sample: chunks that the tokenizer and the validation set are made from.
        account: one line that accounts for every file, None for a source without files.
    """

    chunks_per_pool: int
    chunks_in_sample: int
    account: str | None = None

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """A string that changes whenever the documents would."""
        ...

    def documents(self, chunk: int) -> Iterator[str]:
        """The documents of one chunk."""
        ...


class FileChunks(TextChunks):
    """UTF-8 text files laid end to end and cut every 128 KiB, wherever a paragraph, line, word or character ends.

    No more than a chunk is ever read, however long a file or a line is.

    Args:
        path: a file, a folder with .txt and .md files, or a glob.
    """

    chunks_per_pool, chunks_in_sample = 16, 128

    def __init__(self, path: str) -> None:
        self.files, self.account = find_files(path)
        self.ends = np.cumsum([file.stat().st_size for file in self.files])
        if not self.ends[-1]:
            raise ConfigError(f"data.path={path}: every file is empty")

    def __len__(self) -> int:
        return -(-int(self.ends[-1]) // CHUNK_BYTES)

    def fingerprint(self) -> str:
        return f"pieces of {CHUNK_BYTES} {fingerprint_of(self.files)}"

    def documents(self, chunk: int) -> Iterator[str]:
        first, last = chunk * CHUNK_BYTES, min((chunk + 1) * CHUNK_BYTES, int(self.ends[-1]))
        for number in range(int(np.searchsorted(self.ends, first, side="right")), len(self.files)):
            begin = int(self.ends[number - 1]) if number else 0
            if begin >= last:
                return
            text = _read(self.files[number], max(0, first - begin), last - begin)
            if text:
                yield from passages(text)


def _read(file: Path, first: int, last: int) -> str:
    """The text from the first good place at or after byte `first` to that at or after byte `last`."""
    with file.open("rb") as raw:
        start, end = (_cut(raw, place, file.stat().st_size) for place in (first, last))
        raw.seek(start)
        content = raw.read(max(0, end - start))
    try:
        text = content.removeprefix(BYTE_ORDER_MARK if start == 0 else b"").decode()
    except UnicodeDecodeError:
        raise not_utf8(file) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _cut(raw, place: int, size: int) -> int:  # type: ignore[no-untyped-def]
    """Where a chunk that nominally ends at `place` ends: both chunks that meet there find the same."""
    if place <= 0 or place >= size:
        return min(max(place, 0), size)
    raw.seek(place)
    near = raw.read(CUT_WITHIN_BYTES)
    for mark in (b"\n\n", b"\n", b" "):
        found = near.find(mark)
        if found >= 0:
            return place + found + len(mark)
    return place + next((skip for skip, byte in enumerate(near[:4]) if byte & 0xC0 != 0x80), 0)


class HubChunks(TextChunks):
    """A dataset of the hub, or a folder in its format, that is never downloaded whole: a chunk is a row group.

    Args:
        path, config, split, column, revision, document_start: see `HubText`.
    """

    chunks_per_pool, chunks_in_sample = 1, 16

    def __init__(
        self,
        path: str,
        config: str | None = None,
        split: str = "train",
        column: str = "text",
        revision: str | None = None,
        document_start: str | None = None,
    ) -> None:
        self.label = " ".join(str(part) for part in (path, config, split, revision) if part)
        self.path, self.config = path, config
        self.column, self.document_start = column, document_start
        found = load(path, config, split, column, revision, streaming=True)
        if not hasattr(found, "reshard"):
            raise ConfigError("streaming from the hub needs datasets >= 5, which can split files into row groups")
        with reading(self.label, path, config):
            self.data = found.select_columns([column]).reshard()
        self.account = account_of(path, config, [split])

    def __len__(self) -> int:
        return int(self.data.num_shards)

    def fingerprint(self) -> str:
        return f"pieces of {self.label} {self.column} {self.document_start} {len(self)} {self.data.info.version}"

    def documents(self, chunk: int) -> Iterator[str]:
        left = MAX_CHUNK_CHARACTERS
        # `iter(rows)` and not `for row in`: in a loading process that leaves all but the first process without rows.
        batches = self.data.shard(len(self), chunk).iter(ROWS_PER_READ)
        rows = (row for batch in batches for row in batch[self.column])
        with reading(self.label, self.path, self.config):
            for document in join_rows(rows, self.document_start):
                left -= len(document)
                if left < 0:
                    raise ConfigError(
                        f"{self.label}: chunk {chunk} is longer than {MAX_CHUNK_CHARACTERS:,} characters; stream "
                        "parquet files with smaller row groups, such as those of data.revision=refs/convert/parquet"
                    )
                yield document


class ChunkSample(Corpus):
    """A bounded sample of `chunks`, evenly spread, as a corpus."""

    def __init__(self, chunks: TextChunks) -> None:
        self.chunks = chunks
        count = min(len(chunks), chunks.chunks_in_sample)
        self.chosen = np.linspace(0, len(chunks) - 1, count).round().astype(int).tolist()

    def account(self) -> str | None:
        return self.chunks.account

    def fingerprint(self) -> str:
        return f"sample of {len(self.chosen)} {self.chunks.fingerprint()}"

    def documents(self) -> Iterator[str]:
        return chain.from_iterable(self.chunks.documents(chunk) for chunk in self.chosen)
