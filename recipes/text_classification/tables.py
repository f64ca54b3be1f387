"""Tables on disk, read row by row: CSV, TSV, JSON lines and parquet."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
from datasets import ClassLabel, Features

from lion_lightning.errors import ConfigError
from recipes.files import one_line

MAX_FIELD_CHARACTERS = 2**24
PARQUET_ROWS_PER_BATCH = 4096
Read = Callable[[Path], tuple[Sequence[str], Iterator[Sequence[Any]]]]


class Row(NamedTuple):
    """A text or a pair of texts, and its label, as they were found; `number` counts from 1 in its file."""

    text: Any
    second: Any
    label: Any
    number: int


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read; `second` is None where rows have one text."""

    text: str
    label: str
    second: str | None = None

    def wanted(self) -> list[str]:
        return [name for name in (self.text, self.second, self.label) if name is not None]


def read_table(file: Path, columns: Columns) -> Iterator[Row]:
    """The rows of a `.csv`, `.tsv`, `.jsonl`, `.json` (lines too) or `.parquet` file.

    A row that is shorter or longer than its header has no label that could be trusted: it comes without one.

    Raises:
        ConfigError: a column is missing, the file is not UTF-8, or its content does not fit its ending.
    """
    try:
        header, rows = READERS[file.suffix.lower()](file)
        missing = [name for name in columns.wanted() if name not in header]
        if missing:
            raise ConfigError(
                f"{file}: there is no column {', '.join(missing)}; there are {', '.join(map(str, header)) or 'none'} "
                "(data.text_column, data.second_text_column and data.label_column name them)"
            )
        text, label = header.index(columns.text), header.index(columns.label)
        second = header.index(columns.second) if columns.second else None
        for number, row in enumerate(rows, 1):
            if len(row) == len(header):
                yield Row(row[text], None if second is None else row[second], row[label], number)
            else:
                yield Row("", None, None, number)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file} is not UTF-8 (byte 0x{error.object[error.start]:02x}: {error.reason}); convert it first"
        ) from error
    except (csv.Error, pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{file} cannot be read: {one_line(error)}") from error


def class_names(file: Path, label: str) -> tuple[str, ...] | None:
    """The names that a parquet file of the hub declares for its classes; None where it declares none."""
    if file.suffix.lower() != ".parquet":
        return None
    try:
        feature = Features.from_arrow_schema(pyarrow.parquet.read_schema(file)).get(label)
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{file} cannot be read: {one_line(error)}") from error
    return tuple(feature.names) if isinstance(feature, ClassLabel) else None


def _separated(delimiter: str, quoting: int) -> Read:
    def read(file: Path) -> tuple[Sequence[str], Iterator[Sequence[Any]]]:
        def lines() -> Iterator[Sequence[str]]:
            csv.field_size_limit(MAX_FIELD_CHARACTERS)
            with file.open(encoding="utf-8-sig", newline="") as opened:
                yield from (row for row in csv.reader(opened, delimiter=delimiter, quoting=quoting) if row)  # type: ignore[arg-type]

        rows = lines()
        return next(rows, []), rows

    return read


def _json_lines(file: Path) -> tuple[Sequence[str], Iterator[Sequence[Any]]]:
    def objects() -> Iterator[Mapping[str, Any]]:
        with file.open(encoding="utf-8-sig") as opened:
            for number, line in enumerate(opened, 1):
                if line.strip():
                    yield _object(line, file, number)

    header = list(next(objects(), {}))
    return header, ([found.get(name) for name in header] for found in objects())


def _object(line: str, file: Path, number: int) -> Mapping[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file}, line {number} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(
            f"{file}, line {number} must be an object with a key for each column, not {line.strip()[:60]}"
        )
    return found


def _parquet(file: Path) -> tuple[Sequence[str], Iterator[Sequence[Any]]]:
    opened = pyarrow.parquet.ParquetFile(file)

    def rows() -> Iterator[Sequence[Any]]:
        for batch in opened.iter_batches(PARQUET_ROWS_PER_BATCH):
            yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)

    return opened.schema_arrow.names, rows()


READERS: dict[str, Read] = {
    ".csv": _separated(",", csv.QUOTE_MINIMAL),
    ".tsv": _separated("\t", csv.QUOTE_NONE),  # text/tab-separated-values has no quoting, nor have GLUE's files
    ".jsonl": _json_lines,
    ".json": _json_lines,
    ".parquet": _parquet,
}
