"""Images for classification, as a LightningDataModule: decoded once where they fit, or each time on access."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lion_lightning.data.cache import cache_at, cached_folder
from lion_lightning.data.stream import Picked, StreamDataModule
from lion_lightning.errors import ConfigError

from .images import (
    Broken,
    DecodedOnAccess,
    Images,
    ImageSplits,
    copies,
    decode,
    load,
    pixel_file,
    save,
)
from .labels import PictureSplits, class_notes
from .sources import ImageSource

FORMAT_VERSION = 8  # raise it when what is written to the cache changes
BYTES_PER_GIB = 2**30
STATISTICS_FROM_ARRAYS, STATISTICS_FROM_PICTURES = 10_000, 512
SAMPLED_AT_ONCE = 100
ON_THE_HOST = ("sample", "unreadable")  # read by the host only: on the device, reading them would synchronise


class ImageDataset(Dataset):
    """Decoded images, a batch at a time."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, pairs: list[tuple[int, int]]) -> dict[str, Tensor]:
        """`pixels` uint8 (batch, channels, height, width), `labels` and `sample` int64 (batch,)."""
        positions, indices = (list(part) for part in zip(*pairs, strict=True))
        return {
            "pixels": torch.from_numpy(self.images.pixels[indices]),
            "labels": torch.from_numpy(self.images.labels[indices]),
            "sample": torch.tensor(positions),
        }


class ImageArrays(StreamDataModule):
    """Images of one size: decoded once and kept as arrays, or decoded again each time where that would be too large.

    Args:
        source: where the images come from.
        batch_size, num_workers, seed, limit_train_samples: see `StreamDataModule`.
        cache_dir: where decoded images are kept; None for `lion_lightning` in the user's cache folder.
        path, image_size: arguments of the source; the path is shown in error messages.
        decoded_gib: images that take more than this once decoded are not kept decoded. Each is then decoded by the
            loader's processes on access, in training as a random part of the picture.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 1,
        limit_train_samples: int | None = None,
        cache_dir: str | None = None,
        path: str | None = None,
        image_size: int | None = None,
        decoded_gib: float = 16.0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, limit_train_samples)
        self.source, self.path, self.decoded_gib = source, path, decoded_gib
        self.cache = cache_at(cache_dir)
        self.classes: tuple[str, ...] = ()
        self.notes: dict[str, str] = {}
        self.unreadable = 0

    @override
    def prepare_data(self) -> None:
        self.setup("fit")

    @isolate_rng(include_cuda=False)  # only a first start prepares data, which must not change a run's random numbers
    @override
    def setup(self, stage: str) -> None:
        if self.classes:
            return
        key = f"{FORMAT_VERSION} {self.source.fingerprint()}"
        try:
            folder, reused = cached_folder(self.cache, key, self._write)
        except _TooLarge as found:
            self._decode_on_access(found.splits)
        else:
            self._use(load(folder), "from the cache" if reused else "decoded just now")

    def _write(self, folder: Path) -> None:
        opened = self.source.open()
        save(folder, self._decoded(opened, folder) if isinstance(opened, PictureSplits) else opened)

    def _decoded(self, splits: PictureSplits, folder: Path) -> ImageSplits:
        size, pictures = splits.size, {"train": splits.train, "val": splits.val}
        if sum(map(len, pictures.values())) * 3 * size**2 > self.decoded_gib * BYTES_PER_GIB:
            raise _TooLarge(splits)
        images, notes = {}, dict(splits.notes)
        for name, encoded in pictures.items():
            file = pixel_file(folder, name)
            try:
                labels, broken = decode(encoded, file, size, splits.max_broken)
            except ConfigError as error:
                raise ConfigError(f"data.path={self.path}: {error}") from error
            if len(labels) + len(broken) != len(encoded):
                raise RuntimeError(f"{len(encoded)} images, but {len(labels)} decoded and {len(broken)} left out")
            if not len(labels):
                raise ConfigError(
                    f"data.path={self.path}: none of the {len(encoded)} {name} images can be read: {broken[0][1]}"
                )
            images[name] = Images(np.load(file, mmap_mode="r"), labels)
            notes |= _left_out(name, broken, len(encoded))
        notes |= class_notes(images["train"].labels, images["val"].labels, splits.classes)
        if count := copies(images["train"], images["val"]):
            notes["copies"] = (
                f"{count:,} of {len(images['val']):,} validation images have the pixels of a training image"
            )
        return ImageSplits(images["train"], images["val"], splits.classes, notes)

    def _use(self, splits: ImageSplits, made: str) -> None:
        self.splits, self.made, self.val_share = splits, made, 1.0
        self.classes, self.notes = splits.classes, dict(splits.notes)
        self.image_shape = tuple(splits.train.pixels.shape[1:])
        self.train_set, self.val_set = ImageDataset(splits.train), ImageDataset(splits.val)
        self.train_labels = splits.train.labels

    def _decode_on_access(self, splits: PictureSplits) -> None:
        self.made = f"decoded on access: over {self.decoded_gib:g} GiB otherwise"
        self.classes, self.max_broken = splits.classes, splits.max_broken
        self.notes = {**splits.notes, **class_notes(splits.train.labels, splits.val.labels, splits.classes)}
        self.image_shape, self.val_share = (3, splits.size, splits.size), splits.share
        self.train_set = DecodedOnAccess(splits.train, splits.size, seed=self.seed)
        self.train_labels = splits.train.labels
        self.val_set = DecodedOnAccess(splits.val, splits.size, share=splits.share)
        self._for_statistics = DecodedOnAccess(splits.train, splits.size, share=splits.share)

    @property
    def ready(self) -> ImageSplits:
        """The decoded images; RuntimeError before `setup`, and where images are decoded on access."""
        if not hasattr(self, "splits"):
            raise RuntimeError("no decoded images: call setup('fit') first" if not self.classes else self.made)
        return self.splits

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "classes": ", ".join(self.classes)}

    @override
    def transfer_batch_to_device(
        self, batch: dict[str, Tensor], device: torch.device, dataloader_idx: int
    ) -> dict[str, Tensor]:
        if "unreadable" in batch:
            self._count_unreadable(int(batch["unreadable"].sum()))
        kept = {name: batch[name] for name in ON_THE_HOST if name in batch}
        moved = {name: value for name, value in batch.items() if name not in kept}
        return {**super().transfer_batch_to_device(moved, device, dataloader_idx), **kept}

    def _count_unreadable(self, found: int) -> None:
        self.unreadable += found
        if self.unreadable > self.max_broken:
            raise ConfigError(
                f"data.path={self.path}: over {self.max_broken} images cannot be read; the warnings name them"
            )

    def describe(self) -> dict[str, str]:
        """Lines for the summary at the start of a run."""
        channels, height, width = self.image_shape
        names = ", ".join(self.classes[:10]) + (", ..." if len(self.classes) > 10 else "")
        counts = f"{len(self.train_set):,} for training, {len(self.val_set):,} for validation"  # type: ignore[arg-type]
        return {
            "images": f"{counts} ({self.made})",
            "size": f"{width} x {height} pixels, {channels} channel{'s' if channels > 1 else ''}",
            "classes": f"{len(self.classes)}: {names}",
            **self.notes,
        }

    def validation_pixels(self, indices: list[int]) -> np.ndarray:
        """Validation images, uint8 (images, channels, height, width)."""
        batch = self.val_set.__getitems__([(index, index) for index in indices])  # type: ignore[attr-defined]
        return batch["pixels"].numpy()

    @override
    def hold_out(self, is_held: np.ndarray) -> None:
        super().hold_out(is_held)
        if not hasattr(self, "splits"):  # decoded as for validation, without training's random crops
            self.val_set = Picked(self._for_statistics, np.flatnonzero(is_held))

    def pixel_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel of the training images, in units of 0 to 1."""
        if hasattr(self, "splits"):
            pixels = self.splits.train.pixels
            if len(pixels) > STATISTICS_FROM_ARRAYS:  # spread over them: they may be in the order of their classes
                pixels = pixels[np.linspace(0, len(pixels) - 1, STATISTICS_FROM_ARRAYS).astype(int)]
        else:
            pixels = np.concatenate(list(self.sample_pixels(STATISTICS_FROM_PICTURES)))
        sample = pixels.astype(np.float32) / 255
        return sample.mean((0, 2, 3)).tolist(), sample.std((0, 2, 3)).clip(min=1e-3).tolist()

    def sample_pixels(self, count: int) -> Iterator[np.ndarray]:
        """Training images that are readable, evenly spread over the data, which may be in the order of its classes.

        Args:
            count: at most this many.

        Returns:
            uint8 (images, channels, height, width), up to 100 images at a time, decoded as for validation.
        """
        is_decoded = hasattr(self, "splits")
        images: Any = ImageDataset(self.splits.train) if is_decoded else self._for_statistics
        places = list(dict.fromkeys(np.linspace(0, len(images) - 1, count).astype(int).tolist()))
        for start in range(0, len(places), SAMPLED_AT_ONCE):
            batch = images.__getitems__([(place, place) for place in places[start : start + SAMPLED_AT_ONCE]])
            pixels = batch["pixels"] if is_decoded else batch["pixels"][~batch["unreadable"]]
            yield pixels.numpy()


class _TooLarge(Exception):
    """The images do not fit decoded; nothing has been written."""

    def __init__(self, splits: PictureSplits) -> None:
        self.splits = splits


def _left_out(name: str, broken: Broken, count: int) -> dict[str, str]:
    """A line on the pictures of a set that cannot be read."""
    if not broken:
        return {}
    shown = "; ".join(line for _, line in broken[:3]) + (" ..." if len(broken) > 3 else "")
    return {f"left out ({name})": f"{len(broken):,} of {count:,} images cannot be read: {shown}"}
