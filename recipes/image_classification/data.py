"""Images for classification, as a LightningDataModule: decoded once, then memory-mapped uint8."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lion_lightning.training.cache import cached_folder, default_cache
from lion_lightning.training.data import StreamDataModule
from recipes.image_classification.sources import Images, ImageSource, ImageSplits

FORMAT_VERSION = 2  # raise it when what is written to the cache changes


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
    """Images of one size, decoded once and cached.

    Args:
        source: where the images come from.
        batch_size, num_workers, seed, limit_train_samples: see `StreamDataModule`.
        cache_dir: where decoded images are kept; None for `lion_lightning` in the user's cache folder.
        path, image_size: what the source was told; the summary shows the path.
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
    ) -> None:
        super().__init__(batch_size, num_workers, seed, limit_train_samples)
        self.source, self.path = source, path
        self.cache = Path(cache_dir).expanduser() if cache_dir else default_cache()
        self.splits: ImageSplits | None = None

    def prepare_data(self) -> None:
        self.setup("fit")

    def setup(self, stage: str) -> None:
        if self.splits is None:
            key = f"{FORMAT_VERSION} {self.source.fingerprint()}"
            folder, self._reused = cached_folder(self.cache, key, self._write)
            classes = tuple(json.loads((folder / "classes.json").read_text(encoding="utf-8")))
            self.splits = ImageSplits(_read(folder, "train"), _read(folder, "val"), classes)
            self.train_set, self.val_set = ImageDataset(self.splits.train), ImageDataset(self.splits.val)

    def _write(self, folder: Path) -> None:
        splits = self.source.load()
        for name, images in (("train", splits.train), ("val", splits.val)):
            np.save(folder / f"{name}-pixels.npy", images.pixels)
            np.save(folder / f"{name}-labels.npy", images.labels)
        (folder / "classes.json").write_text(json.dumps(splits.classes), encoding="utf-8")

    @property
    def ready(self) -> ImageSplits:
        """The images; RuntimeError before `setup`."""
        if self.splits is None:
            raise RuntimeError("call setup('fit') first")
        return self.splits

    def describe(self) -> dict[str, str]:
        """Lines for the summary at the start of a run."""
        channels, height, width = self.ready.train.pixels.shape[1:]
        made = "from the cache" if self._reused else "decoded just now"
        names = ", ".join(self.ready.classes[:10]) + (", ..." if len(self.ready.classes) > 10 else "")
        return {
            "images": f"{len(self.ready.train):,} for training, {len(self.ready.val):,} for validation ({made})",
            "size": f"{width} x {height} pixels, {channels} channel{'s' if channels > 1 else ''}",
            "classes": f"{len(self.ready.classes)}: {names}",
        }

    def pixel_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel of the training images, in units of 0 to 1."""
        sample = self.ready.train.pixels[:10_000].astype(np.float32) / 255
        return sample.mean((0, 2, 3)).tolist(), sample.std((0, 2, 3)).clip(min=1e-3).tolist()


def _read(folder: Path, name: str) -> Images:
    labels = np.load(folder / f"{name}-labels.npy")
    return Images(np.load(folder / f"{name}-pixels.npy", mmap_mode="r"), labels)
