"""Augmentation of a whole batch on its device, as a function of (seed, number of the batch's first sample).

RandAugment (Cubuk et al., 2020, arXiv:1909.13719) has the operations and strengths of the authors' TensorFlow
code, which google-research/big_vision has too: strengths are linear in the magnitude, and 10 is the end of
AutoAugment's ranges, so that the Lion paper's 15 goes beyond them. (Kornia's own RandAugment reaches that end at 30,
and at 15 leaves color, contrast and brightness unchanged.) Pixels moved in from outside the picture are mid-grey.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from kornia.augmentation import AugmentationSequential, RandomCrop, RandomErasing, RandomHorizontalFlip
from kornia.enhance import sharpness
from kornia.geometry import get_affine_matrix2d, warp_affine
from torch import Tensor
from torch.distributions import Beta
from torch.nn.functional import cross_entropy

from lion_lightning.errors import check_flag, check_number

SEED_STRIDE = 1_000_003
PARTS = 16  # of a batch, each with operations of its own; choosing for each image would launch them image by image
GREY = 0.5
LUMA = (0.299, 0.587, 0.114)
LEVELS = 256
TRANSLATION = 100 / 224  # of the picture, at magnitude 10
CUTOUT = 40 / 224  # half a side of the square, at magnitude 10
Operation = Callable[[Tensor, float], Tensor]
"""Images (images, channels, height, width) in [0, 1] and the magnitude over 10."""


class Augmentation:
    """Crop, mirror, RandAugment, erase; then mix each image with another one of its batch.

    All that is random comes from torch's CPU generator, so that nothing waits for the device.

    Args:
        size: height and width of the images.
        seed: keys everything.
        crop_padding: pixels of padding for a random crop; 0 for none.
        flip: whether half of the images are mirrored.
        randaugment_layers, randaugment_magnitude: see `RandAugment`; 0 layers for none.
        random_erasing: share of the images of which a part is blackened (Zhong et al., 2020).
        mixup, cutmix: alpha of the Beta distribution from which the share of the other image is drawn, once a batch; 0
            for none. With both, each batch takes one of them by a fair coin.

    Raises:
        ConfigError: an argument out of its range.
    """

    def __init__(
        self,
        size: Sequence[int],
        seed: int,
        crop_padding: int = 0,
        flip: bool = False,
        randaugment_layers: int = 0,
        randaugment_magnitude: float = 15,
        random_erasing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        check_number("recipe.module.crop_padding", crop_padding, "[0, inf)", whole=True)
        check_flag("recipe.module.flip", flip)
        check_number("recipe.module.randaugment_layers", randaugment_layers, "[0, inf)", whole=True)
        check_number("recipe.module.randaugment_magnitude", randaugment_magnitude, "[0, 30]")
        check_number("recipe.module.random_erasing", random_erasing, "[0, 1]")
        check_number("recipe.module.mixup", mixup, "[0, inf)")
        check_number("recipe.module.cutmix", cutmix, "[0, inf)")
        self.seed, self.mixup, self.cutmix = seed, mixup, cutmix
        steps: list[Any] = [RandomCrop((size[0], size[1]), padding=crop_padding)] if crop_padding else []
        steps += [RandomHorizontalFlip(p=0.5)] if flip else []
        self.simple = AugmentationSequential(*steps) if steps else None
        self.randaugment = RandAugment(randaugment_layers, randaugment_magnitude) if randaugment_layers else None
        self.erasing = AugmentationSequential(RandomErasing(p=random_erasing)) if random_erasing else None

    def __call__(self, images: Tensor, first_sample: int) -> tuple[Tensor, float]:
        """Augmented images in [0, 1], and the share that each has of its own class.

        The rest is of the image before it in the batch: `images.roll(1, 0)`.

        Args:
            images: (batch, channels, height, width) in [0, 1].
            first_sample: number of the batch's first sample in the run.
        """
        if not any((self.simple, self.randaugment, self.erasing, self.mixup, self.cutmix)):
            return images, 1.0
        devices = [images.device] if images.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed * SEED_STRIDE + first_sample)
            for step in (self.simple, self.randaugment, self.erasing):
                images = images if step is None else step(images)
            return self._mix(images)

    def _mix(self, images: Tensor) -> tuple[Tensor, float]:
        if not (self.mixup or self.cutmix):
            return images, 1.0
        cut = bool(self.cutmix) and (not self.mixup or bool(torch.rand(()) < 0.5))
        alpha = self.cutmix if cut else self.mixup
        share = float(Beta(alpha, alpha).sample())
        return cut_in(images, share) if cut else blend(images, max(share, 1 - share))


def blend(images: Tensor, share: float) -> tuple[Tensor, float]:
    """Mixup (Zhang et al., 2018): each image with its neighbour shining through."""
    return share * images + (1 - share) * images.roll(1, 0), share


def cut_in(images: Tensor, share: float) -> tuple[Tensor, float]:
    """CutMix (Yun et al., 2019): a rectangle of each image replaced by its neighbour's; the share is what it leaves."""
    height, width = images.shape[-2:]
    top, bottom = _span(height, math.sqrt(1 - share))
    left, right = _span(width, math.sqrt(1 - share))
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images.roll(1, 0)[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def mixed_cross_entropy(logits: Tensor, labels: Tensor, share: float, label_smoothing: float) -> Tensor:
    """Cross-entropy against targets of which `share` is the own class and the rest that of the image before."""
    own = cross_entropy(logits, labels, label_smoothing=label_smoothing)
    if share == 1.0:
        return own
    return share * own + (1 - share) * cross_entropy(logits, labels.roll(1), label_smoothing=label_smoothing)


def _span(side: int, share: float) -> tuple[int, int]:
    """Ends of a stretch around a random point, cut off at the border."""
    middle, half = int(torch.randint(side, ())), round(side * share) / 2
    return max(0, math.floor(middle - half)), min(side, math.floor(middle + half))


class RandAugment:
    """`layers` operations in a row on each image, drawn from torch's CPU generator.

    Args:
        layers: operations, at least one.
        magnitude: their strength; 0 to 30.
    """

    def __init__(self, layers: int, magnitude: float) -> None:
        self.layers, self.level = layers, magnitude / 10

    def __call__(self, images: Tensor) -> Tensor:
        """Augmented images (images, channels, height, width) in [0, 1]."""
        return torch.cat([self._part(part) for part in images.chunk(PARTS)])

    def _part(self, images: Tensor) -> Tensor:
        for choice in torch.randint(len(OPERATIONS), (self.layers,)).tolist():
            images = tuple(OPERATIONS.values())[choice](images, self.level).clamp(0, 1)
        return images


def auto_contrast(images: Tensor, level: float) -> Tensor:
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp(min=1 / LEVELS), images)


def equalize(images: Tensor, level: float) -> Tensor:
    """As Pillow does, for all channels of all images at once."""
    values = (images * (LEVELS - 1)).round().long().flatten(0, 1).flatten(1)  # (images * channels, pixels)
    counts = torch.zeros(len(values), LEVELS, dtype=torch.long, device=images.device)
    counts.scatter_add_(1, values, torch.ones_like(values))
    last = counts.gather(1, values.amax(1, keepdim=True))
    step = (values.shape[1] - last) // (LEVELS - 1)
    below = counts.cumsum(1) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=LEVELS - 1)
    mapped = torch.where(step > 0, table.gather(1, values), values)
    return (mapped.to(images.dtype) / (LEVELS - 1)).view_as(images)


def invert(images: Tensor, level: float) -> Tensor:
    return 1 - images


def posterize(images: Tensor, level: float) -> Tensor:
    width = 2 ** (8 - min(8, int(4 * level)))
    return (images * (LEVELS - 1)).round().div(width, rounding_mode="floor") * width / (LEVELS - 1)


def solarize(images: Tensor, level: float) -> Tensor:
    return torch.where(images < level * LEVELS / (LEVELS - 1), images, 1 - images)


def solarize_add(images: Tensor, level: float) -> Tensor:
    return torch.where(images < 128 / 255, images + level * 110 / 255, images)


def color(images: Tensor, level: float) -> Tensor:
    if images.shape[1] != len(LUMA):
        return images
    weights = torch.tensor(LUMA).to(images)
    return _blend((images * weights.view(1, -1, 1, 1)).sum(1, keepdim=True), images, level)


def contrast(images: Tensor, level: float) -> Tensor:
    return _blend(images.mean((1, 2, 3), keepdim=True), images, level)


def brightness(images: Tensor, level: float) -> Tensor:
    return _blend(torch.zeros_like(images), images, level)


def sharpen(images: Tensor, level: float) -> Tensor:
    return sharpness(images, _factor(level))


def rotate(images: Tensor, level: float) -> Tensor:
    return _warp(images, angle=30 * level * _signs(images))


def shear_x(images: Tensor, level: float) -> Tensor:
    return _warp(images, shear_x=0.3 * level * _signs(images))


def shear_y(images: Tensor, level: float) -> Tensor:
    return _warp(images, shear_y=0.3 * level * _signs(images))


def translate_x(images: Tensor, level: float) -> Tensor:
    return _warp(images, shift_x=TRANSLATION * level * _signs(images) * images.shape[-1])


def translate_y(images: Tensor, level: float) -> Tensor:
    return _warp(images, shift_y=TRANSLATION * level * _signs(images) * images.shape[-2])


def cutout(images: Tensor, level: float) -> Tensor:
    """Grey out a square around a random point."""
    inside = [_near(images, axis, CUTOUT * level) for axis in (-2, -1)]
    return torch.where(inside[0][:, None, :, None] & inside[1][:, None, None, :], GREY, images)


OPERATIONS: Mapping[str, Operation] = {
    operation.__name__: operation
    for operation in (
        auto_contrast, equalize, invert, rotate, posterize, solarize, color, contrast, brightness, sharpen, shear_x,
        shear_y, translate_x, translate_y, cutout, solarize_add,
    )
}  # fmt: skip


def _factor(level: float) -> float:
    return 1.8 * level + 0.1


def _blend(plain: Tensor, images: Tensor, level: float) -> Tensor:
    return plain + _factor(level) * (images - plain)


def _signs(images: Tensor) -> Tensor:
    """+1 or -1 for each image, on the CPU."""
    return torch.randint(2, (len(images),)) * 2.0 - 1


def _near(images: Tensor, axis: int, share: float) -> Tensor:
    """Which rows or columns lie within `share` of the side of a random one; bool (images, side)."""
    side = images.shape[axis]
    center = torch.randint(side, (len(images), 1))
    return ((torch.arange(side) - center).abs() < round(share * side)).to(images.device)


def _warp(images: Tensor, **by: Tensor) -> Tensor:
    """Rotate, shear or shift about the middle: degrees, slopes, pixels; each (images,)."""
    none = torch.zeros(len(images))
    height, width = images.shape[-2:]
    middle = torch.tensor([[(width - 1) / 2, (height - 1) / 2]]).expand(len(images), 2)
    shift = torch.stack([by.get("shift_x", none), by.get("shift_y", none)], 1)
    slopes = [torch.atan(by.get(name, none)) for name in ("shear_x", "shear_y")]
    matrix = get_affine_matrix2d(
        shift, middle, torch.ones(len(images), 2), by.get("angle", none), sx=slopes[0], sy=slopes[1]
    )
    moved = warp_affine(images - GREY, matrix[:, :2].to(images), (height, width), mode="nearest")
    return moved + GREY
