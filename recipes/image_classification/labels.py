"""Which columns of a dataset hold the pictures and their classes, and which class each picture has."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Image, Value

from lion_lightning.errors import ConfigError

LABEL_NAMES = ("label", "labels", "fine_label")
MAX_CLASSES = 1_000_000  # a larger number in a column of bare numbers is no class


def find_columns(dataset: Dataset, label: str | None = None) -> tuple[str, str]:
    """The names of the image and of the label column; `label` says which one where there are several."""
    features = dataset.features
    images = [name for name, feature in features.items() if _is_image(feature)]
    labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    labels += [name for name in LABEL_NAMES if name in features and name not in labels]
    labels = [name for name in features if name == label] if label else labels
    if not images or not labels:
        wanted = f"a label column {label}" if label else "a label column"
        raise ConfigError(f"needs an image column and {wanted}, found {', '.join(dataset.column_names)}")
    if not isinstance(features[labels[0]], ClassLabel | Value):
        raise ConfigError(f"the label column {labels[0]} must hold one class per image, not {features[labels[0]]}")
    return images[0], labels[0]


def _is_image(feature: Any) -> bool:
    return isinstance(feature, Image) or (isinstance(feature, dict) and {"bytes", "path"} <= feature.keys())


def class_names(dataset: Dataset, label: str) -> tuple[str, ...]:
    """The classes of the training set: as the dataset declares them, else those that occur."""
    feature = dataset.features[label]
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    values = {value for value in _values(dataset, label) if value is not None}
    if not values:
        raise ConfigError(f"the label column {label} is empty")
    if not feature.dtype.startswith(("int", "uint")):
        return tuple(sorted(str(value) for value in values))
    if max(values) >= MAX_CLASSES:
        raise ConfigError(f"the label column {label} holds {max(values)}, which is no class below {MAX_CLASSES:,}")
    return tuple(str(value) for value in range(max(values) + 1))


def class_indices(dataset: Dataset, label: str, classes: Sequence[str], split: str) -> np.ndarray:
    """The class of each image, int64 (images,); ConfigError for images that have none of `classes`."""
    numbers = {name: number for number, name in enumerate(classes)}
    values = _values(dataset, label)
    found = [value if isinstance(value, int) else numbers.get(str(value), -1) for value in values]
    indices = np.array([-1 if value is None else index for value, index in zip(values, found, strict=True)], np.int64)
    wrong = np.flatnonzero((indices < 0) | (indices >= len(classes)))
    if len(wrong):
        raise ConfigError(
            f"{split} image {wrong[0]} has {label}={values[wrong[0]]!r}, which is none of the {len(classes)} training "
            f"classes; so {'has' if len(wrong) == 1 else 'have'} {len(wrong):,} of {len(values):,} images"
        )
    return indices


def class_notes(train: np.ndarray, val: np.ndarray, classes: Sequence[str]) -> dict[str, str]:
    """A line on classes that cannot be learned, and one on those that are never asked for."""
    seen, asked = Counter(train.tolist()), Counter(val.tolist())
    never = [f"{classes[index]} ({asked[index]:,} images)" for index in sorted(asked.keys() - seen.keys())]
    absent = [classes[index] for index in range(len(classes)) if index not in seen and index not in asked]
    notes = {"only in validation": _listed(never), "without any image": _listed(absent)}
    return {name: line for name, line in notes.items() if line}


def _listed(names: Sequence[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown:,} more" if len(names) > shown else "")


def _values(dataset: Dataset, label: str) -> list[Any]:
    return dataset.select_columns([label])[:][label]
