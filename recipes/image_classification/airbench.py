"""A small convolutional net for CIFAR-10 after airbench94 (Jordan, 2024, arXiv:2404.00498).

The weights of its first layer are not learned: it whitens 2x2 patches of the training images, so that the filters
behind it see uncorrelated inputs of equal size. Like `cifar_resnet`, an exported folder contains no code:
`from_pretrained` opens it in a process that has imported this module.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from lion_lightning.errors import ConfigError

PATCH = 2  # pixels on each side
WHITENING_EPSILON = 5e-4  # added to the variances, so that noise is not amplified
BATCH_NORM_MOMENTUM = 0.4  # share of the new batch, as a run has few steps
LOGIT_SCALE = 1 / 9
SMALLEST_IMAGE = 9  # pixels on each side; the third pooling would leave nothing of a smaller one


class AirbenchConfig(PretrainedConfig):
    """The configuration of `AirbenchForImageClassification`.

    Args:
        widths: Channels of the three groups of convolutions.
        image_size: Pixels on each side, at least 9.
        num_channels: Of an image.
    """

    model_type = "airbench"

    def __init__(
        self, widths: Sequence[int] = (64, 256, 256), image_size: int = 32, num_channels: int = 3, **others: Any
    ) -> None:
        super().__init__(**others)
        self.widths, self.image_size, self.num_channels = list(widths), image_size, num_channels


class ConvolutionGroup(nn.Module):
    """Convolution and pooling, then a second convolution, each with batch norm and GELU: halves the resolution.

    The convolutions begin as the identity on their first channels. Batch norm has a bias alone, since the convolution
    before it has a scale.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm1 = _batch_norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = _batch_norm(outputs)
        with torch.no_grad():
            for convolution in (self.conv1, self.conv2):
                nn.init.dirac_(convolution.weight[: convolution.in_channels])

    def forward(self, images: Tensor) -> Tensor:
        """From (batch, inputs, height, width) to (batch, outputs, height // 2, width // 2)."""
        images = nn.functional.gelu(self.norm1(nn.functional.max_pool2d(self.conv1(images), 2)))
        return nn.functional.gelu(self.norm2(self.conv2(images)))


class AirbenchForImageClassification(PreTrainedModel):
    """Whitening, three groups of convolutions, pooling over what is left, and a linear layer."""

    config_class = AirbenchConfig
    base_model_prefix = "airbench"
    main_input_name = "pixel_values"

    def __init__(self, config: AirbenchConfig) -> None:
        super().__init__(config)
        if config.image_size < SMALLEST_IMAGE:
            size = config.image_size
            raise ConfigError(f"model=airbench needs images of at least {SMALLEST_IMAGE} pixels, the data has {size}")
        filters = 2 * config.num_channels * PATCH**2
        self.whitening = nn.Conv2d(config.num_channels, filters, PATCH)
        self.whitening.weight.requires_grad_(False)
        inputs = (filters, *config.widths[:-1])
        self.groups = nn.ModuleList(map(ConvolutionGroup, inputs, config.widths))
        self.classifier = nn.Linear(config.widths[-1], config.num_labels or 0, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: each module has set its own."""

    @torch.no_grad()
    def fit_inputs(self, batches: Iterable[Tensor]) -> None:
        """Set the whitening filters: the principal components of patches over their deviation, and their negatives.

        Args:
            batches: Images of the training data as `forward` takes them, (batch, channels, height, width) each.
        """
        count, total, products = 0, torch.zeros(()), torch.zeros(())
        for images in batches:
            patches = nn.functional.unfold(images.double(), PATCH).transpose(0, 1).flatten(1)  # (values, patches)
            count, total, products = count + patches.shape[1], total + patches.sum(1), products + patches @ patches.T
        mean = total / count
        variances, components = torch.linalg.eigh(products / count - torch.outer(mean, mean))
        scaled = components / (variances + WHITENING_EPSILON).sqrt()
        filters = scaled.T.flip(0).reshape(-1, *self.whitening.weight.shape[1:])
        self.whitening.weight.copy_(torch.cat([filters, -filters]))
        self.whitening.bias.zero_()  # type: ignore[union-attr]

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> ImageClassifierOutput:
        """Scores of images.

        Args:
            pixel_values: Normalised, (batch, channels, height, width).
            labels: int64 (batch,); with them the cross-entropy is in `loss`.
        """
        features = nn.functional.gelu(self.whitening(pixel_values))
        for group in self.groups:
            features = group(features)
        logits = self.classifier(features.amax((2, 3))) * LOGIT_SCALE
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, momentum=BATCH_NORM_MOMENTUM)
    norm.weight.requires_grad_(False)
    return norm


AutoConfig.register(AirbenchConfig.model_type, AirbenchConfig)
AutoModelForImageClassification.register(AirbenchConfig, AirbenchForImageClassification)
