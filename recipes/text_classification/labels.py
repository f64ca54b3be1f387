"""Rows of text and label -> texts with numbered classes; what is wrong with a row is counted or told in a line."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lion_lightning.errors import ConfigError

log = logging.getLogger(__name__)
MAX_CLASSES = 1000
SHOWN = 3  # examples in a message


class Row(NamedTuple):
    """A text or a pair of texts, and its label, as they were found; `number` counts from 1 in its file."""

    text: Any
    second: Any
    label: Any
    number: int


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
