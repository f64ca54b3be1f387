"""Tables on disk, read row by row, and classes by name: CSV, TSV, JSON lines and parquet, for every recipe.

A label is identified by its name. Files may declare the same names in another order, so numbers are turned into names
file by file; names that cannot be told apart are an error.
"""

import csv
import gzip
import json
import logging
import math
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow
import pyarrow.parquet
from datasets import ClassLabel, Features

from lion_lightning.errors import ConfigError

from .files import conversion_of, one_line, without_surrogates

log = logging.getLogger(__name__)
MAX_FIELD_CHARACTERS = 2**24
LONG_TEXT_CHARACTERS = 100_000
PARQUET_ROWS_PER_BATCH = 4096
SHOWN_NAMES = 3
WHOLE_FLOAT = re.compile(r"-?\d+\.0+", re.ASCII)
HEADER_ROWS = 1_000  # of JSON lines; a key that only later rows have is no column
TEXT_HINT = (
    "the first line of a table names its columns; data.source.text_column, data.source.second_text_column and "
    "data.source.label_column choose among them"
)
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


def suffix_of(file: Path) -> str:
    """The ending by which `file` is read, in lower case: `.csv`, or `.csv.gz`."""
    endings = "".join(file.suffixes[-2:]).lower()
    return endings if endings in READERS else file.suffix.lower()


def read_table(file: Path, columns: Columns, by_name: bool = True, hint: str = TEXT_HINT) -> Iterator[Row]:
    """The rows of a file with one of the endings in `READERS`.

    A row that is shorter or longer than its header has no label that could be trusted: it comes without one.

    Args:
        file: its ending says how it is read.
        columns: what is read of it.
        by_name: whether numbers of classes become the names that the file declares for them; a number without a name,
            such as the hub's -1 for a secret label, becomes None.
        hint: how to choose other columns, for the error message.

    Raises:
        ConfigError: a column is missing, the file is not UTF-8, or its content does not fit its ending.
    """
    names = declared_names(file, columns.label) if by_name else None
    with reading(file):
        header, rows = READERS[suffix_of(file)](file)
        missing = [name for name in columns.wanted() if name not in header]
        if missing:
            raise ConfigError(
                f"{file}: there is no column {', '.join(missing)}; there are {', '.join(map(str, header)) or 'none'} "
                f"({hint})"
            )
        text, label = header.index(columns.text), header.index(columns.label)
        second = header.index(columns.second) if columns.second else None
        long: list[int] = []
        for number, row in enumerate(rows, 1):
            if len(row) == len(header):
                if isinstance(row[text], str) and len(row[text]) > LONG_TEXT_CHARACTERS:
                    long.append(number)
                found = row[label] if names is None else name_at(names, row[label])
                if by_name and names is None and isinstance(found, str) and WHOLE_FLOAT.fullmatch(found):
                    found = str(int(found.partition(".")[0]))  # as pandas writes numbers beside a hole
                first, other = (_clean(row[place]) if place is not None else None for place in (text, second))
                yield Row(first, other, found, number)
            else:
                yield Row("", None, None, number)
        if long:
            log.warning(
                "%s: %d texts have over %d characters, the first in row %d; is a quote not closed before it?",
                file, len(long), LONG_TEXT_CHARACTERS, long[0],
            )  # fmt: skip


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Whatever the readers raise for the content of `file` becomes a ConfigError."""
    try:
        yield
    except UnicodeDecodeError as error:
        advice = "convert it first" if file.suffix.lower() == ".gz" else conversion_of(file)
        raise ConfigError(f"{file} is not UTF-8 (byte 0x{error.object[error.start]:02x}); {advice}") from error
    except (csv.Error, pyarrow.ArrowException, OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{file} cannot be read: {one_line(error)}") from error


def _clean(cell: Any) -> Any:
    return without_surrogates(cell) if isinstance(cell, str) else cell


def columns_of(file: Path) -> Sequence[str]:
    """The names in the header of a table; ConfigError if it cannot be read."""
    with reading(file):
        return READERS[suffix_of(file)](file)[0]


def declared_names(file: Path, label: str) -> tuple[str, ...] | None:
    """The names that a parquet file of the hub declares for the classes in its column `label`; None without any."""
    if file.suffix.lower() != ".parquet":
        return None
    with reading(file):
        schema = pyarrow.parquet.read_schema(file)
        if label not in schema.names:
            return None
        # The column alone: `datasets` does not know every type that another may have.
        feature = Features.from_arrow_schema(pyarrow.schema([schema.field(label)], schema.metadata)).get(label)
    return tuple(feature.names) if isinstance(feature, ClassLabel) else None


def name_at(names: Sequence[str], number: int | None) -> str | None:
    """The name of class `number`; None where there is none."""
    return names[number] if number is not None and 0 <= number < len(names) else None


def label_name(label: Any, place: str) -> str | None:
    """The name of the class that a cell holds, None for a cell that is empty or blank.

    A column with holes turns whole numbers into floats, which must not make new classes: 2.0 is "2".

    Args:
        label: the cell.
        place: where it is, for the error message.

    Raises:
        ConfigError: the cell holds a list or another structure.
    """
    if label is None or (isinstance(label, float) and math.isnan(label)):
        return None
    if isinstance(label, str) and not label.strip():
        return None
    if not isinstance(label, str | int | float):
        raise ConfigError(f"{place} has the label {label!r}, a {type(label).__name__}; a class is one word or number")
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def check_names(counts: Mapping[str, int]) -> None:
    """ConfigError if two class names differ only in spaces, leading zeros or Unicode form, as `pos` and `pos ` do.

    Args:
        counts: samples of each class.
    """
    alike: dict[str, list[str]] = {}
    for name in counts:
        form = " ".join(unicodedata.normalize("NFKC", name).split())
        alike.setdefault(str(int(form)) if is_number(form) else form, []).append(name)
    for names in alike.values():
        if len(names) > 1:
            shown = " and ".join(f"{name!r} ({counts[name]:,} times)" for name in names[:SHOWN_NAMES])
            raise ConfigError(
                f"data: the labels {shown} differ only in spaces, leading zeros or Unicode form; write them alike"
            )


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names of classes in the order of their numbers: 1, 2, 10, then those that are words."""
    return tuple(sorted(names, key=lambda name: (not is_number(name), int(name) if is_number(name) else 0, name)))


def is_number(name: str) -> bool:
    """Whether `name` consists of the digits 0 to 9; other digits, such as ①, are letters here."""
    return name.isascii() and name.isdigit()


def _open(file: Path, newline: str | None = None) -> IO[str]:
    if file.suffix.lower() == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig", newline=newline)
    return file.open(encoding="utf-8-sig", newline=newline)


def _separated(delimiter: str, quoting: int) -> Read:
    def read(file: Path) -> tuple[Sequence[str], Iterator[Sequence[Any]]]:
        def lines() -> Iterator[Sequence[str]]:
            csv.field_size_limit(MAX_FIELD_CHARACTERS)
            with _open(file, newline="") as opened:
                reader = csv.reader(opened, delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[arg-type]
                begin = 1
                try:
                    for row in reader:
                        if row:
                            yield row
                        begin = reader.line_num + 1
                except csv.Error as error:
                    raise ConfigError(
                        f"{file}: the row that begins in line {begin} is not CSV ({error}); is a quote not closed? A "
                        "quote inside a quoted field is written twice"
                    ) from error

        rows = lines()
        return next(rows, []), rows

    return read


def _json_lines(file: Path) -> tuple[Sequence[str], Iterator[Sequence[Any]]]:
    def objects() -> Iterator[Mapping[str, Any]]:
        with _open(file) as opened:
            for number, line in enumerate(opened, 1):
                if line.strip():
                    yield _object(line, file, number)

    header = list(dict.fromkeys(key for found in islice(objects(), HEADER_ROWS) for key in found))
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


_PLAIN: dict[str, Read] = {
    ".csv": _separated(",", csv.QUOTE_MINIMAL),
    ".tsv": _separated("\t", csv.QUOTE_NONE),  # text/tab-separated-values has no quoting, nor have GLUE's files
    ".jsonl": _json_lines,
    ".json": _json_lines,
}
READERS: dict[str, Read] = {**_PLAIN, **{f"{ending}.gz": read for ending, read in _PLAIN.items()}, ".parquet": _parquet}
