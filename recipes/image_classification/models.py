"""Classifiers of `transformers`, sized for the data, and what one forward pass of them costs."""

import copy
from importlib.util import find_spec
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoModelForImageClassification, PretrainedConfig

from lion_lightning.errors import ConfigError
from recipes.image_classification.data import ImageArrays

TIMM = "timm_wrapper"  # `transformers`' name for a model that timm builds


def build_model(config: PretrainedConfig, data: ImageArrays) -> Any:
    """The classifier of `config`, which is told the data's image size, channels and classes.

    Raises:
        ConfigError: the configuration has no image-classification head, its patches do not fit the images, or it needs
            a library that is not installed.
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
    return _timm(config) if config.model_type == TIMM else AutoModelForImageClassification.from_config(config)


def _timm(config: PretrainedConfig) -> Any:
    missing = [name for name in ("timm", "torchvision") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"model=timm needs {' and '.join(missing)}: pip install 'lion-lightning[timm]'")
    try:
        return AutoModelForImageClassification.from_config(config)
    except (
        ImportError,
        RuntimeError,
        TypeError,
        ValueError,
        AssertionError,
    ) as error:  # what timm makes of a name or an argument
        raise ConfigError(f"model.architecture={config.architecture}: {error}".splitlines()[0]) from error


def forward_flops(model: Any, shape: tuple[int, ...]) -> int:
    """Floating-point operations of one image's forward pass: 2 for each multiplication and addition of a matrix
    product or convolution, nothing for the rest.

    The pass is made by a model without storage: a tenth of a second for any size, and no random number is drawn.

    Args:
        model: of `transformers`; only its configuration is looked at.
        shape: channels, height and width.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        hollow = AutoModelForImageClassification.from_config(copy.deepcopy(model.config)).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            hollow(pixel_values=torch.zeros(1, *shape))
    return counter.get_total_flops()
