"""Text sources: each yields documents, one string at a time, and can say what it is without reading it all.

Adding a source is a `Corpus` and a file in conf/data/. Those of the Hugging Face hub are in `hub`.
"""

import ast
import codecs
import glob
import hashlib
import importlib
import logging
import re
import sys
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Protocol

from lion_lightning.errors import ConfigError

log = logging.getLogger(__name__)
PASSAGE_CHARACTERS = 20_000
TOPIC_PASSAGE_CHARACTERS = 2_000  # a few topics are very long; whole, they would decide the validation set alone
MAX_PARAGRAPH_CHARACTERS = 2**22  # a file without an empty line is cut there, and never held in memory as a whole
CHARACTERS_PER_READ = 2**20
_PARAGRAPH_BREAK = re.compile(r"\n\s*\n")


class Corpus(Protocol):
    """What the data module asks of a text source."""

    def fingerprint(self) -> str:
        """A string that changes whenever the documents would; cheap, since it is asked for at every start."""
        ...

    def documents(self) -> Iterator[str]:
        """The documents, always in the same order."""
        ...

    def held_out(self) -> Iterator[str] | None:
        """The documents of a validation set that comes with the source; None: a share of the documents serves."""
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
    """UTF-8 text files: a file, a folder (every `*.txt` and `*.md` below it) or a glob.

    Args:
        path: where the text is.

    Raises:
        ConfigError: nothing is there, or a file is not UTF-8.
    """

    def __init__(self, path: str | None) -> None:
        if not path:
            raise ConfigError("data=text_files needs data.path=: a text file, a folder of .txt or .md files, or a glob")
        self.files = find_files(path)

    def fingerprint(self) -> str:
        return "text_files " + fingerprint_of(self.files)

    def documents(self) -> Iterator[str]:
        for file in self.files:
            yield from passages(read_pieces(file))


def find_files(path: str, suffixes: Collection[str] = (".txt", ".md")) -> list[Path]:
    """The file at `path`, the files with one of `suffixes` in the folder at `path`, or those that the glob matches.

    Raises:
        ConfigError: there are none.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        files = [file for file in place.rglob("*") if file.suffix in suffixes and file.is_file()]
    elif place.is_file():  # before globbing: a name may have brackets in it
        files = [place]
    else:
        files = [Path(file) for file in glob.glob(str(place), recursive=True) if Path(file).is_file()]
    if not files:
        wanted = f"no {' or '.join(suffixes)} file in it" if place.is_dir() else "there is no such file or folder"
        raise ConfigError(f"data.path={path}: {wanted}")
    return sorted(file.resolve() for file in files)


def fingerprint_of(files: Iterable[Path]) -> str:
    """Names, sizes and times of `files`."""
    stats = ((file, file.stat()) for file in files)
    return " ".join(f"{file}:{stat.st_size}:{stat.st_mtime_ns}" for file, stat in stats)


def read_pieces(file: Path) -> Iterator[str]:
    """The text of `file`, a megabyte at a time.

    Raises:
        ConfigError: it is not UTF-8.
    """
    with file.open(encoding="utf-8-sig") as text:
        try:
            while piece := text.read(CHARACTERS_PER_READ):
                yield piece
        except UnicodeDecodeError:
            raise not_utf8(file) from None


def not_utf8(file: Path) -> ConfigError:
    """The error that names the first byte of `file` that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    with file.open("rb") as raw:
        while True:
            piece = raw.read(CHARACTERS_PER_READ)
            begun = len(decoder.getstate()[0])  # bytes of a character that the last piece cut
            try:
                decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                place, byte = done - begun + error.start, error.object[error.start]
                return ConfigError(f"{file} is not UTF-8 (byte {place} is 0x{byte:02x}); convert it first")
            if not piece:
                return ConfigError(f"{file} changed while it was read")
            done += len(piece)


def passages(text: str | Iterable[str], size: int = PASSAGE_CHARACTERS) -> Iterator[str]:
    """Cut a long text at paragraph breaks into passages of about `size` characters.

    A book is one document; cut up, a fixed share of every book can be held out for validation.

    Args:
        text: whole, or in pieces that are cut anywhere.
        size: characters.
    """
    kept: list[str] = []
    length = 0
    for paragraph in _paragraphs([text] if isinstance(text, str) else text):
        kept.append(paragraph)
        length += len(paragraph)
        if length >= size:
            yield "\n\n".join(kept)
            kept, length = [], 0
    if kept:
        yield "\n\n".join(kept)


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
    """64 bits that stand for the content of `document`."""
    return int.from_bytes(hashlib.blake2b(document.encode(), digest_size=8).digest(), "big")


def is_held_out(document: str, fraction: float) -> bool:
    """Whether `document` is for validation: decided by its content alone, whatever the order or the seed."""
    return digest(document) < fraction * 2**64
