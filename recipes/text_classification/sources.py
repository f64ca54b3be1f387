"""Sources of labeled text: each yields a training and a validation set, and identifies its content cheaply.

Adding a source is a class with `fingerprint()` and `load()`, and a file in conf/data/.
"""

import os
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from datasets import ClassLabel, DatasetDict, load_dataset

from lion_lightning.errors import ConfigError

from ..files import account, check_fraction, existing_file, fingerprint_of, is_hidden, list_files, one_line
from ..tables import (
    READERS,
    Columns,
    Row,
    columns_of,
    declared_names,
    name_at,
    read_table,
    suffix_of,
)
from ..text.corpus import PythonDocs
from .labels import TextSplits, held_out, label_splits, some_held_out

SPLIT_NAME = re.compile(r"(training|train|validation|valid|val|dev)(?![a-z])")


class TextSource(Protocol):
    """The interface of a source of labeled text."""

    def fingerprint(self) -> str:
        """A string that changes whenever the texts would."""
        ...

    def load(self) -> TextSplits:
        """Read everything; the same texts in the same order each time."""
        ...

    def account(self) -> str | None:
        """One line that accounts for every file; None for a source without files."""
        return None


class PythonPackages(PythonDocs, TextSource):
    """Which package of the standard library a docstring is from: real, and on every machine.

    About 1,300 docstrings of 12 packages. Texts differ a little from one Python version to the next.

    Args:
        val_fraction: share held out, chosen by the texts' content. What `bert_mlm` holds out of the same texts with a
            smaller share is held out here too.
    """

    PACKAGES = (
        "asyncio", "_pydecimal", "email", "encodings", "http", "importlib", "inspect", "ipaddress", "logging",
        "unittest", "urllib", "xml",
    )  # fmt: skip

    def __init__(self, val_fraction: float = 0.2) -> None:
        self.val_fraction = check_fraction(val_fraction)

    def fingerprint(self) -> str:
        return f"python_packages {self.PACKAGES} {self.val_fraction} {sys.version}"

    def load(self) -> TextSplits:
        rows = [Row(text, None, name, number) for number, (text, name) in enumerate(self._labeled(), 1)]
        return label_splits(*held_out(rows, self.val_fraction))

    def _labeled(self) -> Iterator[tuple[str, str]]:
        root = Path(sysconfig.get_path("stdlib"))
        seen: set[str] = set()
        for package in self.PACKAGES:
            module = root / f"{package}.py"
            for path in [module] if module.is_file() else sorted((root / package).rglob("*.py")):
                if self.SKIPPED_PACKAGES.intersection(path.relative_to(root).parts):
                    continue
                for text in self._docstrings(path):
                    if text not in seen:  # the same text in two packages has no single label
                        seen.add(text)
                        yield text, package.removeprefix("_py")


class LabeledFiles(TextSource):
    """Your own table: CSV, TSV (without quoting), JSON lines or parquet, with a text or a pair of texts in each row.

    Args:
        path: a file, or a folder with `train*` and `val*`, `validation*` or `dev*` files.
        val_path: the validation file; without any, a share of the training rows is held out by their content.
        text_column, second_text_column, label_column: names in the header; `second_text_column` is None for one text.
        regression: whether the label is a value to predict.
        val_fraction: the share.
        max_left_out: rows without text or label that are left out and counted; more are an error.

    Raises:
        ConfigError: nothing usable is there.
    """

    def __init__(
        self,
        path: str | None,
        val_path: str | None = None,
        text_column: str = "text",
        second_text_column: str | None = None,
        label_column: str = "label",
        regression: bool = False,
        val_fraction: float = 0.1,
        max_left_out: int = 100,
    ) -> None:
        if not path:
            raise ConfigError(f"data=labeled_files needs data.path=: a folder, or a {', '.join(READERS)} file")
        second = None if second_text_column is None else str(second_text_column)
        self.columns = Columns(_named("text", text_column), _named("label", label_column), second)
        self.regression, self.val_fraction, self.max_left_out = regression, check_fraction(val_fraction), max_left_out
        self.train_files, self.val_files, self._account = _find(path, val_path)

    def fingerprint(self) -> str:
        settings = (self.columns, self.regression, self.val_fraction, self.max_left_out)
        return f"labeled_files {settings} {fingerprint_of(self.train_files)} | {fingerprint_of(self.val_files)}"

    def account(self) -> str | None:
        return self._account

    def load(self) -> TextSplits:
        train, val = self._rows(self.train_files), self._rows(self.val_files)
        pairs = self.columns.second is not None
        if not self.val_files:
            train, val = some_held_out(train, self.val_fraction, pairs, self.regression)
        return label_splits(
            train,
            val,
            pairs=pairs,
            regression=self.regression,
            declared=None if self.regression else declared_classes(self.train_files, self.columns.label),
            max_left_out=self.max_left_out,
        )

    def _rows(self, files: list[Path]) -> list[Row]:
        rows = [row for file in files for row in read_table(file, self.columns, by_name=not self.regression)]
        for file in files:
            header = columns_of(file)
            if twice := [name for name in self.columns.wanted() if header.count(name) > 1]:
                raise ConfigError(f"{file}: several columns have the name {twice[0]}; there are {', '.join(header)}")
        return rows


class Task(NamedTuple):
    """What a GLUE task is made of: its columns of text, the split to validate on, whether a value is predicted."""

    columns: tuple[str, ...]
    validation: str = "validation"
    regression: bool = False


class Glue(TextSource):
    """A task of GLUE (Wang et al., 2019, arXiv:1804.07461) in the schema of the hub's `nyu-mll/glue`.

    Args:
        task: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte or wnli. mnli is validated on its matched set.
        path: a folder that has the hub's parquet files, as `FOLDER/TASK/train-*.parquet`; None downloads them.
    """

    REPOSITORY = "nyu-mll/glue"
    TASKS = {  # noqa: RUF012, never changed
        "cola": Task(("sentence",)),
        "sst2": Task(("sentence",)),
        "mrpc": Task(("sentence1", "sentence2")),
        "stsb": Task(("sentence1", "sentence2"), regression=True),
        "qqp": Task(("question1", "question2")),
        "mnli": Task(("premise", "hypothesis"), validation="validation_matched"),
        "qnli": Task(("question", "sentence")),
        "rte": Task(("sentence1", "sentence2")),
        "wnli": Task(("sentence1", "sentence2")),
    }

    def __init__(self, task: str, path: str | None = None) -> None:
        if task not in self.TASKS:
            raise ConfigError(f"data.task must be one of {', '.join(self.TASKS)}, got {task!r}")
        self.name, self.task = task, self.TASKS[task]
        self.files: dict[str, list[Path]] = {}
        if path:
            folder = Path(path).expanduser() / task
            for split in ("train", self.task.validation):
                self.files[split] = sorted(folder.glob(f"{split}-*.parquet"))
                if not self.files[split]:
                    raise ConfigError(f"data.path={path}: there is no {task}/{split}-*.parquet")

    def fingerprint(self) -> str:
        files = chain.from_iterable(self.files.values())
        return f"glue {self.name} {fingerprint_of(files) or self.REPOSITORY}"

    def load(self) -> TextSplits:
        if self.files:
            columns = Columns(self.task.columns[0], "label", *self.task.columns[1:])
            by_name = not self.task.regression
            rows = [
                chain.from_iterable(read_table(file, columns, by_name) for file in part) for part in self.files.values()
            ]
            declared = declared_classes(self.files["train"], "label")
        else:
            splits = self._download()
            label = splits["train"].features.get("label")
            declared = tuple(label.names) if isinstance(label, ClassLabel) else None
            rows = [chain(self._rows(splits[name], declared)) for name in ("train", self.task.validation)]
        return label_splits(
            *rows, pairs=len(self.task.columns) == 2, regression=self.task.regression, declared=declared
        )

    def _download(self) -> DatasetDict:
        try:
            return load_dataset(self.REPOSITORY, self.name)
        except Exception as error:  # a dozen types of four libraries, all of which mean that there is no data
            raise ConfigError(
                f"data.task={self.name} cannot be loaded: {one_line(error)}; data.path= takes a folder"
            ) from error

    def _rows(self, dataset: Any, names: Sequence[str] | None) -> Iterator[Row]:
        texts = [dataset[name] for name in self.task.columns]
        seconds = texts[1] if len(texts) == 2 else [None] * len(dataset)
        for number, (text, second, label) in enumerate(zip(texts[0], seconds, dataset["label"], strict=True), 1):
            yield Row(text, second, label if names is None else name_at(names, label), number)


def declared_classes(files: Sequence[Path], label: str) -> tuple[str, ...] | None:
    """The names that training files declare for their classes, by first mention; None without any."""
    declared = [names for file in files if (names := declared_names(file, label)) is not None]
    return tuple(dict.fromkeys(chain.from_iterable(declared))) if declared else None


def _named(which: str, column: Any) -> str:
    """The name of a column, which Hydra reads as a number where it is one."""
    if column is None:
        raise ConfigError(f"data.source.{which}_column=null: it must be the name of a column")
    return str(column)


def _find(path: str, val_path: str | None) -> tuple[list[Path], list[Path], str]:
    """Files of training and of validation, and the account of all files at `path` and `val_path`."""
    folder = Path(path).expanduser()
    given = existing_file(val_path, "data.val_path", READERS) if val_path else None
    splits: dict[str, list[Path]] = {"train": [], "val": []}
    unused: dict[str, list[Path]] = {}
    if folder.is_dir():
        found = list_files(folder)
    else:
        found = splits["train"] = [existing_file(path, "data.path", READERS)]
    for file in found if folder.is_dir() else []:
        if given and os.path.realpath(file) == os.path.realpath(given):
            continue  # for validation, whatever its name says
        split = SPLIT_NAME.match(file.name.lower())
        is_train = split is not None and split[1].startswith("train")
        reason = (
            "hidden" if is_hidden(file, folder)
            else "in a folder below" if file.parent != folder
            else "a link without a target" if not file.is_file()
            else "no table" if suffix_of(file) not in READERS
            else "tables whose names begin with neither train nor val" if split is None
            else "not data.val_path" if given and not is_train
            else None
        )  # fmt: skip
        if reason is None:
            splits["train" if is_train else "val"].append(file)
        else:
            unused.setdefault(reason, []).append(file)
    for name, files in splits.items():
        endings = sorted({suffix_of(file) for file in files})
        if len(endings) > 1:
            raise ConfigError(
                f"data.path={path}: the {name} split is there as {' and '.join(endings)}, perhaps with the same rows; "
                "give one file as data.path="
            )
    if not splits["train"]:
        of_validation = len(found) - sum(map(len, unused.values()))
        seen = account(len(found), {"validation tables": of_validation}, unused, folder)
        raise ConfigError(f"data.path={path}: no train* file of {', '.join(READERS)} in it; {seen}")
    if given:
        splits["val"] = [given]
    train, val = (set(map(os.path.abspath, files)) for files in splits.values())
    named = f" ({val_path})" if given else ""
    used = {"training tables": len(train - val), f"validation tables{named}": len(val - train)}
    if both := len(train & val):
        used["tables for both"] = both
    on_disk = len({*map(os.path.abspath, found), *val})
    return splits["train"], splits["val"], account(on_disk, used, unused, folder)
