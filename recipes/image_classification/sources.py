"""Image sources: the embedded digits, pictures on disk, and data sets of the Hugging Face hub.

Adding a source is a class with `fingerprint()` and `open()`, and a file in conf/data/.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Image, Value, load_dataset
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from lion_lightning.errors import ConfigError
from recipes.files import fingerprint_of
from recipes.image_classification.images import Images, ImageSplits, Pictures, held_out

HERE = Path(__file__).parent
IMAGE_SUFFIXES = frozenset(ImageFolder.EXTENSIONS)
VALIDATION_NAMES = ("validation", "val", "test")
ABOUT_IMAGES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # that the loader of folders reads
LABEL_NAMES = ("label", "labels", "fine_label")
MAX_CLASSES = 1_000_000  # a larger number in a column of bare numbers is no class


@dataclass(frozen=True)
class PictureSplits:
    """Pictures for training and validation that are not decoded yet.

    Attributes:
        size: pixels on each side once they are.
        max_broken: so many that cannot be decoded are left out; more are an error.
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


class ImageSource(Protocol):
    """The interface of an image source."""

    def fingerprint(self) -> str:
        """A string that changes whenever the images would."""
        ...

    def open(self) -> ImageSplits | PictureSplits:
        """The images, decoded or not; the same in the same order each time."""
        ...


class Digits:
    """The 1,797 handwritten 8x8 digits of the UCI repository (Alpaydin and Kaynak, 1998, CC BY 4.0), embedded.

    Args:
        val_fraction: share held out, the same images whatever the seed.
    """

    def __init__(self, val_fraction: float = 0.2) -> None:
        self.val_fraction = val_fraction

    def fingerprint(self) -> str:
        return f"digits {self.val_fraction}"

    def open(self) -> ImageSplits:
        with np.load(HERE / "digits.npz") as stored:
            # As RGB, since that is what the models' image processors make of any picture.
            pixels, labels = np.repeat(stored["pixels"][:, None], 3, axis=1), stored["labels"].astype(np.int64)
        kept, held = held_out(len(labels), self.val_fraction)
        classes = tuple(str(digit) for digit in range(10))
        return ImageSplits(Images(pixels[kept], labels[kept]), Images(pixels[held], labels[held]), classes)


class ImageFiles:
    """Pictures on disk: a folder with one folder per class, or parquet files as the Hugging Face hub writes them.

    Both are read by the `datasets` library. Files or folders named test, val or validation are the validation set;
    without any, a fixed share of the training set is held out.

    Args:
        path: the folder, or one parquet file.
        image_size: pictures are resized to this many pixels on the shorter side, and the middle square is taken.
        val_fraction: share held out where there is no validation set.
        max_broken: so many pictures that cannot be decoded are left out; more are an error.
        label: the label column; None finds it.
        val_share: of the shorter side that validation sees, where pictures are decoded on access.

    Raises:
        ConfigError: nothing usable is there.
    """

    def __init__(
        self,
        path: str | None,
        image_size: int = 32,
        val_fraction: float = 0.1,
        max_broken: int = 100,
        label: str | None = None,
        val_share: float = 1.0,
    ) -> None:
        if not path:
            raise ConfigError("data.path=null: it must be an image folder, or parquet files in the hub's schema")
        if not isinstance(image_size, int) or image_size < 1:
            raise ConfigError(f"data.image_size must be a whole number of at least 1, got {image_size!r}")
        if not 0 < val_share <= 1:
            raise ConfigError(f"data.source.val_share must be in (0, 1], got {val_share}")
        self.path = Path(path).expanduser()
        self.image_size, self.val_fraction, self.max_broken = image_size, val_fraction, max_broken
        self.label, self.val_share = label, val_share
        self._find_files()

    def _find_files(self) -> None:
        if not self.path.exists():
            raise ConfigError(f"data.path={self.path}: there is no such file or folder")
        found = sorted(self.path.rglob("*")) if self.path.is_dir() else [self.path]
        parquet = [file for file in found if file.suffix == ".parquet" and file.name not in ABOUT_IMAGES]
        self.is_parquet = bool(parquet) or self.path.is_file()
        self.files = parquet or [file for file in found if file.suffix.lower() in IMAGE_SUFFIXES]
        if not self.files:
            raise ConfigError(f"data.path={self.path}: no parquet file and no image in it")
        known = {*self.files, *(file for file in found if file.name in ABOUT_IMAGES or file.name.startswith("."))}
        self.others = [file for file in found if file.is_file() and file not in known]

    def fingerprint(self) -> str:
        settings = f"{self.image_size} {self.val_fraction} {self.max_broken} {self.label} {len(self.others)}"
        return f"image_files {settings} {fingerprint_of(self.files)}"

    def open(self) -> PictureSplits:
        notes = {}
        if self.others:
            name = self.others[0].relative_to(self.path)
            notes["not read"] = f"{len(self.others):,} files that are no images, the first of them {name}"
        try:
            return self._pictures(self._load(), notes)
        except ConfigError as error:
            raise ConfigError(f"data.path={self.path}: {error}") from error

    def _load(self) -> DatasetDict:
        files: dict[str, list[str]] = {}
        for file in self.files:
            inside = file.relative_to(self.path) if self.path.is_dir() else Path(file.name)
            files.setdefault(_split_of(inside), []).append(str(file))
        try:
            if not self.is_parquet:
                return load_dataset("imagefolder", data_dir=str(self.path), drop_labels=False)
            return load_dataset("parquet", data_files=files)
        except Exception as error:  # of pyarrow, fsspec and datasets, none with a common base
            raise ConfigError(f"cannot be read: {_root_cause(error)}") from error

    def _pictures(self, splits: DatasetDict, notes: Mapping[str, str]) -> PictureSplits:
        return pictures_of(
            splits, self.image_size, self.val_fraction, self.max_broken, self.label, self.val_share, notes
        )


class HubImages(ImageFiles):
    """A data set of the Hugging Face hub, or its parquet files in a folder.

    Args:
        dataset: its name, such as `uoft-cs/cifar10`.
        path: a folder with its parquet files; None fetches them, once.
        gated: whether its terms must be accepted first, by a person who is logged in.
        revision: a commit, tag or branch of it.
        image_size, max_broken, label, val_share: see `ImageFiles`.
    """

    def __init__(
        self,
        dataset: str,
        path: str | None = None,
        image_size: int = 32,
        max_broken: int = 100,
        label: str | None = None,
        val_share: float = 1.0,
        gated: bool = False,
        revision: str = "main",
    ) -> None:
        self.dataset, self.gated, self.revision, self.fetched = dataset, gated, revision, path is None
        super().__init__(path or dataset, image_size, max_broken=max_broken, label=label, val_share=val_share)

    def _find_files(self) -> None:
        self.others: list[Path] = []
        if not self.fetched:
            super()._find_files()

    def fingerprint(self) -> str:
        if not self.fetched:
            return super().fingerprint()
        return f"hub {self.dataset} {self.revision} {self.image_size} {self.max_broken} {self.label}"

    def open(self) -> PictureSplits:
        if not self.fetched:
            return super().open()
        try:
            splits = load_dataset(self.dataset, revision=self.revision)
        except Exception as error:  # of the network, the hub and the cache, none with a common base
            raise ConfigError(self._advice(error)) from error
        return self._pictures(splits, {})

    def _advice(self, error: Exception) -> str:
        login = f"accept its terms at huggingface.co/datasets/{self.dataset} and run `hf auth login`, or "
        return (
            f"data: {self.dataset} cannot be had from the Hugging Face hub ({_root_cause(error)}); "
            f"{login if self.gated else ''}set data.path= to a folder with its parquet files"
        )


def pictures_of(
    splits: DatasetDict,
    size: int,
    val_fraction: float,
    max_broken: int,
    label: str | None,
    share: float,
    notes: Mapping[str, str],
) -> PictureSplits:
    """The pictures of a dataset with a training set and, if it has one, a validation set.

    Raises:
        ConfigError: a column is missing, an image has no class, or nothing is left for one of the two sets.
    """
    train_name = "train" if "train" in splits else next(iter(splits))
    val_name = next((name for name in VALIDATION_NAMES if name in splits and name != train_name), None)
    image, label = find_columns(splits[train_name], label)
    classes = class_names(splits[train_name], label)

    def pictures(name: str) -> Pictures:
        if {image, label} - set(splits[name].column_names):
            raise ConfigError(f"the {name} files have no column {image} or {label}, which the training files have")
        rows = splits[name].cast_column(image, Image(decode=False))
        return Pictures(rows, image, class_indices(rows, label, classes, name))

    train = pictures(train_name)
    if val_name is None:
        kept, held = held_out(len(train), val_fraction)
        train, val = train.subset(kept), train.subset(held)
    else:
        val = pictures(val_name)
    if not len(train) or not len(val):
        raise ConfigError(f"{len(train)} training and {len(val)} validation images; need both")
    told = {**notes, **class_notes(train.labels, val.labels, classes)}
    return PictureSplits(train, val, classes, size, max_broken, share, told)


def _split_of(file: Path) -> str:
    """By the name of the file, else of the folder it is in: `test-00000.parquet`, `default/test/0000.parquet`."""
    for name in reversed(file.parts):
        found = re.match(r"(train|test|validation|val)(?![a-z])", name.lower())
        if found:
            return found[1]
    return "train"


def _root_cause(error: BaseException) -> str:
    """The first line of the innermost cause, which the libraries wrap in general messages."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (f"{type(error).__name__}: {error}".splitlines() or [type(error).__name__])[0]


def find_columns(dataset: Dataset, label: str | None = None) -> tuple[str, str]:
    """The names of the image and of the label column; `label` chooses one of several."""
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
    """A line on classes that cannot be learned, and one on those that never occur."""
    trained, validated = Counter(train.tolist()), Counter(val.tolist())
    never = [f"{classes[index]} ({validated[index]:,} images)" for index in sorted(validated.keys() - trained.keys())]
    absent = [classes[index] for index in range(len(classes)) if index not in trained and index not in validated]
    notes = {"only in validation": _listed(never), "without any image": _listed(absent)}
    return {name: line for name, line in notes.items() if line}


def _listed(names: Sequence[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown:,} more" if len(names) > shown else "")


def _values(dataset: Dataset, label: str) -> list[Any]:
    return dataset.select_columns([label])[:][label]
