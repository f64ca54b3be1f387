"""Labeled rows: which of them are used, the numbers of their classes, and what is held out for validation."""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from lion_lightning.errors import ConfigError

from ..tables import Row, check_names, in_order, label_name
from ..text.corpus import digest, is_held_out

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
    declared: Sequence[str] | None = None,
    max_left_out: int = 100,
) -> TextSplits:
    """Number the classes of the training rows by their names and check that the validation rows have no others.

    Args:
        train, val: the rows; those without a label or a text are left out and counted.
        pairs: whether a row needs a second text.
        regression: whether labels are values to predict.
        declared: the names of all classes in their order, where the training files declare them.
        max_left_out: rows that may be left out; more are an error.

    Raises:
        ConfigError: too many unusable rows, none left in a split, one class alone, a class that is not declared,
            classes that only validation has, names that cannot be told apart, so many classes that the label must be
            a value, or a value that is no number.
    """
    left_out: Counter[str] = Counter()
    kept: dict[str, list[Row]] = {}
    for name, rows in (("train", train), ("val", val)):
        kept[name] = list(_usable(rows, name, pairs, left_out, max_left_out))
    for name, used in kept.items():
        if not used:
            raise ConfigError(f"data: the {name} split has no usable row (left out: {_listed(left_out) or 'none'})")
    if left_out:
        log.warning("%d rows are left out: %s", left_out.total(), _listed(left_out))
    labels: dict[str, list[float]]
    if regression:
        classes: tuple[str, ...] = ()
        labels = {name: [_value(row, name) for row in rows] for name, rows in kept.items()}
    else:
        names = {name: [_name(row, name) for row in rows] for name, rows in kept.items()}
        classes = _classes(names["train"], names["val"], declared)
        index = {name: number for number, name in enumerate(classes)}
        labels = {split: [index[name] for name in found] for split, found in names.items()}
    sides = {
        split: Labeled([row.text for row in rows], [row.second for row in rows] if pairs else None, labels[split])
        for split, rows in kept.items()
    }
    return TextSplits(sides["train"], sides["val"], classes, dict(left_out))


def _usable(rows: Iterable[Row], split: str, pairs: bool, left_out: Counter[str], max_left_out: int) -> Iterator[Row]:
    for row in rows:
        reason = _unusable(row, split, pairs)
        if reason is None:
            yield row
            continue
        left_out[reason] += 1
        if left_out.total() > max_left_out:
            raise ConfigError(
                f"data: over {max_left_out} rows cannot be used ({_listed(left_out)}), the last of them row "
                f"{row.number} of {split}"
            )


def _unusable(row: Row, split: str, pairs: bool) -> str | None:
    if _name(row, split) is None:
        return "no label"
    for text in (row.text, row.second) if pairs else (row.text,):
        if not isinstance(text, str):
            return "no text"
        if not text.strip():
            return "an empty text"
    return None


def _name(row: Row, split: str) -> Any:
    return label_name(row.label, f"data: row {row.number} of {split}")


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} with {reason}" for reason, count in counts.items())


def _value(row: Row, split: str) -> float:
    try:
        value = math.nan if "_" in str(row.label) else float(row.label)  # float takes 1_5 for 15
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"a value to predict must be a number: row {row.number} of {split} has {row.label!r}")
    return value


def _classes(train: Sequence[str], val: Sequence[str], declared: Sequence[str] | None) -> tuple[str, ...]:
    """The names of the classes by number, after checking that every label is one of them."""
    found, validated = Counter(train), Counter(val)
    if len(found) > MAX_CLASSES:
        raise ConfigError(
            f"data: {len(found):,} different labels in {len(train):,} rows, over {MAX_CLASSES:,}; a value to predict "
            "needs data.source.regression=true"
        )
    check_names(found + validated)
    if declared is not None and (other := [name for name in found if name not in declared]):
        raise ConfigError(
            f"data: {found[other[0]]:,} training rows have the label {other[0]!r}, none of the names that other "
            f"training files declare for their numbers: {', '.join(declared[:SHOWN])} ..."
        )
    if len(found) < 2:
        raise ConfigError(f"data: all {len(train)} training rows have the label {train[0]!r}; two classes are needed")
    strange = validated.keys() - found.keys()
    if strange:
        shown = ", ".join(f"{name!r} ({validated[name]} rows)" for name in sorted(strange)[:SHOWN])
        raise ConfigError(f"data: {len(strange)} labels of validation are in no training row: {shown}{_hint(strange)}")
    if declared is not None:
        return tuple(declared)
    return in_order(found)


def _hint(names: Iterable[str]) -> str:
    """The end of a message about labels that may be values to predict."""
    return "; values to predict need data.source.regression=true" if _are_values(names) else ""


def _are_values(names: Iterable[str]) -> bool:
    """Whether names of classes are numbers, and not all whole."""
    try:
        return not all(float(name).is_integer() for name in names)
    except (ValueError, OverflowError):
        return False


def held_out(rows: list[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """(kept, held out): by content alone, so that copies of a text are on the same side, whatever the order."""
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        sides[is_held_out(_content(row), fraction)].append(row)
    return sides


def _content(row: Row) -> str:
    return f"{row.text}\n{row.second}" if row.second else str(row.text)


def some_held_out(rows: list[Row], fraction: float, pairs: bool, regression: bool) -> tuple[list[Row], list[Row]]:
    """(kept, held out) as `held_out` has them, but whatever chance decides, there is a text to validate on.

    Texts without which training would lack a class are kept, and where none is held out, one is.

    Args:
        rows: all of them.
        fraction: the share that is held out.
        pairs, regression: see `label_splits`.

    Raises:
        ConfigError: every text is the only one of its class.
    """
    usable = [
        (_content(row), "" if regression else str(_name(row, "train")))
        for row in rows
        if _unusable(row, "train", pairs) is None
    ]
    held = {content for content, _ in usable if is_held_out(content, fraction)}
    trained = {name for content, name in usable if content not in held}
    held -= {content for content, name in usable if name not in trained}
    if usable and not held:
        texts: dict[str, set[str]] = {}
        for content, name in usable:
            texts.setdefault(name, set()).add(content)
        needed = set(chain.from_iterable(found for found in texts.values() if len(found) == 1))
        free = set(chain.from_iterable(texts.values())) - needed
        if not free:
            raise ConfigError(
                f"data: none of the {len(usable)} usable rows can be held out for validation, since each is the only "
                f"text of its class; give more rows, or a validation file as data.val_path={_hint(texts)}"
            )
        held = {min(free, key=digest)}
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        sides[_content(row) in held].append(row)
    return sides
