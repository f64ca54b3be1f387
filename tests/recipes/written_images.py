"""Pictures, folders and parquet files that the tests of the image recipe write."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from lion_lightning.recipes.image_classification.data import ImageArrays
from lion_lightning.recipes.image_classification.images import Images, ImageSplits
from lion_lightning.recipes.image_classification.sources import ImageFiles

CLASSES = ("cat", "dog", "owl")
COLORS = {"cat": (200, 10, 10), "dog": (10, 200, 10), "owl": (10, 10, 200)}


def picture(name: str, size: tuple[int, int] = (10, 10), mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", size, COLORS[name]).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def colors_agree(images: Images, classes: Sequence[str]) -> bool:
    """Whether each picture has the color of the class that its label names."""
    expected = np.array([COLORS[classes[label]] for label in images.labels])
    return bool(np.abs(images.pixels.mean((2, 3)) - expected).max() < 3)


def write_folder(root: Path, counts: dict[str, int], size: tuple[int, int] = (10, 10), kind: str = "png") -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture(name, size).save(root / name / f"{number}.{kind}")
    return root


def hub_dataset(names: Sequence[str], column: str = "label") -> datasets.Dataset:
    """What `push_to_hub` uploads for an image classification set: an Image and a ClassLabel column."""
    features = datasets.Features({"image": datasets.Image(), column: datasets.ClassLabel(names=list(CLASSES))})
    rows = {"image": [picture(name) for name in names], column: [CLASSES.index(name) for name in names]}
    return datasets.Dataset.from_dict(rows, features=features)


def write_parquet(file: Path, blobs: Sequence[bytes | None], labels: Any, column: str = "label") -> Path:
    """A parquet file without the hub's notes on its columns, as pandas or Spark would leave it."""
    image = pa.array(
        [{"bytes": blob, "path": None} for blob in blobs], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    pq.write_table(pa.table({"image": image, column: labels}), file)
    return file


def prepared(path: Path, **settings: Any) -> ImageArrays:
    source = ImageFiles(str(path), **{"image_size": 8, "val_fraction": 0.25, **settings})
    data = ImageArrays(source, batch_size=4, path=str(path))
    data.setup("fit")
    return data


def load(path: Path, **settings: Any) -> ImageSplits:
    return prepared(path, **settings).ready
