"""Sources of labeled text: each yields a training and a validation set, and identifies its content cheaply.

Adding a source is a class with `fingerprint()` and `load()`, and a file in conf/data/.
"""

import logging
import math
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from datasets import ClassLabel, DatasetDict, load_dataset

from lion_lightning.errors import ConfigError
from recipes.files import check_fraction, existing_file, fingerprint_of, one_line
from recipes.text.corpus import PythonDocs, is_held_out
from recipes.text_classification.tables import READERS, Columns, Row, class_names, read_table

log = logging.getLogger(__name__)
MAX_CLASSES = 1000
SHOWN = 3  # examples in a message


@dataclass(frozen=True)
class Labeled:
    """Usable rows.

    Attributes:
        texts: not empty.
        seconds: the second text of each pair; None where rows have one text.
        labels: number of the class, or the value to predict.
    """

    texts: list[str]
    seconds: list[str] | None
    labels: list[float]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class TextSplits:
    """A training and a validation set of the same classes.

    Attributes:
        classes: their names by number; empty where a value is predicted.
        left_out: rows that were left out, by the reason.
    """

    train: Labeled
    val: Labeled
    classes: tuple[str, ...]
    left_out: dict[str, int] = field(default_factory=dict)


def label_splits(
    train: Iterable[Row],
    val: Iterable[Row],
    *,
    pairs: bool = False,
    regression: bool = False,
    names: Sequence[str] | None = None,
    max_left_out: int = 100,
) -> TextSplits:
    """Number the classes of the training rows and check that the validation rows have no others.

    Args:
        train, val: the rows; those without a label or a text are left out and counted.
        pairs: whether a row needs a second text.
        regression: whether labels are values to predict.
        names: of the classes, where labels are their numbers already.
        max_left_out: so many rows may be left out; more are an error.

    Raises:
        ConfigError: too many unusable rows, none left in a split, one class alone, classes that only validation has, so
            many that the label must be a value, or a value that is no number.
    """
    left_out: Counter[str] = Counter()
    kept = {}
    for name, rows in (("train", train), ("val", val)):
        kept[name] = list(_usable(rows, name, pairs, names, left_out, max_left_out))
    for name, rows in kept.items():
        if not rows:
            raise ConfigError(f"data: the {name} split has no usable row (left out: {_listed(left_out) or 'none'})")
    if left_out:
        log.warning("%d rows are left out: %s", left_out.total(), _listed(left_out))
    if regression:
        classes: tuple[str, ...] = ()
        number: Callable[[Row, str], float] = _value
    else:
        classes = _classes(kept["train"], names)
        _check_same_classes(kept["train"], kept["val"], names)
        index = {name: place for place, name in enumerate(classes)}
        number = lambda row, split: index[_name(row.label, names)]  # noqa: E731
    labeled = {
        split: Labeled(
            texts=[row.text for row in rows],
            seconds=[row.second for row in rows] if pairs else None,
            labels=[number(row, split) for row in rows],
        )
        for split, rows in kept.items()
    }
    return TextSplits(labeled["train"], labeled["val"], classes, dict(left_out))


def _usable(
    rows: Iterable[Row],
    split: str,
    pairs: bool,
    names: Sequence[str] | None,
    left_out: Counter[str],
    max_left_out: int,
) -> Iterator[Row]:
    for row in rows:
        reason = _unusable(row, pairs, names)
        if reason is None:
            yield row
            continue
        left_out[reason] += 1
        if left_out.total() > max_left_out:
            raise ConfigError(
                f"data: over {max_left_out} rows cannot be used ({_listed(left_out)}), the last of them row "
                f"{row.number} of {split}"
            )


def _unusable(row: Row, pairs: bool, names: Sequence[str] | None) -> str | None:
    label = row.label
    if label is None or label == "" or (isinstance(label, float) and math.isnan(label)):
        return "no label"
    if names is not None and _name(label, names) not in names:  # the hub writes -1 where the label is kept secret
        return "no label"
    for text in (row.text, row.second) if pairs else (row.text,):
        if text is None or not isinstance(text, str):
            return "no text"
        if not text.strip():
            return "an empty text"
    return None


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} with {reason}" for reason, count in counts.items())


def _value(row: Row, split: str) -> float:
    try:
        value = float(row.label)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"a value to predict must be a number: row {row.number} of {split} has {row.label!r}")
    return value


def _name(label: Any, names: Sequence[str] | None) -> str:
    """The name of a class: a column with holes turns whole numbers into floats, which must not make new classes."""
    if names is not None and isinstance(label, int) and 0 <= label < len(names):
        return names[label]
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def _classes(rows: Sequence[Row], names: Sequence[str] | None) -> tuple[str, ...]:
    found = {_name(row.label, names) for row in rows}
    if len(found) < 2:
        raise ConfigError(f"data: all {len(rows)} training rows have the label {found.pop()!r}; two classes are needed")
    if len(found) > MAX_CLASSES:
        raise ConfigError(
            f"data: {len(found):,} different labels in {len(rows):,} rows, over {MAX_CLASSES:,}; a value to predict "
            "needs data.regression=true"
        )
    if names is not None:
        return tuple(names)
    return tuple(sorted(found, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name)))


def _check_same_classes(train: Sequence[Row], val: Sequence[Row], names: Sequence[str] | None) -> None:
    known = {_name(row.label, names) for row in train}
    strange = Counter(name for row in val if (name := _name(row.label, names)) not in known)
    if strange:
        shown = ", ".join(f"{name!r} ({count} rows)" for name, count in strange.most_common(SHOWN))
        raise ConfigError(f"data: {len(strange)} labels of validation are in no training row: {shown}")


class TextSource(Protocol):
    """The interface of a source of labeled text."""

    def fingerprint(self) -> str:
        """A string that changes whenever the texts would."""
        ...

    def load(self) -> TextSplits:
        """Read everything; the same texts in the same order each time."""
        ...


class PythonPackages(PythonDocs):
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


class LabeledFiles:
    """Your own table: CSV, TSV (without quoting), JSON lines or parquet, with a text or a pair of texts in each row.

    Args:
        path: a file, or a folder with `train*` and `val*`, `validation*` or `dev*` files.
        val_path: the validation file; without any, a share of the training rows is held out by their content.
        text_column, second_text_column, label_column: names in the header; `second_text_column` is None for one text.
        regression: whether the label is a value to predict.
        val_fraction: the share.
        max_left_out: so many rows without text or label are left out and counted; more are an error.

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
        self.columns = Columns(text_column, label_column, second_text_column)
        self.regression, self.val_fraction, self.max_left_out = regression, check_fraction(val_fraction), max_left_out
        self.train_files, self.val_files = _find(path)
        if val_path:
            self.val_files = [existing_file(val_path, "data.val_path", READERS)]

    def fingerprint(self) -> str:
        settings = (self.columns, self.regression, self.val_fraction, self.max_left_out)
        return f"labeled_files {settings} {fingerprint_of(self.train_files)} | {fingerprint_of(self.val_files)}"

    def load(self) -> TextSplits:
        train, val = self._rows(self.train_files), self._rows(self.val_files)
        if not self.val_files:
            train, val = held_out(train, self.val_fraction)
        return label_splits(
            train,
            val,
            pairs=self.columns.second is not None,
            regression=self.regression,
            names=None if self.regression else class_names(self.train_files[0], self.columns.label),
            max_left_out=self.max_left_out,
        )

    def _rows(self, files: list[Path]) -> list[Row]:
        return [row for file in files for row in read_table(file, self.columns)]


class Task(NamedTuple):
    """What a GLUE task is made of: its columns of text, the split to validate on, whether a value is predicted."""

    columns: tuple[str, ...]
    validation: str = "validation"
    regression: bool = False


class Glue:
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
        self.files: dict[str, list[str]] = {}
        if path:
            folder = Path(path).expanduser() / task
            for split in ("train", self.task.validation):
                self.files[split] = sorted(str(file) for file in folder.glob(f"{split}-*.parquet"))
                if not self.files[split]:
                    raise ConfigError(f"data.path={path}: there is no {task}/{split}-*.parquet")

    def fingerprint(self) -> str:
        files = (Path(file) for split in self.files.values() for file in split)
        return f"glue {self.name} {fingerprint_of(files) or self.REPOSITORY}"

    def load(self) -> TextSplits:
        splits = self._open()
        label = splits["train"].features.get("label")
        rows = [self._rows(splits[name]) for name in ("train", self.task.validation)]
        return label_splits(
            *rows,
            pairs=len(self.task.columns) == 2,
            regression=self.task.regression,
            names=label.names if isinstance(label, ClassLabel) else None,
        )

    def _open(self) -> DatasetDict:
        try:
            if self.files:
                return load_dataset("parquet", data_files=self.files)
            return load_dataset(self.REPOSITORY, self.name)
        except Exception as error:  # a dozen types of four libraries, all of which mean that there is no data
            raise ConfigError(
                f"data.task={self.name} cannot be loaded: {one_line(error)}; data.path= takes a folder"
            ) from error

    def _rows(self, dataset: Any) -> Iterator[Row]:
        missing = [name for name in (*self.task.columns, "label") if name not in dataset.column_names]
        if missing:
            found = ", ".join(dataset.column_names)
            raise ConfigError(f"data.task={self.name}: there is no column {', '.join(missing)}; there are {found}")
        texts = [dataset[name] for name in self.task.columns]
        seconds = texts[1] if len(texts) == 2 else [None] * len(dataset)
        for number, (text, second, label) in enumerate(zip(texts[0], seconds, dataset["label"], strict=True), 1):
            yield Row(text, second, label, number)


def held_out(rows: list[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """(kept, held out): by content alone, so that copies of a text are on the same side, whatever the order."""
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        sides[is_held_out(f"{row.text}\n{row.second or ''}" if row.second else str(row.text), fraction)].append(row)
    return sides


def _find(path: str) -> tuple[list[Path], list[Path]]:
    """Files of training and of validation."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return [existing_file(path, "data.path", READERS)], []
    files = sorted(file.resolve() for file in folder.iterdir() if file.suffix.lower() in READERS and file.is_file())
    named: Callable[[str], list[Path]] = lambda names: [  # noqa: E731
        file for file in files if re.match(rf"({names})(?![a-z])", file.name.lower())
    ]
    train = named("train|training")
    if not train:
        raise ConfigError(f"data.path={path}: no train* file of {', '.join(READERS)} in it")
    return train, named("val|valid|validation|dev")
