"""Augmentation: each operation against Pillow or a plain definition, soft targets, no read-back from the device."""

from collections.abc import Callable

import kornia
import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch.nn.functional import cross_entropy, one_hot

import lion_lightning.recipes.image_classification.augmentation as augmentation_module
from lion_lightning.errors import ConfigError
from lion_lightning.recipes.image_classification.augmentation import (
    OPERATIONS,
    PARTS,
    Augmentation,
    RandAugment,
    blend,
    cut_in,
    mixed_cross_entropy,
)

STRONG = {
    "crop_padding": 2, "flip": True, "randaugment_layers": 2, "random_erasing": 0.5, "mixup": 0.5, "cutmix": 1.0,
}  # fmt: skip
Change = Callable[[Image.Image], Image.Image]


def noise(count: int = 6, side: int = 16) -> torch.Tensor:
    """Images with values that a byte has, of different brightness and contrast."""
    draw = np.random.default_rng(0)
    levels = draw.integers(0, 256, (count, 3, side, side)) * draw.uniform(0.3, 0.9, (count, 1, 1, 1))
    return torch.from_numpy(np.round(levels + draw.uniform(0, 25, (count, 3, 1, 1)))).float() / 255


def by_pillow(images: torch.Tensor, change: Change) -> torch.Tensor:
    pictures = [Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()) for image in images]
    return torch.stack([torch.from_numpy(np.asarray(change(p)).copy()).permute(2, 0, 1) / 255 for p in pictures])


# At magnitude 8: three quarters and more of AutoAugment's ranges, none of them cut off.
LEVEL, FACTOR = 0.8, 0.1 + 1.8 * 0.8
PILLOW: dict[str, Change] = {
    "auto_contrast": ImageOps.autocontrast,
    "equalize": ImageOps.equalize,
    "invert": ImageOps.invert,
    "posterize": lambda picture: ImageOps.posterize(picture, 3),
    "solarize": lambda picture: ImageOps.solarize(picture, round(0.8 * 256)),
    "color": lambda picture: ImageEnhance.Color(picture).enhance(FACTOR),
    "brightness": lambda picture: ImageEnhance.Brightness(picture).enhance(FACTOR),
    "sharpen": lambda picture: ImageEnhance.Sharpness(picture).enhance(FACTOR),
}


@pytest.mark.parametrize("name", PILLOW)
def test_an_operation_is_pillows(name: str) -> None:
    images = noise()
    ours, theirs = OPERATIONS[name](images, LEVEL).clamp(0, 1), by_pillow(images, PILLOW[name])
    assert (theirs - images).abs().mean() > 0.01, "the operation does something"
    exact = name in ("equalize", "invert", "posterize", "solarize")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 if exact else 2.5 / 255)


def test_equalize_leaves_a_plain_picture_as_it_is() -> None:
    images = torch.full((2, 3, 4, 4), 0.6)
    torch.testing.assert_close(OPERATIONS["equalize"](images, 1.0), images, rtol=0, atol=1 / 510)


def test_contrast_and_solarize_add_follow_their_definitions() -> None:
    images = noise()
    means = images.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(OPERATIONS["contrast"](images, LEVEL), means + FACTOR * (images - means))
    expected = torch.where(images * 255 < 128, images + 88 / 255, images)
    torch.testing.assert_close(OPERATIONS["solarize_add"](images, LEVEL), expected)


@pytest.mark.parametrize(
    ("name", "move"),
    [
        ("rotate", lambda picture, sign: picture.rotate(sign * 30 * LEVEL, fillcolor=(128, 128, 128))),
        ("shear_x", lambda picture, sign: slanted(picture, (1, sign * 0.3 * LEVEL, 0, 0, 1, 0))),
        ("shear_y", lambda picture, sign: slanted(picture, (1, 0, 0, sign * 0.3 * LEVEL, 1, 0))),
        ("translate_x", lambda picture, sign: slanted(picture, (1, 0, sign * 80 / 224 * 32, 0, 1, 0))),
        ("translate_y", lambda picture, sign: slanted(picture, (1, 0, 0, 0, 1, sign * 80 / 224 * 32))),
    ],
)
def test_what_moves_a_picture_moves_it_as_far_as_pillow(name: str, move: Callable[..., Image.Image]) -> None:
    """Each image goes one way or the other; sampling differs by up to half a pixel, so a blurred picture is moved."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    picture = torch.stack([torch.sin(5 * rows), torch.cos(5 * columns), torch.sin(3 * rows + 4 * columns)]) / 2 + 0.5
    images = ((picture * 255).round() / 255).expand(12, 3, 32, 32)
    torch.manual_seed(0)
    moved = OPERATIONS[name](images, LEVEL)
    ways = [by_pillow(images[:1], lambda picture, sign=sign: move(picture, sign))[0] for sign in (1, -1)]
    inner = slice(2, -2)
    nearest = [[(image - way)[:, inner, inner].abs().mean() < 0.03 for way in ways] for image in moved]
    assert all(one != other for one, other in nearest), nearest
    assert 0 < sum(bool(one) for one, _ in nearest) < 12
    still = (images[0] - ways[0])[:, inner, inner].abs().mean()
    assert still > 0.06, "the test sees no movement"


def slanted(picture: Image.Image, coefficients: tuple[float, ...]) -> Image.Image:
    """Pillow's affine transformation about the middle."""
    a, b, c, d, e, f = coefficients
    x, y = picture.width / 2, picture.height / 2
    about = (a, b, c + x - a * x - b * y, d, e, f + y - d * x - e * y)
    return picture.transform(picture.size, Image.Transform.AFFINE, about, fillcolor=(128, 128, 128))


def test_cutout_greys_a_square() -> None:
    torch.manual_seed(0)
    images = torch.zeros(40, 3, 56, 56)
    grey = OPERATIONS["cutout"](images, 1.0) == 0.5
    assert (grey.any(1) == grey.all(1)).all(), "all channels alike"
    sides = grey[:, 0].any(1).sum(1).max(), grey[:, 0].any(2).sum(1).max()
    assert sides == (19, 19), "40 of 224 pixels to each side"
    assert len({tuple(plane.nonzero()[0].tolist()) for plane in grey[:, 0]}) > 20


def test_parts_of_a_batch_get_operations_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {str(number): lambda images, level, number=number: images + number / 100 for number in range(10)}
    monkeypatch.setattr(augmentation_module, "OPERATIONS", plain)
    torch.manual_seed(0)
    seen = RandAugment(2, 15)(torch.zeros(2 * PARTS, 3, 4, 4))
    sums = (seen.amax((1, 2, 3)) * 100).round()
    assert torch.equal(sums[::2], sums[1::2]), "a part has the same ones"
    assert len(set(sums.tolist())) > 5


def test_everything_is_a_function_of_seed_and_first_sample() -> None:
    images = noise(32)
    augment = Augmentation((16, 16), seed=1, **STRONG)  # type: ignore[arg-type]
    first, share = augment(images, 64)
    torch.manual_seed(7)
    again, again_share = Augmentation((16, 16), seed=1, **STRONG)(images, 64)  # type: ignore[arg-type]
    assert torch.equal(first, again)
    assert share == again_share
    assert not torch.equal(augment(images, 128)[0], first)
    assert not torch.equal(Augmentation((16, 16), seed=2, **STRONG)(images, 64)[0], first)  # type: ignore[arg-type]
    assert first.min() >= 0
    assert first.max() <= 1


@pytest.mark.skipif(
    tuple(map(int, kornia.__version__.split(".")[:2])) < (0, 9),
    reason="before 0.9 kornia, the newest for Python 3.10, reads sizes back when it crops",
)
def test_nothing_is_read_back_from_the_device() -> None:
    """Whatever would wait for a device raises on the one without storage."""
    augment = Augmentation((16, 16), seed=1, **STRONG)  # type: ignore[arg-type]
    for first in (0, 1):
        images, share = augment(torch.empty(3, 3, 16, 16, device="meta"), first)
        assert images.device.type == "meta"
        assert isinstance(share, float)
    for operation in OPERATIONS.values():
        assert operation(torch.empty(2, 3, 16, 16, device="meta"), 1.5).device.type == "meta"


def test_mixup_and_cutmix_mix_neighbours_by_their_share() -> None:
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 20, 20).contiguous()
    mixed, share = blend(images, 0.75)
    assert mixed[2].unique().tolist() == [0.75 * 2 + 0.25 * 1]
    assert share == 0.75
    torch.manual_seed(3)
    cut, share = cut_in(images, 0.6)
    assert set(cut[2].unique().tolist()) == {1.0, 2.0}
    assert (cut[2] == 2).float().mean() == pytest.approx(share)
    assert images[2].unique().tolist() == [2.0], "the batch itself is left alone"


def test_shares_are_drawn_from_the_beta_distribution() -> None:
    shares = [Augmentation((4, 4), seed=1, mixup=0.5)(torch.zeros(2, 3, 4, 4), first)[1] for first in range(400)]
    # The larger of x and 1 - x with x from Beta(1/2, 1/2): mean 1/2 + 1/pi.
    assert np.mean(shares) == pytest.approx(0.5 + 1 / np.pi, abs=0.03)
    assert min(shares) >= 0.5


def test_with_mixup_and_cutmix_a_fair_coin_takes_one() -> None:
    augment = Augmentation((16, 16), seed=1, mixup=1.0, cutmix=1.0)
    images = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 16, 16)
    cut = sum(set(augment(images, first)[0].unique().tolist()) <= {0.0, 1.0} for first in range(100))
    assert 35 < cut < 65


def test_the_loss_is_that_of_soft_targets() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(8, 5), torch.arange(8) % 5
    targets = 0.7 * one_hot(labels, 5) + 0.3 * one_hot(labels.roll(1), 5)
    torch.testing.assert_close(mixed_cross_entropy(logits, labels, 0.7, 0.0), cross_entropy(logits, targets))
    smooth = 0.9 * targets + 0.1 / 5
    torch.testing.assert_close(mixed_cross_entropy(logits, labels, 0.7, 0.1), cross_entropy(logits, smooth))


def test_erasing_blackens_a_part_of_a_share_of_the_images() -> None:
    erased, share = Augmentation((16, 16), seed=1, random_erasing=0.5)(torch.ones(64, 3, 16, 16), 0)
    black = (erased == 0).float().mean((1, 2, 3))
    assert 16 < (black > 0).sum() < 48
    assert black.max() < 0.5
    assert share == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"randaugment_layers": -1}, "randaugment_layers must be a whole number of at least 0, got -1"),
        ({"randaugment_layers": 2, "randaugment_magnitude": 31}, r"randaugment_magnitude must be in \[0, 30\], got 31"),
        ({"random_erasing": 1.5}, r"random_erasing must be in \[0, 1\], got 1.5"),
        ({"mixup": -0.5}, "mixup must be at least 0, got -0.5"),
        ({"cutmix": -1}, "cutmix must be at least 0, got -1"),
        ({"crop_padding": 0.5}, "crop_padding must be a whole number of at least 0, got 0.5"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Augmentation((16, 16), seed=1, **settings)  # type: ignore[arg-type]
