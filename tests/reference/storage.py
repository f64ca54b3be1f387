"""What each storage format can resolve, in float64: bounds for rounding, and the values that state stands for."""

import torch
from torch import Tensor


def kept_weight(param: Tensor, remainder: Tensor | None) -> Tensor:
    """The float64 weight that a parameter and its remainder stand for."""
    if remainder is None:
        return param.detach().double()
    words = param.detach().contiguous().view(torch.int16).long() * 65536
    words = words + remainder.contiguous().long() * (1 if remainder.dtype == torch.int16 else 256)
    return words.to(torch.int32).view(torch.float32).double()


def kept_momentum(exp_avg: Tensor, scale: Tensor | None) -> Tensor:
    """The float64 momentum that `exp_avg` stands for; int8 levels follow the mu-law in blocks of 256.

    Level 16 e + f stands for 2^e (1 + f / 16) - 1 scales, for e below 8 and f below 16.
    """
    if scale is None:
        return exp_avg.double()
    flat = exp_avg.contiguous().view(-1).double()
    per_element = scale.double().repeat_interleave(256)[: flat.numel()]
    exponent, fraction = (flat.abs() / 16).floor(), flat.abs() % 16
    return (flat.sign() * (2.0**exponent * (1 + fraction / 16) - 1) * per_element).view(exp_avg.shape)


def weight_spacing(weight: Tensor, dtype: torch.dtype, weight_bits: int) -> Tensor:
    """Distance to the next representable weight, float64."""
    exponent = torch.frexp(weight.double()).exponent.double()
    mantissa_bits = {torch.float64: 53, torch.float32: 24}.get(dtype, weight_bits - 8)
    return torch.exp2(exponent - mantissa_bits)


def momentum_spacing(momentum: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance to the next representable momentum, float64; for int8 between the block's neighbouring levels."""
    if dtype == torch.int8:
        flat = momentum.double().abs().reshape(-1)
        padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 256)).view(-1, 256)
        unit = padded.amax(1, keepdim=True) / (2**7 * 31 / 16 - 1)
        exponent = torch.log2(padded / unit.clamp(min=1e-300) + 1).floor()
        return (2.0**exponent / 16 * unit).view(-1)[: flat.numel()].view(momentum.shape)
    mantissa_bits = {torch.float64: 53, torch.float32: 24, torch.bfloat16: 8}[dtype]
    return torch.exp2(torch.frexp(momentum.double()).exponent.double() - mantissa_bits)
