"""ResNets for images of 32 pixels: a 3x3 stem without pooling, as in the paper's CIFAR nets (He et al., 2016).

`transformers` only has the ImageNet stem, which reduces 32x32 pixels to 8x8 before the first block. An exported folder
contains weights and configuration but no code: `from_pretrained` opens it in a process that has imported this module.
"""

from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification
from transformers.models.resnet.modeling_resnet import ResNetConvLayer


class CifarResNetConfig(ResNetConfig):
    """The configuration of a ResNet, for `CifarResNetForImageClassification`."""

    model_type = "cifar_resnet"


class CifarResNetForImageClassification(ResNetForImageClassification):
    """A ResNet whose first stage sees every pixel."""

    config_class = CifarResNetConfig

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__(config)
        stem = self.resnet.embedder
        stem.embedder = ResNetConvLayer(
            config.num_channels, config.embedding_size, kernel_size=3, stride=1, activation=config.hidden_act
        )
        stem.pooler = nn.Identity()  # type: ignore[assignment]
        self.post_init()


AutoConfig.register(CifarResNetConfig.model_type, CifarResNetConfig)
AutoModelForImageClassification.register(CifarResNetConfig, CifarResNetForImageClassification)
