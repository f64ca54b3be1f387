"""Image classification with a `transformers` model, as a LightningModule."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from kornia.augmentation import AugmentationSequential, RandomCrop, RandomHorizontalFlip
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoModelForImageClassification,
    PretrainedConfig,
    ViTImageProcessorPil,
)

from lion_lightning.mixin import LionMixin, OptimizerFactory
from lion_lightning.schedules import Schedule
from lion_lightning.training.errors import ConfigError
from recipes.image_classification.data import ImageArrays


class ImageClassifier(LionMixin, LightningModule):
    """A `transformers` image classifier trained on decoded uint8 images, augmented on the device.

    Args:
        config: a `transformers` configuration with an image-classification head; image size, channels and classes are
            set to the data's.
        data: the images, after `setup`.
        optimizer_factory, schedule: see `LionMixin`.
        label_smoothing: share of the target that is spread over all classes.
        crop_padding: pixels of padding for a random crop; 0 for none.
        flip: whether half of the images are mirrored.
        seed: keys the augmentation.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        config: PretrainedConfig,
        data: ImageArrays,
        optimizer_factory: OptimizerFactory,
        schedule: Schedule,
        label_smoothing: float = 0.0,
        crop_padding: int = 0,
        flip: bool = False,
        seed: int = 1,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"recipe.module.label_smoothing must be in [0, 1), got {label_smoothing}")
        if not isinstance(crop_padding, int) or crop_padding < 0:
            raise ConfigError(f"recipe.module.crop_padding must be a whole number of at least 0, got {crop_padding!r}")
        self.optimizer_factory, self.schedule = optimizer_factory, schedule
        self.label_smoothing, self.seed, self.data = label_smoothing, seed, data
        self.model = build_model(config, data)
        mean, std = data.pixel_statistics()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self.augmentation = build_augmentation(tuple(data.ready.train.pixels.shape[-2:]), crop_padding, flip)
        self.val_loss, self.val_top1 = MeanMetric(), MeanMetric()

    def forward(self, pixels: Tensor) -> Tensor:
        """Scores (batch, classes) of uint8 images (batch, channels, height, width)."""
        return self.model(pixel_values=self.normalize(pixels.float() / 255)).logits

    def normalize(self, images: Tensor) -> Tensor:
        """Zero mean and unit deviation per channel, from images in [0, 1]."""
        return (images - self.mean) / self.std

    def augment(self, batch: dict[str, Tensor]) -> Tensor:
        """Augmented images in [0, 1]; a pure function of (seed, the batch's first sample number)."""
        images = batch["pixels"].float() / 255
        if self.augmentation is None:
            return images
        devices = [images.device] if images.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed * 1_000_003 + int(batch["sample"][0]))
            return self.augmentation(images)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits = self.model(pixel_values=self.normalize(self.augment(batch))).logits
        loss = cross_entropy(logits.float(), batch["labels"], label_smoothing=self.label_smoothing)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits = self(batch["pixels"]).float()
        self.val_loss.update(cross_entropy(logits, batch["labels"], reduction="none"))
        self.val_top1.update((logits.argmax(-1) == batch["labels"]).float())

    def on_validation_epoch_end(self) -> None:
        self.log_dict({"val/loss": self.val_loss.compute(), "val/top1": self.val_top1.compute()})
        self.val_loss.reset()
        self.val_top1.reset()

    # What `training.run` asks of every recipe.

    def describe(self) -> dict[str, str]:
        """Lines for the summary at the start of a run."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return {"model": f"{type(self.model).__name__}, {parameters / 1e6:.2f} M parameters"}

    def tokens_per_sample(self) -> int | None:
        return None

    def export(self, folder: Path, card: str) -> None:
        """Write a Hugging Face folder that `pipeline("image-classification")` opens, with `card` as its README."""
        self.model.save_pretrained(folder)
        height, width = self.data.ready.train.pixels.shape[-2:]
        ViTImageProcessorPil(
            size={"height": height, "width": width},
            image_mean=self.mean.flatten().tolist(),
            image_std=self.std.flatten().tolist(),
        ).save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")

    def showcase(self) -> list[str]:
        """The most confident mistakes on up to 1,000 validation images."""
        seen, mistakes = self._mistakes(count=3)
        if not mistakes:
            return [f"all of the first {seen} validation images are right"]
        return [
            f"a mistake: image {index} is {truth}, taken for {guess} with {share:.0%}"
            for index, truth, guess, share in mistakes
        ]

    def predictions(self) -> tuple[list[str], list[list[Any]]]:
        """A table of more of them with their pictures, for the log."""
        pixels = self.data.ready.val.pixels
        rows = [[pixels[index].transpose(1, 2, 0), *rest] for index, *rest in self._mistakes(count=20)[1]]
        return ["image", "class", "guess", "share"], rows

    @torch.no_grad()
    def _mistakes(self, count: int) -> tuple[int, list[tuple[int, str, str, float]]]:
        """Images looked at, and for the most confident mistakes: index, class, guess and the guess's share."""
        images, classes = self.data.ready.val, self.data.ready.classes
        shares, guesses = self(torch.tensor(images.pixels[:1000]).to(self.device)).softmax(-1).max(-1)
        labels = torch.tensor(images.labels[:1000]).to(self.device)
        wrong = (guesses != labels).nonzero().flatten()
        worst = wrong[shares[wrong].argsort(descending=True)][:count].tolist()
        return len(labels), [(i, classes[labels[i]], classes[guesses[i]], float(shares[i])) for i in worst]


def build_model(config: PretrainedConfig, data: ImageArrays) -> Any:
    """The classifier of `config`, sized for the data.

    Raises:
        ConfigError: the configuration has no image-classification head, or its patches do not fit the images.
    """
    if not isinstance(data, ImageArrays):
        raise ConfigError(
            f"recipe=image_classification trains on images, not on {type(data).__name__}; try data=digits"
        )
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ConfigError(
            f"recipe=image_classification needs a model with an image-classification head, not {config.model_type}; "
            "try model=vit_micro or model=resnet18"
        )
    channels, height, width = data.ready.train.pixels.shape[1:]
    patch = getattr(config, "patch_size", 1)
    if height % patch or width % patch:
        raise ConfigError(f"model.config.patch_size={patch} does not divide the images of {width} x {height} pixels")
    config.num_channels, config.image_size = channels, height
    config.id2label = dict(enumerate(data.ready.classes))
    config.label2id = {name: index for index, name in config.id2label.items()}
    return AutoModelForImageClassification.from_config(config)


def build_augmentation(size: Sequence[int], crop_padding: int, flip: bool) -> nn.Module | None:
    """Kornia's random crop and mirror on batches in [0, 1]; None if neither is wanted."""
    steps: list[Any] = []
    if crop_padding:
        steps.append(RandomCrop((size[0], size[1]), padding=crop_padding))
    if flip:
        steps.append(RandomHorizontalFlip(p=0.5))
    return AugmentationSequential(*steps, data_keys=["input"]) if steps else None
