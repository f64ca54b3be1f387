"""Augmentation of a whole batch on its device, as a function of (seed, number of the batch's first sample)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from kornia.augmentation import AugmentationSequential, RandomCrop, RandomErasing, RandomHorizontalFlip
from torch import Tensor
from torch.distributions import Beta
from torch.nn.functional import cross_entropy

from lion_lightning.errors import ConfigError
from recipes.image_classification.randaugment import RandAugment

SEED_STRIDE = 1_000_003


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
        if not isinstance(crop_padding, int) or crop_padding < 0:
            raise ConfigError(f"recipe.module.crop_padding must be a whole number of at least 0, got {crop_padding!r}")
        if not 0 <= random_erasing <= 1:
            raise ConfigError(f"recipe.module.random_erasing must be in [0, 1], got {random_erasing}")
        for name, alpha in (("mixup", mixup), ("cutmix", cutmix)):
            if not 0 <= alpha < math.inf:
                raise ConfigError(f"recipe.module.{name} must be a number of at least 0, got {alpha}")
        self.seed, self.mixup, self.cutmix = seed, mixup, cutmix
        self.simple = _sequence(size, crop_padding, flip)
        self.randaugment = RandAugment(randaugment_layers, randaugment_magnitude) if randaugment_layers else None
        self.erasing = _together(RandomErasing(p=random_erasing)) if random_erasing else None

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


def _sequence(size: Sequence[int], crop_padding: int, flip: bool) -> AugmentationSequential | None:
    steps: list[Any] = []
    if crop_padding:
        steps.append(RandomCrop((size[0], size[1]), padding=crop_padding))
    if flip:
        steps.append(RandomHorizontalFlip(p=0.5))
    return _together(*steps) if steps else None


def _together(*steps: Any) -> AugmentationSequential:
    return AugmentationSequential(*steps, data_keys=["input"])
