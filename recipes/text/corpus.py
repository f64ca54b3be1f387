"""Text sources: each yields documents, one string at a time, and identifies its content without reading all of it.

A source is a file, folder or glob (`TextFiles`), a dataset of the Hugging Face hub (`HubText`), the documentation of
the running Python (`PythonDocs`), or several of these with weights (`Mixture`). To add one, write a `Corpus` and a file
in conf/data/.
"""

import ast
import glob
import hashlib
import importlib
import logging
import math
import re
import sys
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lion_lightning.errors import ConfigError, check_number

from ..files import account, fingerprint_of, is_hidden, list_files, not_utf8, pieces_of
from .hub import account_of, join_rows, load, reading

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)
PASSAGE_CHARACTERS, MIN_PASSAGE_CHARACTERS = 20_000, 400
MIN_PASSAGES = 50  # a small text is cut into shorter passages, so that some can be held out
TEXT_ENDINGS = (".txt", ".md")
TOPIC_PASSAGE_CHARACTERS = 2_000  # a few topics are very long; whole, they would decide the validation set alone
MAX_PARAGRAPH_CHARACTERS = 2**22  # a file without an empty line is cut there, and never held in memory as a whole
_PARAGRAPH_BREAK = re.compile(r"\n\s*\n")
ROWS_PER_READ = 1000
SETTING = "data.sources"
PLACES = ("path", "hub", "corpus")


class Corpus(Protocol):
    """The interface of a text source."""

    def fingerprint(self) -> str:
        """A string that changes whenever the documents would; cheap, since every start computes it."""
        ...

    def documents(self) -> Iterator[str]:
        """The documents, always in the same order."""
        ...

    def held_out(self) -> Iterator[str] | None:
        """The documents of a validation set that comes with the source; None to hold out a share of the documents."""
        return None

    def account(self) -> str | None:
        """One line that accounts for every file; None for a source without files."""
        return None


class PythonDocs(Corpus):
    """CPython's documentation topics and the standard library's docstrings: English that every machine already has.

    About 2 MB. It differs a little from one Python version to the next, so compare runs of one version.
    """

    SKIPPED_PACKAGES = frozenset({"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "__pycache__"})
    MIN_CHARACTERS = 80

    def fingerprint(self) -> str:
        return f"python_docs {TOPIC_PASSAGE_CHARACTERS} {sys.version}"

    def documents(self) -> Iterator[str]:
        topics = importlib.import_module("pydoc_data.topics").topics
        for name in sorted(topics):
            yield from passages(topics[name], TOPIC_PASSAGE_CHARACTERS)
        root = Path(sysconfig.get_path("stdlib"))
        for path in sorted(root.rglob("*.py")):
            if not self.SKIPPED_PACKAGES.intersection(path.relative_to(root).parts):
                yield from self._docstrings(path)

    def _docstrings(self, path: Path) -> Iterator[str]:
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError) as error:
            log.warning("%s is left out: %s", path.name, error)
            return
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) >= self.MIN_CHARACTERS:
                    yield text


class TextFiles(Corpus):
    """UTF-8 text files: a file, a folder (every `.txt` and `.md` file below it, links followed) or a glob.

    Args:
        path: where the text is.

    Raises:
        ConfigError: nothing is there, or a file is not UTF-8.
    """

    def __init__(self, path: str | None) -> None:
        if not path:
            raise ConfigError("data=text_files needs data.path=: a text file, a folder of .txt or .md files, or a glob")
        self.files, self._account = find_files(path)

    def account(self) -> str | None:
        return self._account

    def fingerprint(self) -> str:
        return "text_files " + fingerprint_of(self.files)

    def documents(self) -> Iterator[str]:
        size = sum(file.stat().st_size for file in self.files) // MIN_PASSAGES
        size = min(PASSAGE_CHARACTERS, max(MIN_PASSAGE_CHARACTERS, size))
        for number, file in enumerate(self.files):
            try:
                yield from passages(pieces_of(file), size, longest=size)
            except UnicodeDecodeError:
                raise not_utf8(file, self.files[number + 1 :]) from None


def find_files(path: str) -> tuple[list[Path], str]:
    """The text files at `path`, and one line that accounts for every file there.

    Args:
        path: a file, a folder with files that end in `TEXT_ENDINGS`, in capitals too, or a glob. Links are followed.

    Raises:
        ConfigError: there are none.
    """
    place = Path(path).expanduser()
    is_folder = place.is_dir()
    unused: dict[str, list[Path]] = {}
    if is_folder:
        found = list_files(place)
        for file in found:
            if is_hidden(file, place):
                unused.setdefault("hidden", []).append(file)
            elif not file.is_file():
                unused.setdefault("a link without a target", []).append(file)
            elif file.suffix.lower() not in TEXT_ENDINGS:
                unused.setdefault(f"neither {' nor '.join(TEXT_ENDINGS)}", []).append(file)
        files = sorted(set(found).difference(*unused.values()))
    elif place.is_file():  # before globbing: a name may have brackets in it
        found = files = [place]
    else:
        literal = str(place).replace("[", "[[]")
        matches = glob.glob(str(place), recursive=True) or glob.glob(literal, recursive=True)
        found = sorted({Path(file) for file in matches if not Path(file).is_dir()})
        files = [file for file in found if file.is_file()]
        unused["a link without a target"] = [file for file in found if not file.is_file()]
        place = next(folder for folder in place.parents if not glob.has_magic(str(folder)))
    if not files:
        if not is_folder:
            raise ConfigError(f"data.path={path}: there is no such file or folder")
        seen = account(len(found), {}, unused, place)
        raise ConfigError(f"data.path={path}: no {' or '.join(TEXT_ENDINGS)} file in it; {seen}")
    return files, account(len(found), {"read": len(files)}, unused, place)


def passages(
    text: str | Iterable[str], size: int = PASSAGE_CHARACTERS, longest: int = PASSAGE_CHARACTERS
) -> Iterator[str]:
    """Cut a long text into passages of about `size` characters, at paragraph breaks where it can be.

    A book as one document could not be shared between training and validation; its passages can.

    Args:
        text: whole, or in pieces that are cut anywhere.
        size: characters.
        longest: characters of a paragraph that is not cut at line ends, and of a line that is not cut between words.
    """
    paragraphs = _paragraphs([text] if isinstance(text, str) else text)
    parts = (
        [paragraph] if len(paragraph) <= longest else _joined(_lines(paragraph, longest), "\n", size)
        for paragraph in paragraphs
    )
    return _joined(chain.from_iterable(parts), "\n\n", size)


def _lines(paragraph: str, longest: int) -> Iterator[str]:
    for line in paragraph.split("\n"):
        if len(line) <= longest:
            yield line
        else:
            yield from textwrap.wrap(line, longest, expand_tabs=False, replace_whitespace=False, break_on_hyphens=False)


def _joined(parts: Iterable[str], separator: str, size: int) -> Iterator[str]:
    """As many of the parts at a time as have `size` characters, joined."""
    return (separator.join(group) for group in grouped(parts, size))


def grouped(texts: Iterable[str], characters: int, most: int | None = None) -> Iterator[list[str]]:
    """The texts in groups; one ends as soon as it has `characters` characters or `most` texts."""
    group: list[str] = []
    length = 0
    for text in texts:
        group.append(text)
        length += len(text)
        if length >= characters or len(group) == most:
            yield group
            group, length = [], 0
    if group:
        yield group


def _paragraphs(pieces: Iterable[str]) -> Iterator[str]:
    waiting = ""
    for piece in pieces:
        waiting += piece
        text = waiting.rstrip()  # a break may go on in the next piece
        *complete, last = _PARAGRAPH_BREAK.split(text)
        yield from complete
        waiting = last + waiting[len(text) :]
        while len(waiting) > MAX_PARAGRAPH_CHARACTERS:
            space = waiting.rfind(" ", 0, MAX_PARAGRAPH_CHARACTERS)
            end = space if space > 0 else MAX_PARAGRAPH_CHARACTERS
            yield waiting[:end]
            waiting = waiting[end:]
    yield from _PARAGRAPH_BREAK.split(waiting)


def digest(document: str) -> int:
    """A 64-bit hash of `document`."""
    return int.from_bytes(hashlib.blake2b(document.encode(), digest_size=8).digest(), "big")


def held_out_below(fraction: float) -> int:
    """The digest below which a document is for validation."""
    return math.ceil(fraction * 2**64)


def is_held_out(document: str, fraction: float) -> bool:
    """Whether `document` is for validation: decided by its content alone, independent of order and seed."""
    return digest(document) < held_out_below(fraction)


class HubText(Corpus):
    """A text column of a dataset, memory-mapped: downloads are kept in the library's cache.

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

    def account(self) -> str | None:
        return account_of(self.path, self.config, [split for split in (self.split, self.val_split) if split])

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
        with reading(f"{self.path}, {split}", self.path, self.config):
            yield from join_rows(rows, self.document_start)

    def _load(self, split: str) -> "datasets.Dataset":
        return load(self.path, self.config, split, self.column, self.revision, streaming=False)


@dataclass(frozen=True)
class Source:
    """A text source and its weight among others.

    Attributes:
        label: what it is called in the summary.
        corpus: its documents.
        weight: its share of the training tokens, relative to the other sources.
    """

    label: str
    corpus: Corpus
    weight: float


@dataclass(frozen=True)
class Mixture:
    """Text sources that share the training stream by weights.

    A source that is smaller than its share is repeated more often. Validation holds the held-out documents of all.
    """

    sources: tuple[Source, ...]


def mixture_of(sources: Sequence[Mapping[str, Any]] | None) -> Mixture:
    """The mixture that the setting `data.sources` describes.

    Args:
        sources: of each, `weight` (1 if left out) and where it is: `path` as for data=text_files, `hub` with the
            arguments of data=hub_text, or `corpus`.

    Raises:
        ConfigError: none, or one without a place or with a weight that is not above 0.
    """
    if not sources:
        raise ConfigError(
            f"data=mixture needs {SETTING}=, such as '[{{path: books, weight: 3}}, {{path: letters, weight: 1}}]'"
        )
    return Mixture(tuple(_source(dict(source)) for source in sources))


def check_weight(source: Mapping[str, Any]) -> float:
    """The weight of `source`; ConfigError if it is none."""
    weight = source.get("weight", 1)
    check_number(f"{SETTING}: weight", weight, "(0, inf)")
    return float(weight)


def place_of(source: Any) -> str:
    """Which of the keys `path`, `hub` and `corpus` locates `source`.

    Raises:
        ConfigError: none of them, or several.
    """
    given = [place for place in PLACES if place in source] if isinstance(source, Mapping) else []
    if len(given) != 1:
        raise ConfigError(f"{SETTING}: each source needs one of {', '.join(PLACES)}, got {source!r}")
    return given[0]


def _source(source: dict[str, Any]) -> Source:
    place, weight = place_of(source), check_weight(source)
    where = source.pop(place)
    source.pop("weight", None)
    try:
        if place == "hub":
            return Source(str(where), HubText(where, **source), weight)
        if source:
            raise TypeError(f"{', '.join(source)} means nothing for a source with {place}")
    except TypeError as error:
        raise ConfigError(f"{SETTING}: {error}") from error
    if place == "path":
        return Source(str(where), TextFiles(where), weight)
    return Source(type(where).__name__, where, weight)
