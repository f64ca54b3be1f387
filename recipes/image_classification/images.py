"""Images as arrays: one picture decoded to RGB pixels of one size, all of them into a file, and that file read back."""

import hashlib
import io
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset as Rows
from PIL import Image as Picture
from PIL import ImageOps
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lion_lightning.errors import ConfigError

from ..files import check_fraction

VAL_SHARE_SEED = 20_230_213
UNREADABLE = -1  # the label of a validation picture that cannot be decoded; no metric counts it
MAX_PIXELS = 64_000_000  # a larger picture, as stored or as resized, is a mistake or an attack
AREA, LOG_ASPECT = (0.08, 1.0), (math.log(3 / 4), math.log(4 / 3))
ATTEMPTS = 10
SIXTEEN_BITS_PER_BYTE = 257  # 65,535 becomes 255
SIXTEEN_BITS_IN_32 = ("PNG", "PPM")  # formats whose 16-bit values Pillow gives as 32-bit integers
log = logging.getLogger(__name__)
CHUNK = 256  # pictures that a process decodes before it reports the broken ones
PICTURES_PER_PROCESS = 2_000  # with fewer, starting one costs more than it saves
Broken = list[tuple[int, str]]


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
        notes: remarks about the data, for the summary.
    """

    train: Images
    val: Images
    classes: tuple[str, ...]
    notes: Mapping[str, str] = field(default_factory=dict)


def pixel_file(folder: Path, split: str) -> Path:
    """Where the pixels of `split` are kept in `folder`."""
    return folder / f"{split}-pixels.npy"


def save(folder: Path, splits: ImageSplits) -> None:
    """Write what `load` reads; pixel files that exist already are kept."""
    for split, images in (("train", splits.train), ("val", splits.val)):
        if not pixel_file(folder, split).exists():
            np.save(pixel_file(folder, split), images.pixels)
        np.save(folder / f"{split}-labels.npy", images.labels)
    about = {"classes": splits.classes, "notes": dict(splits.notes)}
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def load(folder: Path) -> ImageSplits:
    """Read what `save` wrote; pixels are memory-mapped."""
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    train, val = (
        Images(np.load(pixel_file(folder, split), mmap_mode="r"), np.load(folder / f"{split}-labels.npy"))
        for split in ("train", "val")
    )
    return ImageSplits(train, val, tuple(about["classes"]), about["notes"])


def copies(train: Images, val: Images) -> int:
    """How many validation images have the pixels of a training image."""
    known = {_digest(image) for image in train.pixels}
    return sum(_digest(image) in known for image in val.pixels)


def _digest(image: np.ndarray) -> bytes:
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def held_out(count: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Which of `count` images are kept for training and which are held out: always the same ones, each in order."""
    order = np.random.default_rng(VAL_SHARE_SEED).permutation(count)
    held = round(check_fraction(fraction) * count)
    return np.sort(order[held:]), np.sort(order[:held])


def square(stored: Mapping[str, Any] | None, size: int, share: float = 1.0) -> np.ndarray:
    """The middle of a picture, resized: the shorter side with bicubic interpolation, then the middle square.

    Args:
        stored: `bytes` of an encoded picture, or its `path`, as the `datasets` library keeps it.
        size: pixels on each side of the result.
        share: of the shorter side that is kept; 0.875 for the usual evaluation on ImageNet (256 cut to 224).

    Returns:
        uint8 (3, size, size).

    Raises:
        ValueError, OSError and whatever else Pillow's decoders raise: there is no picture that can be used.
    """
    picture = read(stored)
    edge, short = shorter_edge(size, share), min(picture.size)
    # Rounded down as the image processor of the export does, so that both make the same pixels.
    width, height = (edge if side == short else int(edge * side / short) for side in picture.size)
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{picture.width}x{picture.height}, resized to {width}x{height}, is over {MAX_PIXELS:,} pixels"
        )
    left, top = (width - size) // 2, (height - size) // 2
    resized = picture.resize((width, height), Picture.Resampling.BICUBIC)
    return _pixels(resized.crop((left, top, left + size, top + size)))


def shorter_edge(size: int, share: float) -> int:
    """Pixels of a picture's shorter side, of which the middle `size` are `share`."""
    return round(size / share)


def random_resized_crop(stored: Mapping[str, Any] | None, size: int, draw: np.random.Generator) -> np.ndarray:
    """A part of a picture with 8 to 100 % of its area and sides of 3:4 to 4:3 (Szegedy et al., 2015), resized.

    Arguments, result and errors are those of `square`; `draw` chooses the part.
    """
    picture = read(stored)
    box = _random_box(*picture.size, draw)
    return _pixels(picture.resize((size, size), Picture.Resampling.BICUBIC, box=box, reducing_gap=3.0))


def read(stored: Mapping[str, Any] | None) -> Picture.Image:
    """Decode to RGB, rotated as its EXIF orientation says."""
    if not stored or not (stored["bytes"] or stored["path"]):
        raise ValueError("there is no picture")
    with Picture.open(io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise ValueError(f"{opened.width}x{opened.height} is over {MAX_PIXELS:,} pixels")
        if opened.mode == "F" or (opened.mode == "I" and opened.format not in SIXTEEN_BITS_IN_32):
            kind = "floats" if opened.mode == "F" else "or signed integers"
            raise ValueError(f"its values are 32-bit {kind}, whose range is unknown")
        return _rgb(ImageOps.exif_transpose(opened))


def _rgb(picture: Picture.Image) -> Picture.Image:
    if picture.mode.startswith("I"):  # Pillow's own conversion cuts 16 bits off at 255 instead of scaling them
        values = np.asarray(picture).clip(0, 65_535) // SIXTEEN_BITS_PER_BYTE
        picture = Picture.fromarray(values.astype(np.uint8))
    return picture.convert("RGB")


def _random_box(width: int, height: int, draw: np.random.Generator) -> tuple[int, int, int, int]:
    for _ in range(ATTEMPTS):
        area, aspect = width * height * draw.uniform(*AREA), math.exp(draw.uniform(*LOG_ASPECT))
        wide, high = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(draw.integers(width - wide + 1)), int(draw.integers(height - high + 1))
            return left, top, left + wide, top + high
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def _pixels(picture: Picture.Image) -> np.ndarray:
    return np.asarray(picture).transpose(2, 0, 1).copy()


@dataclass(frozen=True)
class Pictures:
    """Encoded pictures and the class of each.

    Attributes:
        rows: the dataset, memory-mapped; its column `image` is not decoded.
        labels: int64 (count,).
    """

    rows: Rows
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Sequence[int]) -> list[Mapping[str, Any] | None]:
        return self.rows[list(indices)]["image"]

    def subset(self, indices: np.ndarray) -> "Pictures":
        return Pictures(self.rows.select(indices), self.labels[indices])


def decode(pictures: Pictures, file: Path, size: int, max_broken: int) -> tuple[np.ndarray, Broken]:
    """Decode `pictures` on all cores into the .npy file `file`, uint8 (count, 3, size, size).

    Returns:
        The labels of those that could be decoded, and number and error of those that could not: they are left out.

    Raises:
        ConfigError: more than `max_broken` cannot be decoded.
    """
    np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=(len(pictures), 3, size, size)).flush()
    numbers = range(len(pictures))
    chunks = [list(numbers[start : start + CHUNK]) for start in range(0, len(pictures), CHUNK)]
    processes = min(_cores(), len(pictures) // PICTURES_PER_PROCESS)
    loader = DataLoader(_IntoFile(pictures, file, size), batch_sampler=chunks, num_workers=processes, collate_fn=list)
    console = Console(stderr=True)
    broken: Broken = []
    quiet = not console.is_terminal
    for found in track(loader, f"decoding {file.stem}", console=console, transient=True, disable=quiet):
        broken += found
        if len(broken) > max_broken:
            raise ConfigError(f"over {max_broken} images cannot be read, the last of them {broken[-1][1]}")
    if broken:
        _leave_out(file, [number for number, _ in broken])
    return np.delete(pictures.labels, [number for number, _ in broken]), broken


class _IntoFile(Dataset):
    """Each process writes its pictures into the shared file and returns only the errors."""

    def __init__(self, pictures: Pictures, file: Path, size: int) -> None:
        self.pictures, self.file, self.size = pictures, file, size

    def __getitems__(self, numbers: Sequence[int]) -> Broken:
        pixels = np.load(self.file, mmap_mode="r+")
        broken: Broken = []
        for number, stored in zip(numbers, self.pictures.read(numbers), strict=True):
            decoded = attempt(square, number, stored, self.size)
            if isinstance(decoded, str):
                broken.append((number, decoded))
            else:
                pixels[number] = decoded
        return broken


def attempt(
    decoding: Callable[..., np.ndarray], number: int, stored: Mapping[str, Any] | None, *how: int
) -> np.ndarray | str:
    """`decoding(stored, *how)`, or one line on why there is no picture."""
    try:
        return decoding(stored, *how)
    except Exception as error:  # Pillow's decoders raise any type on malformed bytes; each is counted and reported
        name = (stored or {}).get("path") or f"image {number}"
        return f"{name}: {error}".splitlines()[0]


def _leave_out(file: Path, numbers: Sequence[int]) -> None:
    pixels = np.load(file, mmap_mode="r")
    kept = np.delete(np.arange(len(pixels)), numbers)
    rest = file.with_name(f"kept-{file.name}")
    target = np.lib.format.open_memmap(rest, mode="w+", dtype=np.uint8, shape=(len(kept), *pixels.shape[1:]))
    for start in range(0, len(kept), CHUNK):
        target[start : start + CHUNK] = pixels[kept[start : start + CHUNK]]
    target.flush()
    os.replace(rest, file)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class DecodedOnAccess(Dataset):
    """Batches of pictures that the loader's processes decode, for sets that do not fit decoded.

    Args:
        size: pixels on each side.
        seed: keys the part of each training picture that is seen, together with its position in the run; None for
            validation, which sees the middle, `share` of the shorter side.
    """

    def __init__(self, pictures: Pictures, size: int, seed: int | None = None, share: float = 1.0) -> None:
        self.pictures, self.size, self.seed, self.share = pictures, size, seed, share

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitems__(self, pairs: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """As `ImageDataset` gives them, and `unreadable` bool (batch,).

        In training the next picture that can be read takes the place of one that cannot; in validation the place stays
        black, with the label `UNREADABLE`.
        """
        read = [self._one(position, index) for position, index in pairs]
        pixels, indices, unreadable = zip(*read, strict=True)
        labels = torch.from_numpy(self.pictures.labels[list(indices)])
        missing = torch.tensor(unreadable)
        return {
            "pixels": torch.from_numpy(np.stack(pixels)),
            "labels": labels if self.seed is not None else labels.masked_fill(missing, UNREADABLE),
            "sample": torch.tensor([position for position, _ in pairs]),
            "unreadable": missing,
        }

    def _one(self, position: int, index: int) -> tuple[np.ndarray, int, bool]:
        for number in range(index, index + CHUNK if self.seed is not None else index + 1):
            number %= len(self)
            stored = self.pictures.read([number])[0]
            decoded = attempt(self._decoded, number, stored, position)
            if not isinstance(decoded, str):
                return decoded, number, number != index
            log.warning("left out: %s", decoded)
        if self.seed is not None:
            raise ConfigError(f"{CHUNK} images in a row cannot be read, the last of them {decoded}")
        return np.zeros((3, self.size, self.size), np.uint8), index, True

    def _decoded(self, stored: Mapping[str, Any] | None, position: int) -> np.ndarray:
        if self.seed is None:
            return square(stored, self.size, self.share)
        return random_resized_crop(stored, self.size, np.random.default_rng((self.seed, position)))
