"""How the eager engine reads and writes what is stored of a parameter; the formats are those of storage_formats.py."""

import torch
from torch import Tensor

from lion_lightning.optim.kernels import storage_formats
from lion_lightning.optim.kernels.rule import TensorUpdate


def decode(update: TensorUpdate) -> tuple[Tensor, Tensor]:
    """Weight and momentum in the precision of the arithmetic. Either may be the stored tensor itself."""
    if update.param.dtype == torch.bfloat16:
        weight = storage_formats.join_weight(update.param, update.weight_remainder)
    else:
        weight = update.param
    if update.exp_avg_scale is not None:
        return weight, storage_formats.dequantize(update.exp_avg, update.exp_avg_scale).to(weight.dtype)
    return weight, update.exp_avg.to(weight.dtype)


def encode(update: TensorUpdate, weight: Tensor, momentum: Tensor) -> None:
    """Stores weight and momentum in place; a weight that is to be stored in bf16 is overwritten."""
    random = update.random_bits()
    if update.param.dtype == torch.bfloat16:
        words = weight.view(torch.int32)
        storage_formats.store_words(words, update.param, update.weight_remainder, update.settings.weight_bits, random)
    elif weight is not update.param:
        update.param.copy_(weight)
    if update.exp_avg_scale is not None:
        levels, scale = storage_formats.quantize(momentum.float(), random)
        update.exp_avg.copy_(levels)
        update.exp_avg_scale[: scale.numel()].copy_(scale)
    elif momentum is not update.exp_avg:
        update.exp_avg.copy_(momentum)
