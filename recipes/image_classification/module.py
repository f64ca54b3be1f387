"""Image classification with a `transformers` model, as a LightningModule."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from PIL import Image as Picture
from torch import Tensor
from transformers import PretrainedConfig, ViTImageProcessorPil
from typing_extensions import override

from lion_lightning.errors import ConfigError
from lion_lightning.hyperparams import Schedule
from lion_lightning.lightning import LionMixin, OptimizerFactory
from recipes.image_classification.augmentation import Augmentation, mixed_cross_entropy
from recipes.image_classification.data import ImageArrays
from recipes.image_classification.drawing import draw_confusion, draw_mistakes
from recipes.image_classification.metrics import Mistake, ValidationMetrics, WorstMistakes
from recipes.image_classification.models import build_model, forward_flops

BACKWARD_AND_FORWARD = 3  # times the operations of the forward pass: two more matrix products for each
LOOKED_AT, AT_A_TIME = 1_000, 100  # validation images that are shown to a model that has never been validated


@dataclass(frozen=True)
class Validated:
    """What the last validation found, over all processes."""

    step: int
    confusion: np.ndarray | None
    mistakes: list[Mistake]


class ImageClassifier(LionMixin, LightningModule):
    """A `transformers` image classifier trained on decoded uint8 images, augmented on the device.

    Args:
        config: a `transformers` configuration with an image-classification head; image size, channels and classes are
            set to the data's.
        data: the images, after `setup`.
        optimizer_factory, schedule: see `LionMixin`.
        label_smoothing: share of the target that is spread over all classes.
        test_time_flip: whether validation takes the mean of what is said to an image and to its mirror image.
        seed: keys the augmentation.
        augmentation: see `Augmentation`.
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
        test_time_flip: bool = False,
        seed: int = 1,
        **augmentation: Any,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"recipe.module.label_smoothing must be in [0, 1), got {label_smoothing}")
        self.optimizer_factory, self.schedule, self.data = optimizer_factory, schedule, data
        self.label_smoothing, self.test_time_flip = label_smoothing, test_time_flip
        self.model = build_model(config, data)
        mean, std = data.pixel_statistics()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self.augmentation = Augmentation(data.image_shape[-2:], seed, **augmentation)
        self.metrics = ValidationMetrics(len(data.classes))
        self.validated: Validated | None = None
        self._first_sample: int | None = None

    def forward(self, pixels: Tensor) -> Tensor:
        """Scores (batch, classes) of uint8 images (batch, channels, height, width)."""
        return self.model(pixel_values=self.normalize(pixels.float() / 255)).logits

    def normalize(self, images: Tensor) -> Tensor:
        """Zero mean and unit deviation per channel, from images in [0, 1]."""
        return (images - self.mean) / self.std

    @override
    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        # Still on the host here; DistributedDataParallel moves it to the device, which would then be waited for.
        self._first_sample = int(batch["sample"][0])

    def augment(self, batch: dict[str, Tensor]) -> tuple[Tensor, float]:
        """Augmented images in [0, 1] and the share of their own class, by (seed, the batch's first sample number)."""
        first = int(batch["sample"][0]) if self._first_sample is None else self._first_sample
        self._first_sample = None
        return self.augmentation(batch["pixels"].float() / 255, first)

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        images, share = self.augment(batch)
        logits = self.model(pixel_values=self.normalize(images)).logits
        loss = mixed_cross_entropy(logits.float(), batch["labels"], share, self.label_smoothing)
        self.log("train/loss", loss)
        return loss

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits = self(batch["pixels"]).float()
        if self.test_time_flip:
            mirrored = self(batch["pixels"].flip(-1)).float()
            logits = torch.logaddexp(logits.log_softmax(-1), mirrored.log_softmax(-1)) - math.log(2)
        self.metrics.update(logits, batch["labels"], batch["sample"])

    @override
    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.metrics.compute())
        confusion, mistakes = self.metrics.confusion_matrix(), self.metrics.worst.compute()
        self.validated = Validated(self.trainer.global_step, confusion, mistakes)
        self.metrics.reset()

    # What `training.run` asks of every recipe.

    def describe(self) -> dict[str, str]:
        """Lines for the summary at the start of a run."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return {"model": f"{type(self.model).__name__}, {parameters / 1e6:.2f} M parameters"}

    def tokens_per_sample(self) -> int | None:
        return None

    def flops_per_sample(self) -> int:
        """Floating-point operations that the model needs to learn from one image: forward and backward."""
        return BACKWARD_AND_FORWARD * self._forward_flops

    @cached_property
    def _forward_flops(self) -> int:
        return forward_flops(self.model, self.data.image_shape)

    def export(self, folder: Path, card: str) -> None:
        """Write a Hugging Face folder that `pipeline("image-classification")` opens, with `card` as its README."""
        self.model.save_pretrained(folder)
        height, width = self.data.image_shape[-2:]
        ViTImageProcessorPil(
            size={"height": height, "width": width},
            image_mean=self.mean.flatten().tolist(),
            image_std=self.std.flatten().tolist(),
        ).save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        for name, pixels in self.pictures().items():
            Picture.fromarray(pixels).save(folder / f"{name}.png")

    def showcase(self) -> list[str]:
        """The mistakes that the model was surest of."""
        seen, mistakes = self._mistakes()
        if not mistakes:
            return [f"all of the {'' if self.validated else 'first '}{seen} validation images are right"]
        classes = self.data.classes
        return [
            f"a mistake: image {found.image} is {classes[found.label]}, taken for {classes[found.guess]} "
            f"with {found.share:.0%}"
            for found in mistakes[:3]
        ]

    def predictions(self) -> tuple[list[str], list[list[Any]]]:
        """A table of more of them with their pictures, for the log."""
        mistakes, classes = self._mistakes()[1], self.data.classes
        pixels = list(self.data.validation_pixels([found.image for found in mistakes])) if mistakes else []
        rows = [
            [image.transpose(1, 2, 0), classes[found.label], classes[found.guess], found.share]
            for image, found in zip(pixels, mistakes, strict=True)
        ]
        return ["image", "class", "guess", "share"], rows

    def pictures(self) -> dict[str, np.ndarray]:
        """What the last validation found, drawn: `confusion_matrix` and `worst_mistakes`; uint8 (height, width, 3)."""
        if self.validated is None:
            return {}
        classes, after = self.data.classes, f"validation after step {self.validated.step:,}"
        drawn = {}
        if self.validated.confusion is not None:
            drawn["confusion_matrix"] = draw_confusion(self.validated.confusion, classes, after)
        if mistakes := self.validated.mistakes:
            captions = [(f"class {classes[m.label]}", f"guess {m.share:.0%} {classes[m.guess]}") for m in mistakes]
            pixels = self.data.validation_pixels([found.image for found in mistakes])
            drawn["worst_mistakes"] = draw_mistakes(pixels, captions, f"surest mistakes, {after}")
        return drawn

    def _mistakes(self) -> tuple[int, list[Mistake]]:
        """Images looked at, and the surest mistakes of the last validation; or of a look at some images now."""
        count = len(self.data.val_set)  # type: ignore[arg-type]
        if self.validated is not None:
            return count, self.validated.mistakes
        # One rank alone asks: there is nobody to gather from.
        worst, count = WorstMistakes(sync_on_compute=False).to(self.device), min(count, LOOKED_AT)
        for start in range(0, count, AT_A_TIME):
            pairs = [(index, index) for index in range(start, min(start + AT_A_TIME, count))]
            batch = self.data.val_set.__getitems__(pairs)  # type: ignore[attr-defined]
            with torch.no_grad():
                shares = self(batch["pixels"].to(self.device)).softmax(-1)
            worst.update(shares, batch["labels"].to(self.device), batch["sample"])
        return count, worst.compute()
