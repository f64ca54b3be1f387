"""The state of one parameter: its momentum, and the bits its bf16 weight cannot hold.

Keys, each present only where it is needed:
    exp_avg: momentum, shaped and laid out as the parameter.
    exp_avg_scale: fp32 scales of an int8 momentum, one per block of 256 elements in memory order.
    weight_remainder: int16 (32 bits) or int8 (24 bits), shaped and laid out as a bf16 parameter.
A DTensor parameter has DTensors as state. The scales of its int8 momentum belong to the blocks of each local part, so
such a state can be loaded by as many processes as saved it.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from lion_lightning.optim import layout
from lion_lightning.optim.kernels import storage_formats

REMAINDER_DTYPES = {32: torch.int16, 24: torch.int8, 16: None}
SMALL_ELEMENTS = 4096
"""Momentum of parameters with fewer elements stays fp32 where int8 is asked for: it costs next to nothing."""


def prepare(state: dict[str, Any], param: Tensor, weight_bits: int, momentum_dtype: torch.dtype | None) -> None:
    """Creates what is missing from a parameter's state and converts what is stored otherwise than asked.

    Args:
        state: the parameter's entry in `Optimizer.state`; changed in place.
        param: bf16, fp32 or fp64 parameter.
        weight_bits: 32, 24 or 16; of meaning to bf16 parameters only.
        momentum_dtype: of `exp_avg`; None keeps what there is and starts with the parameter's dtype.
    """
    if momentum_dtype == torch.int8 and param.numel() < SMALL_ELEMENTS:
        momentum_dtype = torch.float32
    exp_avg = state.get("exp_avg")
    if exp_avg is None:
        state["exp_avg"] = torch.zeros_like(param, dtype=momentum_dtype, requires_grad=False)
        if momentum_dtype == torch.int8:
            state["exp_avg_scale"] = zero_scale(param)
    elif not _fits(exp_avg, param) or momentum_dtype not in (None, exp_avg.dtype):
        store_momentum(state, param, restored_momentum(state), momentum_dtype or exp_avg.dtype)
    _prepare_remainder(state, param, REMAINDER_DTYPES[weight_bits] if param.dtype == torch.bfloat16 else None)


def _prepare_remainder(state: dict[str, Any], param: Tensor, dtype: torch.dtype | None) -> None:
    remainder = state.get("weight_remainder")
    if dtype is None:
        state.pop("weight_remainder", None)
    elif remainder is None:
        state["weight_remainder"] = torch.zeros_like(param, dtype=dtype, requires_grad=False)
    else:
        if remainder.dtype != dtype:
            state["weight_remainder"] = remainder = converted_remainder(remainder, dtype)
        if not _fits(remainder, param):
            state["weight_remainder"] = _like(remainder, param)


def converted_remainder(remainder: Tensor, dtype: torch.dtype) -> Tensor:
    """A remainder of 16 bits as 8 (the lower ones dropped) or the reverse."""
    if dtype == torch.int8:
        return (remainder >> 8).to(torch.int8)
    return remainder.to(torch.int16) << 8


def zero_scale(param: Tensor) -> Tensor:
    """Scales of a momentum of zeros: fp32 of shape (ceil(n / 256),), or as many for each shard of a DTensor."""
    if not layout.is_sharded(param):
        return torch.zeros(
            -(-param.numel() // storage_formats.BLOCK_ELEMENTS), dtype=torch.float32, device=param.device
        )
    from torch.distributed.tensor import DTensor, Shard

    placements: tuple[Any, ...] = param.placements  # type: ignore[attr-defined]
    largest, shards = list(param.shape), 1
    for ways, placement in zip(param.device_mesh.shape, placements, strict=True):  # type: ignore[attr-defined]
        if placement.is_shard():
            largest[placement.dim] = -(-largest[placement.dim] // ways)
            shards *= ways
    blocks = -(-torch.Size(largest).numel() // storage_formats.BLOCK_ELEMENTS)
    here = torch.zeros(blocks, dtype=torch.float32, device=layout.local(param).device)
    across = [Shard(0) if placement.is_shard() else placement for placement in placements]
    shape, mesh = torch.Size((blocks * shards,)), param.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(here, mesh, across, run_check=False, shape=shape, stride=(1,))


def restored_momentum(state: dict[str, Any]) -> Tensor:
    """The momentum as a floating tensor of its shape; local to this process for a DTensor of int8."""
    exp_avg, scale = state["exp_avg"], state.get("exp_avg_scale")
    if scale is None:
        return exp_avg
    levels = layout.local(exp_avg)
    values = storage_formats.dequantize(layout.flat(levels), layout.local(scale))
    return torch.empty_like(levels, dtype=torch.float32).copy_(values.as_strided(levels.shape, levels.stride()))


def store_momentum(state: dict[str, Any], param: Tensor, momentum: Tensor, dtype: torch.dtype) -> None:
    """Stores a momentum as `dtype`, laid out as the parameter; int8 rounds to nearest."""
    state.pop("exp_avg_scale", None)
    target = state["exp_avg"] = torch.zeros_like(param, dtype=dtype, requires_grad=False)
    if dtype != torch.int8:
        layout.local(target).copy_(layout.local(momentum))
        return
    scale = state["exp_avg_scale"] = zero_scale(param)
    here = layout.local(target)
    levels, scales = storage_formats.quantize(
        layout.flat(layout.laid_out_like(layout.local(momentum).float(), here)), None
    )
    layout.flat(here).copy_(levels)
    layout.local(scale)[: scales.numel()].copy_(scales)


def _fits(tensor: Tensor, param: Tensor) -> bool:
    """Whether state has the memory layout of the parameter, or a dense one where the parameter has gaps."""
    here, weight = layout.local(tensor), layout.local(param)
    if here.shape == weight.shape and here.is_contiguous() and weight.is_contiguous():
        return True
    if not layout.is_dense(weight):
        return layout.same_layout(here, torch.empty_like(weight, device="meta"))
    return layout.is_dense(here) and layout.same_layout(here, weight)


def _like(tensor: Tensor, param: Tensor) -> Tensor:
    return torch.zeros_like(param, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


def loaded(value: Any, param: Tensor | None) -> Any:
    """State as loaded: tensors on the parameter's device in their own dtype, sharing no memory with what was saved."""
    if isinstance(value, Tensor):
        moved = value if param is None else value.to(param.device)
        return moved.clone() if moved is value else moved
    if isinstance(value, dict):
        return {key: loaded(item, param) for key, item in value.items()}
    return deepcopy(value)


def momentum_slice(state: dict[str, Any], start: int, stop: int) -> Tensor:
    """Elements of the local shard's momentum, whatever its storage; float32 of shape (stop - start,).

    Args:
        state: of one parameter, with a momentum.
        start, stop: in memory order; `start` is a multiple of 256.
    """
    momentum = layout.flat(layout.local(state["exp_avg"]))[start:stop]
    if "exp_avg_scale" not in state:
        return momentum.float()
    block = storage_formats.BLOCK_ELEMENTS
    scale = layout.local(state["exp_avg_scale"])[start // block : -(-stop // block)]
    return storage_formats.dequantize(momentum, scale).float()
