"""The state of one parameter: its momentum, the bits its bf16 weight cannot hold, and their layout in memory.

Keys, each present only where it is needed:
    exp_avg: momentum, shaped and laid out as the parameter.
    exp_avg_scale: fp32 scales of an int8 momentum, one per block of 256 elements in memory order.
    weight_remainder: int16 (32 bits) or int8 (24 bits), shaped and laid out as a bf16 parameter.
A DTensor parameter has DTensors as state, sharded alike.
"""

from typing import Any

import torch
from torch import Tensor

REMAINDER_DTYPES = {32: torch.int16, 24: torch.int8, 16: None}


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, told without importing torch.distributed."""
    return hasattr(tensor, "to_local") and hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that lives here, possibly empty; other tensors as they are."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def prepare(state: dict[str, Any], param: Tensor, weight_bits: int, momentum: torch.dtype | None) -> None:
    """Creates what is missing from a parameter's state and converts what is stored otherwise than asked.

    Args:
        state: the parameter's entry in `Optimizer.state`; changed in place.
        param: bf16, fp32 or fp64 parameter.
        weight_bits: 32, 24 or 16; of meaning to bf16 parameters only.
        momentum: dtype of `exp_avg`; None keeps what there is and starts with the parameter's dtype.
    """
    exp_avg = state.get("exp_avg")
    if exp_avg is None:
        state["exp_avg"] = torch.zeros_like(param, dtype=momentum, requires_grad=False)
    elif momentum is not None and exp_avg.dtype != momentum:
        state["exp_avg"] = exp_avg.to(momentum)
    remainder_dtype = REMAINDER_DTYPES[weight_bits] if param.dtype == torch.bfloat16 else None
    remainder = state.get("weight_remainder")
    if remainder_dtype is None:
        state.pop("weight_remainder", None)
    elif remainder is None:
        state["weight_remainder"] = torch.zeros_like(param, dtype=remainder_dtype, requires_grad=False)
    elif remainder.dtype != remainder_dtype:
        state["weight_remainder"] = converted_remainder(remainder, remainder_dtype)


def converted_remainder(remainder: Tensor, dtype: torch.dtype) -> Tensor:
    """A remainder of 16 bits as 8 (the lower ones dropped) or the reverse."""
    if dtype == torch.int8:
        return (remainder >> 8).to(torch.int8)
    return remainder.to(torch.int16) << 8


def flat(tensor: Tensor) -> Tensor | None:
    """A 1-D view of all elements in memory order, or None where memory has gaps."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    if is_dense(tensor):
        return tensor.as_strided((tensor.numel(),), (1,))
    return None


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return not tensor.is_neg()


def same_layout(tensor: Tensor, other: Tensor) -> bool:
    """Whether equal positions in memory are equal elements; both must be dense."""
    if tensor.shape != other.shape:
        return False
    if tensor.is_contiguous() and other.is_contiguous():
        return True
    pairs = zip(tensor.shape, tensor.stride(), other.stride(), strict=True)
    return all(size == 1 or left == right for size, left, right in pairs)


def laid_out_like(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor, or a copy of it, with the memory layout of `other`, which must be dense."""
    if is_dense(tensor) and same_layout(tensor, other):
        return tensor
    return torch.empty_like(other, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
