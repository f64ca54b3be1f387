"""Image classification with a `transformers` model, as a LightningModule."""

import copy
import math
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from PIL import Image as Picture
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoModelForImageClassification,
    CLIPImageProcessorPil,
    PretrainedConfig,
)
from typing_extensions import override

from lion_lightning.errors import ConfigError, check_flag, check_number
from lion_lightning.hyperparams import Schedule
from lion_lightning.lightning import LionMixin, OptimizerFactory

from .augmentation import Augmentation, mixed_cross_entropy
from .data import ImageArrays
from .images import shorter_edge
from .metrics import Mistake, ValidationMetrics, WorstMistakes
from .plots import draw_confusion, draw_mistakes

BACKWARD_AND_FORWARD = 3  # times the operations of the forward pass: two more matrix products for each
SHOWN_IMAGES = 1_000  # validation images classified for the showcase of a model that was never validated
SHOWN_AT_ONCE = 100
FITTED_IMAGES = 2_000
TIMM = "timm_wrapper"  # `transformers`' name for a model that timm builds


@dataclass(frozen=True)
class Validated:
    """The result of the last validation, over all processes."""

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
        test_time_flip: whether validation averages the predictions for an image and its mirror image.
        attention: how the model computes attention: sdpa or eager; None is eager on a CPU, where torch's fused kernel
            is slower for few patches, and what `transformers` takes elsewhere.
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
        attention: str | None = None,
        seed: int = 1,
        **augmentation: Any,
    ) -> None:
        super().__init__()
        check_number("recipe.module.label_smoothing", label_smoothing, "[0, 1)")
        check_flag("recipe.module.test_time_flip", test_time_flip)
        self.optimizer_factory, self.schedule, self.data = optimizer_factory, schedule, data
        self.label_smoothing, self.test_time_flip, self.attention = label_smoothing, test_time_flip, attention
        self.model = build_model(config, data, attention)
        mean, std = data.pixel_statistics()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        if fit_inputs := getattr(self.model, "fit_inputs", None):  # a first layer that is made from the data
            samples = data.sample_pixels(FITTED_IMAGES)
            fit_inputs(self.normalize(torch.from_numpy(pixels).float() / 255) for pixels in samples)
        self.augmentation = Augmentation(data.image_shape[-2:], seed, **augmentation)
        self.metrics = ValidationMetrics(len(data.classes))
        self.validated: Validated | None = None
        self._first_sample: int | None = None

    @override
    def setup(self, stage: str) -> None:
        if self.attention is None and self.trainer.strategy.root_device.type == "cpu":
            self.model.set_attn_implementation("eager")

    def forward(self, pixels: Tensor) -> Tensor:
        """Scores (batch, classes) of uint8 images (batch, channels, height, width)."""
        return self.model(pixel_values=self.normalize(pixels.float() / 255)).logits

    def normalize(self, images: Tensor) -> Tensor:
        """Zero mean and unit deviation per channel, from images in [0, 1], in the model's dtype and channels last.

        Convolutions keep that layout of their input, which is faster on a CPU (docs/benchmarks/recipes_cpu.md#images).
        """
        return ((images - self.mean) / self.std).to(self.model.dtype, memory_format=torch.channels_last)

    @override
    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        # Read on the host, before DistributedDataParallel moves it to the device, where reading would synchronise.
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

    # The interface that `training.run` expects of every recipe.

    def describe(self) -> dict[str, str]:
        """Lines for the summary at the start of a run."""
        lines = {"model": f"{type(self.model).__name__}, {self.model.num_parameters() / 1e6:.2f} M parameters"}
        if self.test_time_flip:
            lines["validation"] = "takes the mean over an image and its mirror image; the export takes the image alone"
        return lines

    def flops_per_sample(self) -> int:
        """Floating-point operations of forward and backward for one image."""
        return BACKWARD_AND_FORWARD * self._forward_flops

    @cached_property
    def _forward_flops(self) -> int:
        return forward_flops(self.model, self.data.image_shape)

    def export(self, folder: Path, card: str) -> None:
        """Write a Hugging Face folder that `pipeline("image-classification")` opens, with `card` as its README."""
        self.model.save_pretrained(folder)
        height, width = self.data.image_shape[-2:]
        CLIPImageProcessorPil(  # resizes the shorter side, bicubic, and cuts out the middle, as `images.square` does
            size={"shortest_edge": shorter_edge(min(height, width), self.data.val_share)},
            crop_size={"height": height, "width": width},
            image_mean=self.mean.flatten().tolist(),
            image_std=self.std.flatten().tolist(),
        ).save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        for name, pixels in self.pictures().items():
            Picture.fromarray(pixels).save(folder / f"{name}.png")

    def showcase(self) -> list[str]:
        """The most confident mistakes."""
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
        """Plots of the last validation: `confusion_matrix` and `worst_mistakes`; uint8 (height, width, 3)."""
        if self.validated is None:
            return {}
        classes, after = self.data.classes, f"validation after step {self.validated.step:,}"
        drawn = {}
        if self.validated.confusion is not None:
            drawn["confusion_matrix"] = draw_confusion(self.validated.confusion, classes, after)
        if mistakes := self.validated.mistakes:
            captions = [(f"class {classes[m.label]}", f"guess {m.share:.0%} {classes[m.guess]}") for m in mistakes]
            pixels = self.data.validation_pixels([found.image for found in mistakes])
            drawn["worst_mistakes"] = draw_mistakes(pixels, captions, f"most confident mistakes, {after}")
        return drawn

    def _mistakes(self) -> tuple[int, list[Mistake]]:
        """The number of images, and the most confident mistakes: of the last validation, or of some images now."""
        count = len(self.data.val_set)  # type: ignore[arg-type]
        if self.validated is not None:
            return count, self.validated.mistakes
        # Only one rank calls this, so nothing is gathered.
        worst, count = WorstMistakes(sync_on_compute=False).to(self.device), min(count, SHOWN_IMAGES)
        for start in range(0, count, SHOWN_AT_ONCE):
            pairs = [(index, index) for index in range(start, min(start + SHOWN_AT_ONCE, count))]
            batch = self.data.val_set.__getitems__(pairs)  # type: ignore[attr-defined]
            with torch.no_grad():
                shares = self(batch["pixels"].to(self.device)).softmax(-1)
            worst.update(shares, batch["labels"].to(self.device), batch["sample"])
        return count, worst.compute()


def build_model(config: PretrainedConfig, data: ImageArrays, attention: str | None = None) -> Any:
    """The classifier of `config`, with the data's image size, channels and classes.

    Raises:
        ConfigError: the configuration has no image-classification head, its patches do not fit the images, it needs a
            library that is not installed, or it does not have this kind of attention.
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
    channels, height, width = data.image_shape
    patch = getattr(config, "patch_size", 1)
    if height % patch or width % patch:
        raise ConfigError(f"model.config.patch_size={patch} does not divide the images of {width} x {height} pixels")
    config.num_channels, config.image_size = channels, height
    config.id2label = dict(enumerate(data.classes))
    config.label2id = {name: index for index, name in config.id2label.items()}
    if config.model_type == TIMM:
        return _timm(config)
    try:
        return AutoModelForImageClassification.from_config(config, attn_implementation=attention)
    except (ValueError, AttributeError) as error:  # the other of a value that is no text
        if attention is None:
            raise
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"recipe.module.attention must be null, sdpa or eager, got {attention!r}: {reason}"
        ) from error


def _timm(config: PretrainedConfig) -> Any:
    missing = [name for name in ("timm", "torchvision") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"model=timm needs {' and '.join(missing)}: pip install 'lion-lightning[timm]'")
    try:
        return AutoModelForImageClassification.from_config(config)
    except (ImportError, RuntimeError, TypeError, ValueError, AssertionError) as error:  # timm: bad name or argument
        raise ConfigError(f"model.architecture={config.architecture}: {error}".splitlines()[0]) from error


def forward_flops(model: Any, shape: tuple[int, ...]) -> int:
    """Floating-point operations of one image's forward pass: 2 for each multiplication and addition of a matrix
    product or convolution, nothing for the rest.

    The pass is made by a model without storage: a tenth of a second for any size, and no random number is drawn.

    Args:
        model: of `transformers`; only its configuration is used.
        shape: channels, height and width.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        skeleton = AutoModelForImageClassification.from_config(copy.deepcopy(model.config)).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            skeleton(pixel_values=torch.zeros(1, *shape))
    return counter.get_total_flops()
