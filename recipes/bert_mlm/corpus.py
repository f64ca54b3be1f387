"""Text sources: each yields documents, one string at a time, and can say what it is without reading it all.

Adding a source is a class with `fingerprint()` and `documents()`, and a file in conf/data/.
"""

import ast
import glob
import hashlib
import importlib
import logging
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from lion_lightning.training.errors import ConfigError

log = logging.getLogger(__name__)
PASSAGE_CHARACTERS = 20_000
TOPIC_PASSAGE_CHARACTERS = 2_000  # a few topics are very long; whole, they would decide the validation set alone
_PARAGRAPH_BREAK = re.compile(r"\n\s*\n")


class Corpus(Protocol):
    """What the data module asks of a text source."""

    def fingerprint(self) -> str:
        """A string that changes whenever the documents would; cheap, since it is asked for at every start."""
        ...

    def documents(self) -> Iterator[str]:
        """The documents, always in the same order."""
        ...


class PythonDocs:
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


class TextFiles:
    """UTF-8 text files: a file, a folder (every `*.txt` and `*.md` below it) or a glob.

    Args:
        path: where the text is.

    Raises:
        ConfigError: nothing is there, or a file is not UTF-8.
    """

    SUFFIXES = (".txt", ".md")

    def __init__(self, path: str | None) -> None:
        if not path:
            raise ConfigError("data=text_files needs data.path=: a text file, a folder of .txt or .md files, or a glob")
        self.files = self._find(path)

    def _find(self, path: str) -> list[Path]:
        place = Path(path).expanduser()
        if place.is_dir():
            files = [file for file in place.rglob("*") if file.suffix in self.SUFFIXES and file.is_file()]
        elif place.is_file():  # before globbing: a name may have brackets in it
            files = [place]
        else:
            files = [Path(file) for file in glob.glob(str(place), recursive=True) if Path(file).is_file()]
        if not files:
            wanted = "no .txt or .md file in it" if place.is_dir() else "there is no such file or folder"
            raise ConfigError(f"data.path={path}: {wanted}")
        return sorted(file.resolve() for file in files)

    def fingerprint(self) -> str:
        stats = ((file, file.stat()) for file in self.files)
        return "text_files " + " ".join(f"{file}:{stat.st_size}:{stat.st_mtime_ns}" for file, stat in stats)

    def documents(self) -> Iterator[str]:
        for file in self.files:
            try:
                yield from passages(file.read_text(encoding="utf-8-sig"))
            except UnicodeDecodeError as error:
                raise ConfigError(
                    f"{file} is not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}); convert it first"
                ) from error


def passages(text: str, size: int = PASSAGE_CHARACTERS) -> Iterator[str]:
    """Cut a long text at paragraph breaks into passages of about `size` characters.

    A book is one document; cut up, a fixed share of every book can be held out for validation.
    """
    kept: list[str] = []
    length = 0
    for paragraph in _PARAGRAPH_BREAK.split(text):
        kept.append(paragraph)
        length += len(paragraph)
        if length >= size:
            yield "\n\n".join(kept)
            kept, length = [], 0
    if kept:
        yield "\n\n".join(kept)


def is_held_out(document: str, fraction: float) -> bool:
    """Whether `document` is for validation: decided by its content alone, whatever the order or the seed."""
    digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
