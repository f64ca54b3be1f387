"""Text of the Hugging Face hub, through `datasets`: names on the hub, or folders in its format on this machine."""

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lion_lightning.errors import ConfigError
from recipes.bert_mlm.corpus import Corpus

if TYPE_CHECKING:
    import datasets

ROWS_PER_READ = 1000


class HubText(Corpus):
    """A text column of a dataset, memory-mapped: what was downloaded once is read from the library's cache.

    Args:
        path: name on the hub, or a folder or file of parquet, JSON lines, CSV or text.
        config: configuration of the dataset.
        split: what is trained on.
        val_split: what is validated on; None holds out a share of the documents.
        column: where the text is; a row is a document.
        revision: branch, tag or commit.
        document_start: a regular expression; rows are parts of a document, which begins with a row that matches.

    Raises:
        ConfigError: no path, or (when it is read) the dataset, split or column is not there.
    """

    def __init__(
        self,
        path: str | None,
        config: str | None = None,
        split: str = "train",
        val_split: str | None = None,
        column: str = "text",
        revision: str | None = None,
        document_start: str | None = None,
    ) -> None:
        if not path:
            raise ConfigError("data=hub_text needs data.path=: a dataset's name on the hub, or a folder of its files")
        self.path, self.config, self.revision = path, config, revision
        self.split, self.val_split, self.column = split, val_split, column
        self.document_start = document_start

    def fingerprint(self) -> str:
        splits = [split for split in (self.split, self.val_split) if split]
        return f"hub_text {self.column} {self.document_start} " + " ".join(map(self._identity, splits))

    def _identity(self, split: str) -> str:
        """The library names its files by what they were made from."""
        data = self._load(split)
        files = ["/".join(Path(file["filename"]).parts[-5:]) for file in data.cache_files]
        return f"{split}:{len(data)}:{data.info.version}:{','.join(files)}"

    def documents(self) -> Iterator[str]:
        return self._documents(self.split)

    def held_out(self) -> Iterator[str] | None:
        return self._documents(self.val_split) if self.val_split else None

    def _documents(self, split: str) -> Iterator[str]:
        data = self._load(split).select_columns([self.column]).with_format("arrow")
        rows = (row for batch in data.iter(ROWS_PER_READ) for row in batch[self.column].to_pylist())
        return join_rows(rows, self.document_start)

    def _load(self, split: str) -> "datasets.Dataset":
        return load(self.path, self.config, split, self.column, self.revision, streaming=False)


def join_rows(rows: Iterable[str | None], document_start: str | None) -> Iterator[str]:
    """Documents of `rows`: each row one, or all up to the next row that `document_start` matches.

    A row without text becomes an empty document, which is counted where documents are.
    """
    if document_start is None:
        yield from (row or "" for row in rows)
        return
    begins = re.compile(document_start)
    kept: list[str] = []
    for row in rows:
        if kept and row and begins.match(row):
            yield "\n".join(kept)
            kept = []
        kept.append((row or "").rstrip("\n"))
    if kept:
        yield "\n".join(kept)


def load(path: str, config: str | None, split: str, column: str, revision: str | None, streaming: bool) -> Any:
    """The dataset, whose `column` is text.

    Raises:
        ConfigError: it is not there, cannot be reached or read, or has no such configuration, split or text column.
    """
    import datasets  # here: half a second and 80 MB that text files do without
    from datasets.exceptions import DatasetsError

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    asked = ", ".join(str(part) for part in (path, config, split, revision) if part)
    place = Path(path).expanduser()
    if path.startswith((".", "/", "~")) and not place.exists():
        raise ConfigError(f"data.path={path}: there is no such file or folder")
    try:
        source, files = (place.suffix.lstrip("."), str(place)) if place.is_file() else (str(place), None)
        source = {"jsonl": "json", "txt": "text"}.get(source, source)
        found = datasets.load_dataset(
            source if place.exists() else path, config, data_files=files, split=split, revision=revision,
            streaming=streaming,
        )  # fmt: skip
        features: Any = found.features or next(iter(found), {})
    except (OSError, ValueError, RuntimeError, KeyError, DatasetsError) as error:
        raise ConfigError(f"{_what_is_wrong(error, place.exists())} ({asked}): {_one_line(error)}") from error
    if column not in features:
        raise ConfigError(f"data.column={column} is not in {path}, which has {', '.join(features)}")
    kind = getattr(features[column], "dtype", type(features[column]).__name__)
    if kind not in ("string", "large_string", "str"):
        raise ConfigError(f"data.column={column} of {path} holds {kind}, not text")
    return found


def _what_is_wrong(error: BaseException, is_here: bool) -> str:
    if not is_here and isinstance(error, ConnectionError):
        return "the hub cannot be reached, and the dataset is not in its cache"
    return "the dataset cannot be opened"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
