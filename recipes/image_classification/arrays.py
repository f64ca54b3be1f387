"""Decoded images as arrays: in memory, or memory-mapped from the folder they are kept in."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lion_lightning.errors import ConfigError

VAL_SHARE_SEED = 20_230_213
UNREADABLE = -1  # the label of a validation picture that cannot be decoded; no metric counts it


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
    """A training and a validation set of the same classes.

    Attributes:
        notes: what was noticed about the data, as lines for people.
    """

    train: Images
    val: Images
    classes: tuple[str, ...]
    notes: Mapping[str, str] = field(default_factory=dict)


def pixel_file(folder: Path, split: str) -> Path:
    """Where the pixels of `split` are kept in `folder`."""
    return folder / f"{split}-pixels.npy"


def save(folder: Path, splits: ImageSplits) -> None:
    """Write what `load` reads, but for pixels that are in their file already."""
    for split, images in (("train", splits.train), ("val", splits.val)):
        if not pixel_file(folder, split).exists():
            np.save(pixel_file(folder, split), images.pixels)
        np.save(folder / f"{split}-labels.npy", images.labels)
    about = {"classes": splits.classes, "notes": dict(splits.notes)}
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def load(folder: Path) -> ImageSplits:
    """What `save` wrote; pixels stay on the disk until they are looked at."""
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    train, val = (
        Images(np.load(pixel_file(folder, split), mmap_mode="r"), np.load(folder / f"{split}-labels.npy"))
        for split in ("train", "val")
    )
    return ImageSplits(train, val, tuple(about["classes"]), about["notes"])


def held_out(count: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Which of `count` images are kept for training and which are held out: always the same ones, each in order."""
    if not 0 < fraction < 1:
        raise ConfigError(f"data.val_fraction must be between 0 and 1, got {fraction}")
    order = np.random.default_rng(VAL_SHARE_SEED).permutation(count)
    held = round(fraction * count)
    return np.sort(order[held:]), np.sort(order[:held])
