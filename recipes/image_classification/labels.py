"""Pictures with the names of their classes become numbered sets: classes are mapped by name over files and splits."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value, concatenate_datasets

from lion_lightning.errors import ConfigError

from ..tables import check_names, in_order, label_name, name_at
from .images import Pictures, held_out

IMAGE_NAMES = ("image", "img")
LABEL_NAMES = ("label", "labels", "fine_label")
MAX_CLASSES = 1_000_000  # a larger number in a column of bare numbers is no class


@dataclass(frozen=True)
class PictureSplits:
    """Pictures for training and validation that are not decoded yet.

    Attributes:
        size: pixels on each side once they are.
        max_broken: pictures that cannot be decoded and are left out; more are an error.
        share: of the shorter side that validation sees, where pictures are decoded on access.
        notes: remarks about the data, for the summary.
    """

    train: Pictures
    val: Pictures
    classes: tuple[str, ...]
    size: int
    max_broken: int
    share: float
    notes: Mapping[str, str]


@dataclass(frozen=True)
class Part:
    """Pictures of one split whose labels mean the same.

    Attributes:
        data: the dataset, or the pictures alone.
        files: how many files it was read from.
        names: the class of each picture, where no column of `data` has it.
    """

    data: Dataset
    files: int
    names: Sequence[str] | None = None

    @classmethod
    def of_files(cls, files: Sequence[Path], names: Sequence[str]) -> "Part":
        """Pictures in files of their own, with the names of their classes."""
        rows = [{"bytes": None, "path": str(file)} for file in files]
        features = Features({"image": Image(decode=False)})
        return cls(Dataset.from_dict({"image": rows}, features=features), len(files), names)


Parts = dict[str, list[Part]]


def pictures_of(
    parts: Parts,
    size: int,
    val_fraction: float,
    max_broken: int,
    label: str | None,
    share: float,
    notes: Mapping[str, str],
) -> PictureSplits:
    """The pictures of the parts of a training set and, if there is one, a validation set; classes are mapped by name.

    Args:
        parts: of `train` and perhaps `val`.
        size, max_broken, share, notes: see `PictureSplits`.
        val_fraction: share held out where there is no validation set.
        label: the label column; None finds it.

    Raises:
        ConfigError: a column is missing, an image has no class, the classes of the parts cannot be mapped to each
            other, all images have one class, or nothing is left for one of the two sets.
    """
    if not parts.get("train"):
        raise ConfigError("there is no training image in it")
    read = {split: [_labelled(part, label, split) for part in found] for split, found in parts.items()}
    kinds = {found.kind for of_split in read.values() for found in of_split}
    if {"declared", "number"} <= kinds:
        raise ConfigError(
            "some files declare names for the numbers of their classes and others do not; declare them in all or none"
        )
    classes = _classes(read["train"], read.get("val", []))
    train = _pictures(read["train"], classes, "train")
    if "val" in read:
        val = _pictures(read["val"], classes, "validation")
        if not np.isin(val.labels, train.labels).any():
            found = [[classes[label] for label in np.unique(split.labels)] for split in (val, train)]
            raise ConfigError(
                f"no validation image has a class of training: they have {listed(found[0])}, those of training "
                f"{listed(found[1])}"
            )
    else:
        kept, held = held_out(len(train), val_fraction)
        lone = ~np.isin(train.labels[held], train.labels[kept])
        if not lone.all():  # the only pictures of a class are for training
            kept, held = np.sort(np.concatenate([kept, held[lone]])), held[~lone]
        train, val = train.subset(kept), train.subset(held)
    if not len(train) or not len(val):
        raise ConfigError(f"{len(train)} training and {len(val)} validation images; need both")
    if len(only := set(train.labels.tolist())) < 2:
        raise ConfigError(f"all {len(train)} training images have the class {classes[only.pop()]!r}; two are needed")
    choices = dict.fromkeys(found.choice for of_split in read.values() for found in of_split if found.choice)
    chosen = {"columns": "; ".join(choices)} if choices else {}
    return PictureSplits(train, val, classes, size, max_broken, share, {**notes, **chosen})


@dataclass(frozen=True)
class _Labelled:
    """Pictures and the names of their classes.

    Attributes:
        kind: how classes are given: `declared` numbers, bare `number`s or `name`s in a column, or by the `folder`.
        declared: the names in their order, where it declares them.
        choice: which columns were taken, where there were several.
    """

    rows: Dataset
    names: list[str | None]
    kind: str
    declared: tuple[str, ...] = ()
    choice: str = ""


def _labelled(part: Part, label: str | None, split: str) -> _Labelled:
    if part.names is not None:
        return _Labelled(part.data, list(part.names), "folder")
    image, column, choice = find_columns(part.data, label)
    rows = part.data.select_columns([image]).cast_column(image, Image(decode=False))
    rows = rows if image == "image" else rows.rename_column(image, "image")
    values, feature = part.data.select_columns([column])[:][column], part.data.features[column]
    if isinstance(feature, ClassLabel):
        return _Labelled(
            rows, [name_at(feature.names, value) for value in values], "declared", tuple(feature.names), choice
        )
    kind = "number" if feature.dtype.startswith(("int", "uint")) else "name"
    names = [label_name(value, f"{split} image {n}") for n, value in enumerate(values)]
    return _Labelled(rows, names, kind, choice=choice)


def _classes(train: Sequence[_Labelled], val: Sequence[_Labelled]) -> tuple[str, ...]:
    """The classes of the training set: as its files declare them, else those that occur."""
    counts = Counter(name for found in (*train, *val) for name in found.names if name is not None)
    check_names(counts)
    trained = {name for found in train for name in found.names if name is not None}
    if not trained:
        raise ConfigError("the label column is empty")
    if any(found.kind == "folder" for found in train):
        return in_order(counts)
    declared = tuple(dict.fromkeys(name for found in train for name in found.declared))
    if declared:
        return (*declared, *in_order(trained - set(declared)))
    if any(found.kind != "number" for found in train):
        return in_order(trained)
    most = max(map(int, trained))
    if most >= MAX_CLASSES:
        raise ConfigError(f"the label column holds {most}, which is no class below {MAX_CLASSES:,}")
    return tuple(str(number) for number in range(most + 1))


def _pictures(parts: Sequence[_Labelled], classes: Sequence[str], split: str) -> Pictures:
    """One set of all `parts`; ConfigError for images that have none of `classes`."""
    numbers = {name: number for number, name in enumerate(classes)}
    names = [name for part in parts for name in part.names]
    labels = np.array([numbers.get(name, -1) if name is not None else -1 for name in names], np.int64)
    wrong = np.flatnonzero(labels < 0)
    if len(wrong):
        raise ConfigError(
            f"{split} image {wrong[0]} has the label {names[wrong[0]]!r}, which is none of the {len(classes)} training "
            f"classes; so {'has' if len(wrong) == 1 else 'have'} {len(wrong):,} of {len(names):,} images"
        )
    rows = parts[0].rows if len(parts) == 1 else concatenate_datasets([part.rows for part in parts])
    if len(rows) != len(labels):
        raise RuntimeError(f"{len(rows)} pictures and {len(labels)} labels of {split}")
    return Pictures(rows, labels)


def find_columns(dataset: Dataset, label: str | None = None) -> tuple[str, str, str]:
    """The names of the image and of the label column, and which others there were; `label` chooses one of several."""
    features = dataset.features
    images = [name for name, feature in features.items() if _is_image(feature)]
    labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    labels += [name for name in LABEL_NAMES if name in features and name not in labels]
    labels = [name for name in features if name == label] if label else labels
    if not images or not labels:
        wanted = f"a label column {label}" if label else "a label column"
        form = "" if images else " (an image column is a struct of bytes and path)"
        form += "" if labels else "; data.source.label chooses the label column"
        raise ConfigError(f"needs an image column and {wanted}, found {', '.join(dataset.column_names)}{form}")
    image = _one_of(images, IMAGE_NAMES, "image", "call the one with the pictures image")
    labels = [name for name in labels if isinstance(features[name], ClassLabel | Value)] or labels
    column = _one_of(labels, LABEL_NAMES, "label", "data.source.label chooses")
    if not isinstance(features[column], ClassLabel | Value):
        raise ConfigError(f"the label column {column} must hold one class per image, not {features[column]}")
    several = [(images, image), (labels, column)]
    return image, column, "; ".join(f"{one} of {', '.join(found)}" for found, one in several if len(found) > 1)


def _one_of(found: Sequence[str], preferred: Sequence[str], kind: str, advice: str) -> str:
    best = [name for name in preferred if name in found] or found
    if len(best) > 1 and best is found:
        raise ConfigError(f"there are {len(found)} {kind} columns, {', '.join(found)}; {advice}")
    return best[0]


def _is_image(feature: Any) -> bool:
    return isinstance(feature, Image) or (isinstance(feature, dict) and {"bytes", "path"} <= feature.keys())


def class_notes(train: np.ndarray, val: np.ndarray, classes: Sequence[str]) -> dict[str, str]:
    """A line on classes that cannot be learned, and one on those that never occur."""
    trained, validated = Counter(train.tolist()), Counter(val.tolist())
    never = [f"{classes[index]} ({validated[index]:,} images)" for index in sorted(validated.keys() - trained.keys())]
    absent = [classes[index] for index in range(len(classes)) if index not in trained and index not in validated]
    notes = {"only in validation": listed(never), "without any image": listed(absent)}
    return {name: line for name, line in notes.items() if line}


def listed(names: Sequence[str], shown: int = 5) -> str:
    """The first `shown` names, and how many more there are."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown:,} more" if len(names) > shown else "")
