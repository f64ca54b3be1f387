"""One picture: from bytes that anybody may have written to RGB pixels of one size."""

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image as Picture
from PIL import ImageOps

MAX_PIXELS = 64_000_000  # a larger picture is a mistake or an attack
AREA, LOG_ASPECT = (0.08, 1.0), (math.log(3 / 4), math.log(4 / 3))
ATTEMPTS = 10
SIXTEEN_BITS_PER_BYTE = 257  # 65,535 becomes 255


def square(stored: Mapping[str, Any] | None, size: int, share: float = 1.0) -> np.ndarray:
    """The middle of a picture, resized.

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
    if picture.size == (size, size):
        return _pixels(picture)
    width, height = (max(size, round(side * size / share / min(picture.size))) for side in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = picture.resize((width, height), Picture.Resampling.BICUBIC)
    return _pixels(resized.crop((left, top, left + size, top + size)))


def random_resized_crop(stored: Mapping[str, Any] | None, size: int, draw: np.random.Generator) -> np.ndarray:
    """A part of a picture with 8 to 100 % of its area and sides of 3:4 to 4:3 (Szegedy et al., 2015), resized.

    Arguments, result and errors are those of `square`; `draw` says which part.
    """
    picture = read(stored)
    box = _random_box(*picture.size, draw)
    return _pixels(picture.resize((size, size), Picture.Resampling.BICUBIC, box=box, reducing_gap=3.0))


def read(stored: Mapping[str, Any] | None) -> Picture.Image:
    """Decode to RGB, the way up that the camera's note says."""
    if not stored or not (stored["bytes"] or stored["path"]):
        raise ValueError("there is no picture")
    with Picture.open(io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise ValueError(f"{opened.width}x{opened.height} is over {MAX_PIXELS:,} pixels")
        return _rgb(ImageOps.exif_transpose(opened))


def _rgb(picture: Picture.Image) -> Picture.Image:
    if picture.mode == "F":
        raise ValueError("its values are 32-bit floats, whose range no file says")
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
