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
    """The float64 momentum that `exp_avg` stands for; int8 levels are signed squares in blocks of 256."""
    if scale is None:
        return exp_avg.double()
    flat = exp_avg.contiguous().view(-1).double()
    per_element = scale.double().repeat_interleave(256)[: flat.numel()]
    return (flat * flat.abs() * per_element).view(exp_avg.shape)


def weight_spacing(weight: Tensor, dtype: torch.dtype, weight_bits: int) -> Tensor:
    """Distance to the next representable weight, float64."""
    exponent = torch.frexp(weight.double()).exponent.double()
    mantissa_bits = {torch.float64: 53, torch.float32: 24}.get(dtype, weight_bits - 8)
    return torch.exp2(exponent - mantissa_bits)


def momentum_spacing(momentum: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance to the next representable momentum, float64; for int8 of the block's neighbouring squares."""
    if dtype == torch.int8:
        flat = momentum.double().abs().reshape(-1)
        padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 256)).view(-1, 256)
        unit = padded.amax(1, keepdim=True) / 127**2
        level = (padded / unit.clamp(min=1e-300)).sqrt()
        return ((2 * level + 1) * unit).view(-1)[: flat.numel()].view(momentum.shape)
    mantissa_bits = {torch.float64: 53, torch.float32: 24, torch.bfloat16: 8}[dtype]
    return torch.exp2(torch.frexp(momentum.double()).exponent.double() - mantissa_bits)
