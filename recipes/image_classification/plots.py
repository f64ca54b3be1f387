"""Plots of a classifier's mistakes, drawn with Pillow: the confusion matrix and the most confident mistakes."""

from collections.abc import Sequence

import numpy as np
from PIL import Image as Picture
from PIL import ImageDraw, ImageFont

MATRIX_SIDE = 640  # pixels that the cells of a matrix share
MAX_NAMED, MAX_COUNTED = 40, 20  # classes with names beside the matrix, with numbers in its cells
NAME_CHARACTERS = 14
MARGIN, LINE = 8, 15
TILE, COLUMNS = 112, 5  # pixels of one mistake, mistakes in a row
INK, PAPER, SHADE = (20, 20, 20), (255, 255, 255), (8, 48, 107)


def draw_confusion(matrix: np.ndarray, classes: Sequence[str], title: str) -> np.ndarray:
    """A confusion matrix, classes down and guesses across, shaded by share of the class; uint8 (height, width, 3)."""
    count = len(classes)
    cell = max(1, MATRIX_SIDE // count)
    named = count <= MAX_NAMED
    left = _width([_short(name) for name in classes]) + 2 * MARGIN if named else MARGIN
    top = 2 * LINE + 2 * MARGIN + (left if named else 0)
    canvas = Picture.new("RGB", (left + cell * count + MARGIN, top + cell * count + MARGIN), PAPER)
    shares = matrix / matrix.sum(1, keepdims=True).clip(min=1)
    shade = np.array(PAPER) + shares[..., None] * (np.array(SHADE) - np.array(PAPER))
    cells = shade.astype(np.uint8).repeat(cell, 0).repeat(cell, 1)
    canvas.paste(Picture.fromarray(cells), (left, top))
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN), title, INK, _font())
    draw.text((MARGIN, MARGIN + LINE), "rows: class, columns: guess", INK, _font())
    if named:
        _write_names(canvas, draw, classes, cell, left, top)
    if count <= MAX_COUNTED:
        _write_counts(draw, matrix, shares, cell, left, top)
    return np.asarray(canvas).copy()


def _write_names(
    canvas: Picture.Image, draw: ImageDraw.ImageDraw, classes: Sequence[str], cell: int, left: int, top: int
) -> None:
    for number, name in enumerate(classes):
        middle = number * cell + cell // 2
        draw.text((left - MARGIN, top + middle), _short(name), INK, _font(), anchor="rm")
        upright = Picture.new("RGB", (left, LINE + 2), PAPER)
        ImageDraw.Draw(upright).text((MARGIN, LINE // 2 + 1), _short(name), INK, _font(), anchor="lm")
        turned = upright.rotate(90, expand=True)
        canvas.paste(turned, (left + middle - turned.width // 2, top - turned.height))


def _write_counts(
    draw: ImageDraw.ImageDraw, matrix: np.ndarray, shares: np.ndarray, cell: int, left: int, top: int
) -> None:
    for row, column in zip(*matrix.nonzero(), strict=True):
        color = PAPER if shares[row, column] > 0.5 else INK
        place = (left + column * cell + cell // 2, top + row * cell + cell // 2)
        draw.text(place, f"{matrix[row, column]:,}", color, _font(), anchor="mm")


def draw_mistakes(pixels: np.ndarray, captions: Sequence[tuple[str, str]], title: str) -> np.ndarray:
    """Images in a grid, each over two lines of text.

    Args:
        pixels: uint8 (images, channels, height, width).
        captions: two lines for each image.
        title: a line above all.

    Returns:
        uint8 (height, width, 3).
    """
    rows = -(-len(pixels) // COLUMNS)
    high = TILE + 2 * LINE + MARGIN
    canvas = Picture.new("RGB", (COLUMNS * (TILE + MARGIN) + MARGIN, 2 * MARGIN + LINE + rows * high), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN), title, INK, _font())
    for number, (image, lines) in enumerate(zip(pixels, captions, strict=True)):
        left = MARGIN + (number % COLUMNS) * (TILE + MARGIN)
        top = 2 * MARGIN + LINE + (number // COLUMNS) * high
        canvas.paste(_tile(image), (left, top))
        for line, text in enumerate(lines):
            draw.text((left, top + TILE + line * LINE), _short(text, TILE), INK, _font())
    return np.asarray(canvas).copy()


def _tile(image: np.ndarray) -> Picture.Image:
    picture = Picture.fromarray(image.transpose(1, 2, 0))
    grows = max(picture.size) <= TILE
    return picture.resize((TILE, TILE), Picture.Resampling.NEAREST if grows else Picture.Resampling.BICUBIC)


def _short(text: str, width: int | None = None) -> str:
    """`text` shortened to NAME_CHARACTERS, or `width` pixels."""
    if width is None:
        return text if len(text) <= NAME_CHARACTERS else text[: NAME_CHARACTERS - 1] + "…"
    kept = text
    while kept and _width([kept]) > width:
        kept = kept[:-1]
    return kept if kept == text else kept[:-1] + "…"


def _width(lines: Sequence[str]) -> int:
    return max(round(_font().getlength(line)) for line in lines)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=12)
