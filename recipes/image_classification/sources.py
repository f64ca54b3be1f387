"""Image sources: each yields decoded images of one size, as uint8 arrays with labels and class names.

Adding a source is a class with `fingerprint()` and `load()`, and a file in conf/data/.
"""

import io
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Image, Value, load_dataset
from PIL import Image as Picture

from lion_lightning.training.errors import ConfigError

log = logging.getLogger(__name__)
HERE = Path(__file__).parent
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_PIXELS = 64_000_000  # a larger picture is a mistake or an attack; it is skipped and counted
VAL_SHARE_SEED = 20_230_213


@dataclass(frozen=True)
class Images:
    """Decoded images.

    Attributes:
        pixels: uint8 (count, channels, height, width).
        labels: int64 (count,).
    """

    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageSplits:
    """A training and a validation set of the same classes."""

    train: Images
    val: Images
    classes: tuple[str, ...]


class ImageSource(Protocol):
    """What the data module asks of a source of images."""

    def fingerprint(self) -> str:
        """A string that changes whenever the images would."""
        ...

    def load(self) -> ImageSplits:
        """Decode everything; the same images in the same order each time."""
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

    def load(self) -> ImageSplits:
        with np.load(HERE / "digits.npz") as stored:
            # As RGB, since that is what the models' image processors make of any picture.
            everything = Images(np.repeat(stored["pixels"][:, None], 3, axis=1), stored["labels"].astype(np.int64))
        train, val = hold_out(everything, self.val_fraction)
        return ImageSplits(train, val, tuple(str(digit) for digit in range(10)))


class ImageFiles:
    """Pictures on disk: a folder with one folder per class, or parquet files as the Hugging Face hub writes them.

    Both are read by the `datasets` library. Files or folders named test, val or validation are the validation set;
    without any, a fixed share of the training set is held out.

    Args:
        path: the folder, or one parquet file.
        image_size: pictures are resized to this many pixels on the shorter side, and the middle square is taken.
        val_fraction: share held out where there is no validation set.
        max_broken: so many pictures that cannot be decoded are skipped; more are an error.

    Raises:
        ConfigError: nothing usable is there.
    """

    def __init__(
        self, path: str | None, image_size: int = 32, val_fraction: float = 0.1, max_broken: int = 100
    ) -> None:
        if not path:
            raise ConfigError(
                "data=image_files needs data.path=: an image folder, or parquet files in the hub's schema"
            )
        self.path = Path(path).expanduser()
        if not self.path.exists():
            raise ConfigError(f"data.path={path}: there is no such file or folder")
        self.image_size, self.val_fraction, self.max_broken = image_size, val_fraction, max_broken
        self.files = sorted(self.path.rglob("*.parquet")) if self.path.is_dir() else [self.path]
        self.is_parquet = bool(self.files)
        if not self.is_parquet:
            self.files = sorted(file for file in self.path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if not self.files:
            raise ConfigError(f"data.path={path}: no parquet file and no image in it")

    def fingerprint(self) -> str:
        stats = ((file.resolve(), file.stat()) for file in self.files)
        listed = " ".join(f"{file}:{stat.st_size}:{stat.st_mtime_ns}" for file, stat in stats)
        return f"image_files {self.image_size} {self.val_fraction} {self.max_broken} {listed}"

    def load(self) -> ImageSplits:
        splits = self._open()
        train_name, val_name = "train" if "train" in splits else next(iter(splits)), _validation_name(splits)
        image, label = _columns(splits[train_name])
        classes = _class_names(splits[train_name], label)
        train = self._decode(splits[train_name], image, label, classes)
        if val_name is None or val_name == train_name:
            train, val = hold_out(train, self.val_fraction)
        else:
            val = self._decode(splits[val_name], image, label, classes)
        if not len(train) or not len(val):
            raise ConfigError(
                f"data.path={self.path}: {len(train)} training and {len(val)} validation images; need both"
            )
        return ImageSplits(train, val, classes)

    def _open(self) -> DatasetDict:
        if not self.is_parquet:
            return load_dataset("imagefolder", data_dir=str(self.path), drop_labels=False)
        files: dict[str, list[str]] = {}
        for file in self.files:
            files.setdefault(_split_of(file), []).append(str(file))
        return load_dataset("parquet", data_files=files)

    def _decode(self, dataset: Dataset, image: str, label: str, classes: Sequence[str]) -> Images:
        pixels: list[np.ndarray] = []
        labels: list[int] = []
        broken: list[str] = []
        for number, row in enumerate(dataset.cast_column(image, Image(decode=False))):
            try:
                decoded = _square(row[image], self.image_size)
            except (OSError, ValueError, Picture.DecompressionBombError) as error:
                broken.append(f"{(row[image] or {}).get('path') or f'image {number}'}: {error}")
                self._check_broken(broken)
            else:
                pixels.append(decoded)
                labels.append(_class_index(row[label], classes, number, label))
        if broken:
            log.warning("%d of %d images are left out: %s", len(broken), len(dataset), "; ".join(broken[:3]))
        shape = (0, 3, self.image_size, self.image_size)
        return Images(np.stack(pixels) if pixels else np.empty(shape, np.uint8), np.array(labels, np.int64))

    def _check_broken(self, broken: Sequence[str]) -> None:
        if len(broken) > self.max_broken:
            raise ConfigError(
                f"data.path={self.path}: over {self.max_broken} images cannot be read, the last of them {broken[-1]}"
            )


def hold_out(images: Images, fraction: float) -> tuple[Images, Images]:
    """Split off a share of the images, always the same ones: (kept, held out)."""
    if not 0 < fraction < 1:
        raise ConfigError(f"data.val_fraction must be between 0 and 1, got {fraction}")
    order = np.random.default_rng(VAL_SHARE_SEED).permutation(len(images))
    held, kept = np.sort(order[: round(fraction * len(images))]), np.sort(order[round(fraction * len(images)) :])
    return Images(images.pixels[kept], images.labels[kept]), Images(images.pixels[held], images.labels[held])


def _split_of(file: Path) -> str:
    found = re.match(r"(test|validation|val)(?![a-z])", file.name.lower())
    return found[1] if found else "train"


def _validation_name(splits: Mapping[str, Any]) -> str | None:
    return next((name for name in ("validation", "val", "test") if name in splits), None)


def _columns(dataset: Dataset) -> tuple[str, str]:
    """The names of the image and of the label column."""
    images = [name for name, feature in dataset.features.items() if _is_image(feature)]
    labels = [name for name, feature in dataset.features.items() if isinstance(feature, ClassLabel)]
    labels += [name for name in ("label", "labels", "fine_label") if name in dataset.features and name not in labels]
    if not images or not labels:
        raise ConfigError(f"needs an image column and a label column, found {', '.join(dataset.column_names)}")
    return images[0], labels[0]


def _is_image(feature: Any) -> bool:
    return isinstance(feature, Image) or (isinstance(feature, dict) and {"bytes", "path"} <= feature.keys())


def _class_names(dataset: Dataset, label: str) -> tuple[str, ...]:
    feature = dataset.features[label]
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    values = {value for value in dataset[label] if value is not None}
    if isinstance(feature, Value) and feature.dtype.startswith(("int", "uint")):
        return tuple(str(value) for value in range(max(values) + 1))
    return tuple(sorted(str(value) for value in values))


def _class_index(value: Any, classes: Sequence[str], number: int, column: str) -> int:
    index = value if isinstance(value, int) else classes.index(value) if value in classes else -1
    if not 0 <= index < len(classes):
        raise ConfigError(
            f"image {number} has {column}={value!r}, which is none of the {len(classes)} training classes"
        )
    return index


def _square(stored: Mapping[str, Any] | None, size: int) -> np.ndarray:
    """Decode to uint8 (3, size, size): shorter side resized, middle square."""
    if not stored or not (stored["bytes"] or stored["path"]):
        raise ValueError("there is no picture")
    source = io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]
    with Picture.open(source) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise ValueError(f"{opened.width}x{opened.height} is over {MAX_PIXELS:,} pixels")
        picture = opened.convert("RGB")
    if picture.size != (size, size):
        scale = size / min(picture.size)
        width, height = (max(size, round(side * scale)) for side in picture.size)
        left, top = (width - size) // 2, (height - size) // 2
        resized = picture.resize((width, height), Picture.Resampling.BICUBIC)
        picture = resized.crop((left, top, left + size, top + size))
    return np.asarray(picture).transpose(2, 0, 1).copy()
