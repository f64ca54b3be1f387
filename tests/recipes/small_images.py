"""Image classifiers of a few thousand weights, and data for them."""

from functools import partial

import numpy as np
import torch
from transformers import PretrainedConfig, ResNetConfig, ViTConfig

from lion_lightning.hyperparams import cosine
from lion_lightning.optim import Lion
from lion_lightning.recipes.image_classification.data import ImageArrays
from lion_lightning.recipes.image_classification.images import Images, ImageSplits
from lion_lightning.recipes.image_classification.module import ImageClassifier


class Noise:
    """Colored noise of one size: a source like any other."""

    def __init__(self, size: int = 16) -> None:
        self.size = size

    def fingerprint(self) -> str:
        return f"noise {self.size}"

    def open(self) -> ImageSplits:
        draw = np.random.default_rng(0)
        pixels = draw.integers(0, 256, (40, 3, self.size, self.size), dtype=np.uint8)
        labels = np.arange(40) % 4
        train, val = Images(pixels[:32], labels[:32]), Images(pixels[32:], labels[32:])
        return ImageSplits(train, val, ("north", "east", "south", "west"))


def prepared(source: object) -> ImageArrays:
    data = ImageArrays(source, batch_size=8)  # type: ignore[arg-type]
    data.setup("fit")
    return data


def vit(patch_size: int = 4) -> ViTConfig:
    return ViTConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64, patch_size=patch_size
    )


def resnet() -> ResNetConfig:
    return ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")


def build(config: PretrainedConfig, data: ImageArrays, **settings: object) -> ImageClassifier:
    """With the same weights each time."""
    torch.manual_seed(0)
    return ImageClassifier(config, data, partial(Lion, lr=1e-3), cosine, **settings).eval()  # type: ignore[arg-type]


def batch_of(data: ImageArrays, count: int = 8, position: int = 0) -> dict[str, torch.Tensor]:
    return data.train_set.__getitems__([(position + index, index) for index in range(count)])
