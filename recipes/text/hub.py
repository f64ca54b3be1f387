"""Datasets of the Hugging Face hub, or of files here in one of its formats: opening them, accounting for files."""

import glob
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lion_lightning.errors import ConfigError

from ..files import account, existing, is_hidden, is_utf8, list_files, not_utf8, one_line

if TYPE_CHECKING:
    import datasets

FORMATS: dict[str, tuple[str, dict[str, str]]] = {  # of `datasets`, by the ending of a file
    ".parquet": ("parquet", {}), ".arrow": ("arrow", {}), ".jsonl": ("json", {}), ".json": ("json", {}),
    ".csv": ("csv", {}), ".tsv": ("csv", {"sep": "\t"}), ".txt": ("text", {}), ".md": ("text", {}),
}  # fmt: skip
ROWS_PER_BATCH = 1000  # of parquet files
TEXT_FORMATS = set(FORMATS) - {".parquet", ".arrow"}


def join_rows(rows: Iterable[str | None], document_start: str | None) -> Iterator[str]:
    """Documents of `rows`: each row one, or all up to the next row that `document_start` matches.

    A row without text becomes an empty document, which is counted where documents are.
    """
    if document_start is None:
        yield from (row or "" for row in rows)
        return
    try:
        begins = re.compile(document_start)
    except re.error as error:
        raise ConfigError(f"data.document_start={document_start} is no regular expression: {error}") from error
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

    from .separated import strict

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    name = ", ".join(str(part) for part in (path, config, split, revision) if part)
    place = local_place(path)
    with reading(name, path, config):
        if place is None:
            found = datasets.load_dataset(path, config, split=split, revision=revision, streaming=streaming)
        else:
            builder = strict(_builder(place, config), column)
            if builder.name == "parquet" and not builder.config.batch_size:
                builder.config.batch_size = ROWS_PER_BATCH  # else that of the first row group, which may be empty
            if not streaming:
                builder.download_and_prepare()
            found = builder.as_streaming_dataset(split) if streaming else builder.as_dataset(split)
        features: Any = found.features or next(iter(found), {})
    if column not in features:
        raise ConfigError(f"data.column={column} is not in {path}, which has {', '.join(features)}")
    kind = getattr(features[column], "dtype", type(features[column]).__name__)
    if kind not in ("string", "large_string", "str"):
        raise ConfigError(f"data.column={column} of {path} holds {kind}, not text")
    return found


def local_place(path: str) -> Path | None:
    """The file or folder that `path` means, None for a name on the hub; ConfigError for a file that is not there."""
    place = existing(path, "data.path") if path.startswith((".", "/", "~")) else Path(path)
    return place if place.exists() else None


def _builder(place: Path, config: str | None) -> "datasets.DatasetBuilder":
    """What `datasets` reads a local file or folder with."""
    import datasets

    if place.is_dir():
        if glob.has_magic(str(place.absolute())):
            raise ConfigError(
                f"data.path={place}: `datasets` takes *, ? and brackets in a folder's name for a pattern; rename it"
            )
        return datasets.load_dataset_builder(str(place), config)
    ending = (place.with_suffix("") if place.suffix.lower() == ".gz" else place).suffix.lower()
    if ending not in FORMATS:
        raise ConfigError(
            f"data.path={place} must be a folder or a file of {', '.join(FORMATS)}, or one of these in .gz"
        )
    kind, options = FORMATS[ending]
    return datasets.load_dataset_builder(kind, config, data_files=glob.escape(str(place)), **options)


@contextmanager
def reading(name: str, path: str, config: str | None) -> Iterator[None]:
    """Turn what the libraries raise on a dataset into a one-line ConfigError with the cause.

    Args:
        name: of the dataset, for the message.
        path, config: see `HubText`.
    """
    from datasets.exceptions import DatasetGenerationError, DatasetsError
    from pyarrow import ArrowException

    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, EOFError, StopIteration, zlib.error, DatasetsError) as error:
        causes: list[BaseException] = [error]
        while cause := causes[-1].__cause__ or causes[-1].__context__:
            causes.append(cause)
        for cause in causes:
            if isinstance(cause, ConfigError):
                raise cause from None
        place = local_place(path)
        if place is not None and any(isinstance(cause, UnicodeDecodeError | ArrowException) for cause in causes):
            for file in chain.from_iterable(_files_of(place, config).values()):
                if file.suffix.lower() in TEXT_FORMATS and not is_utf8(file):
                    raise not_utf8(file) from error
                _is_empty(file)  # raises if it is no parquet file by its metadata
        if isinstance(error, ConnectionError) and place is None:
            reason = "the hub cannot be reached, and the dataset is not in its cache"
        else:
            reason = "the dataset cannot be opened"
        told = next((cause for cause in causes if not isinstance(cause, DatasetGenerationError)), error)
        nothing = "there is nothing in it" if isinstance(told, StopIteration) else type(told).__name__
        raise ConfigError(f"{reason} ({name}): {one_line(told) or nothing}") from error


def _files_of(place: Path, config: str | None) -> dict[str, list[Path]]:
    """The files of each split of a local dataset."""
    found = _builder(place, config).config.data_files or {}
    return {str(split): [Path(file) for file in files] for split, files in found.items()}


def account_of(path: str, config: str | None, splits: Sequence[str]) -> str | None:
    """One line that accounts for every file of a local dataset, of which `splits` are read; None for one on the hub."""
    place = local_place(path)
    if place is None:
        return None
    files = _files_of(place, config)
    names = {part.split("[")[0].strip() for split in splits for part in split.split("+")}
    pairs = [(file, name) for name, found in files.items() for file in found]
    # `datasets` resolves links to folders but not those to files; of two names of one file each keeps its own split.
    of_split = {resolve(file): name for resolve in (os.path.realpath, os.path.abspath) for file, name in pairs}
    endings = {file.suffix.lower() for file, _ in pairs}
    found = list_files(place) if place.is_dir() else [place]
    listed = set(map(os.path.realpath, found))
    found += [file for file, _ in pairs if os.path.realpath(file) not in listed]
    read = 0
    unused: dict[str, list[Path]] = {}
    for file in found:
        split = of_split.get(os.path.abspath(file), of_split.get(os.path.realpath(file)))
        is_read = split in names or (split and "all" in names)
        if is_read and not _is_empty(file):
            read += 1
            continue
        reason = (
            "without rows" if is_read
            else f"of the split {split}" if split
            else "hidden" if is_hidden(file, place)
            else "a link without a target" if not file.is_file()
            else f"not {' or '.join(sorted(endings))}" if file.suffix.lower() not in endings
            else "of no split by its name"
        )  # fmt: skip
        unused.setdefault(reason, []).append(file)
    return account(len(found), {"read": read}, unused, place)


def _is_empty(file: Path) -> bool:
    """Whether a file has no rows; ConfigError for a parquet file whose metadata cannot be read."""
    if file.suffix.lower() != ".parquet":
        return not file.stat().st_size
    from pyarrow.parquet import read_metadata  # here, as datasets

    from ..tables import reading as reading_table

    with reading_table(file):
        return not read_metadata(file).num_rows
