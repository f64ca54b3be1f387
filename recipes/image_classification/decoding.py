"""Decoding pictures: all of them once into a file, by all cores; or each when it is asked for."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset as Rows
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lion_lightning.errors import ConfigError
from recipes.image_classification.arrays import UNREADABLE
from recipes.image_classification.pictures import random_resized_crop, square

log = logging.getLogger(__name__)
CHUNK = 256  # pictures a process decodes before it says how it went
PICTURES_PER_PROCESS = 2_000  # with fewer, starting one costs more than it saves
Broken = list[tuple[int, str]]


@dataclass(frozen=True)
class Pictures:
    """Encoded pictures and the class of each.

    Attributes:
        rows: the dataset, memory-mapped; its column `column` is not decoded.
        labels: int64 (count,).
    """

    rows: Rows
    column: str
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Sequence[int]) -> list[Mapping[str, Any] | None]:
        return self.rows[list(indices)][self.column]

    def subset(self, indices: np.ndarray) -> "Pictures":
        return Pictures(self.rows.select(indices), self.column, self.labels[indices])


def decode(pictures: Pictures, file: Path, size: int, max_broken: int) -> tuple[np.ndarray, Broken]:
    """Decode `pictures` into the .npy file `file`, uint8 (count, 3, size, size), as all cores go through them.

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
    """Each process writes where its pictures belong; nothing but what went wrong goes back."""

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
    except Exception as error:  # Pillow's decoders raise what they like at bytes from strangers; it is counted and told
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


class DecodedWhenAsked(Dataset):
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
