"""The state of a parameter: made, converted, loaded and exported here and nowhere else.

Keys, each present only where it is needed:
    exp_avg: momentum, with the shape and memory layout of the parameter.
    exp_avg_scale: fp32 scales of an int8 momentum, one per block of 256 elements in memory order.
    weight_remainder: int16 (32 bits) or int8 (24 bits), the bits that a bf16 weight cannot hold, with the shape and
        memory layout of the parameter.
A DTensor parameter has DTensors as state. The scales of its int8 momentum belong to the blocks of each local shard, so
such a state can be loaded by as many processes as saved it.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lion_lightning.optim import layout
from lion_lightning.optim.kernels import storage_formats

REMAINDER_DTYPES = {32: torch.int16, 24: torch.int8, 16: None}
SMALL_ELEMENTS = 4096
"""Momentum of parameters with fewer elements stays fp32 where int8 is requested: it costs next to nothing."""

_ROUND_TO_NEAREST = -(2**31)
"""The random word for `storage_formats.split_weight` that rounds to nearest: only its top bit is set."""


def prepare(state: dict[str, Any], param: Tensor, weight_bits: int, momentum_dtype: torch.dtype | None) -> None:
    """Creates what is missing from a parameter's state, and converts what is stored in another form than requested.

    Args:
        state: the parameter's entry in `Optimizer.state`; changed in place.
        param: bf16, fp32 or fp64 parameter.
        weight_bits: 32, 24 or 16; used for bf16 parameters only.
        momentum_dtype: of `exp_avg`; None keeps the dtype found and begins with that of the parameter.
    """
    if momentum_dtype == torch.int8 and param.numel() < SMALL_ELEMENTS:
        momentum_dtype = torch.float32
    exp_avg = state.get("exp_avg")
    if exp_avg is None:
        state["exp_avg"] = torch.zeros_like(param, dtype=momentum_dtype, requires_grad=False)
        if momentum_dtype == torch.int8:
            state["exp_avg_scale"] = _zero_scale(param)
    elif not _fits(exp_avg, param) or momentum_dtype not in (None, exp_avg.dtype):
        _convert_momentum(state, param, momentum_dtype or exp_avg.dtype)
    remainder_dtype = REMAINDER_DTYPES[weight_bits] if param.dtype == torch.bfloat16 else None
    remainder = state.get("weight_remainder")
    if remainder_dtype is None:
        state.pop("weight_remainder", None)
    elif remainder is None:
        state["weight_remainder"] = torch.zeros_like(param, dtype=remainder_dtype, requires_grad=False)
    elif remainder.dtype != remainder_dtype or not _fits(remainder, param):
        if remainder.dtype != remainder_dtype:  # 8 bits are the upper half of 16
            is_narrower = remainder_dtype == torch.int8
            remainder = (remainder >> 8).to(torch.int8) if is_narrower else remainder.to(torch.int16) << 8
        state["weight_remainder"] = torch.zeros_like(param, dtype=remainder_dtype, requires_grad=False).copy_(remainder)


def momentum_slice(state: dict[str, Tensor], start: int, stop: int) -> Tensor:
    """The momentum of some elements in float32, whatever its storage.

    Args:
        state: the parameter's entry in `Optimizer.state`, after a step.
        start: first element of the local shard, in memory order; a multiple of 256.
        stop: the element after the last.

    Returns:
        float32 of shape (stop - start,) on the device of the state; may share memory with it.
    """
    levels = layout.flat(layout.local(state["exp_avg"]))[start:stop]
    if "exp_avg_scale" not in state:
        return levels.float()
    block = storage_formats.BLOCK_ELEMENTS
    return storage_formats.dequantize(levels, layout.local(state["exp_avg_scale"])[start // block : -(-stop // block)])


def loaded(value: Any, param: Tensor | None) -> Any:
    """State as loaded: tensors on the parameter's device in their own dtype, sharing no memory with what was saved.

    Args:
        value: a tensor, a dict of such values, or anything else, which is copied.
        param: the parameter that the state belongs to; None leaves tensors on their device.
    """
    if isinstance(value, Tensor):
        moved = value if param is None else value.to(param.device)
        return moved.clone() if moved is value else moved
    if isinstance(value, dict):
        return {key: loaded(item, param) for key, item in value.items()}
    return deepcopy(value)


def _zero_scale(param: Tensor) -> Tensor:
    """Scales of a momentum of zeros: fp32 of shape (ceil(n / 256),), or as many for each shard of a DTensor."""
    block = storage_formats.BLOCK_ELEMENTS
    if not layout.is_sharded(param):
        return torch.zeros(-(-param.numel() // block), dtype=torch.float32, device=param.device)
    from torch.distributed.tensor import DTensor, Shard

    placements: tuple[Any, ...] = param.placements  # type: ignore[attr-defined]
    largest, shards = list(param.shape), 1
    for ways, placement in zip(param.device_mesh.shape, placements, strict=True):  # type: ignore[attr-defined]
        if placement.is_shard():
            largest[placement.dim] = -(-largest[placement.dim] // ways)
            shards *= ways
    blocks = -(-torch.Size(largest).numel() // block)
    here = torch.zeros(blocks, dtype=torch.float32, device=layout.local(param).device)
    across = [Shard(0) if placement.is_shard() else placement for placement in placements]
    shape, mesh = torch.Size((blocks * shards,)), param.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(here, mesh, across, run_check=False, shape=shape, stride=(1,))


def _convert_momentum(state: dict[str, Any], param: Tensor, dtype: torch.dtype) -> None:
    """Stores the momentum as `dtype` with the memory layout of the parameter; int8 rounds to nearest."""
    momentum, scale = layout.local(state["exp_avg"]), state.pop("exp_avg_scale", None)
    if scale is not None:
        values = storage_formats.dequantize(layout.flat(momentum), layout.local(scale))
        shaped = values.as_strided(momentum.shape, momentum.stride())
        momentum = torch.empty_like(momentum, dtype=torch.float32).copy_(shaped)
    target = state["exp_avg"] = torch.zeros_like(param, dtype=dtype, requires_grad=False)
    here = layout.local(target)
    if dtype != torch.int8:
        here.copy_(momentum)
        return
    levels, scales = storage_formats.quantize(layout.flat(layout.laid_out_like(momentum.float(), here)), None)
    layout.flat(here).copy_(levels)
    state["exp_avg_scale"] = _zero_scale(param)
    layout.local(state["exp_avg_scale"])[: scales.numel()].copy_(scales)


def _fits(tensor: Tensor, param: Tensor) -> bool:
    """Whether state has the memory layout of the parameter, or a dense one where the parameter has gaps."""
    here, weight = layout.local(tensor), layout.local(param)
    if here.shape == weight.shape and here.is_contiguous() and weight.is_contiguous():
        return True
    if not layout.is_dense(weight):
        return layout.same_layout(here, torch.empty_like(weight, device="meta"))
    return layout.is_dense(here) and layout.same_layout(here, weight)


def full_precision_state_dict(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The model's state dict with every bf16 tensor as the fp32 number it stands for, exactly.

    Names are those of `model.state_dict()`. A weight with a remainder in the optimizer is joined with it. Other bf16
    tensors are widened, and tensors of other dtypes are copied. Tied weights are converted once and stay one tensor
    under their names, in memory and in a file of torch.save. DTensors stay sharded.

    Args:
        model: whose parameters the optimizer steps.
        optimizer: `Lion`; its `weight_remainder` is read.
    """
    done: dict[int, Tensor] = {}
    exported = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            exported[name] = value
            continue
        if id(value) not in done:
            full = done[id(value)] = value.detach().clone()
            if value.dtype == torch.bfloat16:
                remainder = optimizer.state.get(value, {}).get("weight_remainder")
                low = None if remainder is None else layout.local(remainder)
                full = done[id(value)] = torch.empty_like(full, dtype=torch.float32)
                layout.local(full).copy_(storage_formats.join_weight(layout.local(value.detach()), low))
        exported[name] = done[id(value)]
    return exported


def seed_full_precision(model: nn.Module, optimizer: Optimizer, weights: Mapping[str, Tensor]) -> None:
    """Sets a model and the remainders in its optimizer to fp32 weights, the inverse of `full_precision_state_dict`.

    A bf16 parameter that the optimizer steps takes as many bits as its group's `weight_bits` says (24 and 16 round to
    nearest). Every other tensor is copied. The momentum is unchanged.

    Args:
        model: its weights are changed in place.
        optimizer: `Lion` over parameters of the model.
        weights: fp32 tensors under the names of `model.state_dict()`.

    Raises:
        ValueError: names are missing or unknown, or a shape does not fit; nothing has been changed then.
    """
    targets = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    missing, unknown = sorted(set(targets) - set(weights)), sorted(set(weights) - set(targets))
    if missing or unknown:
        raise ValueError(f"weights do not fit the model; the first missing are {missing[:5]}, unknown {unknown[:5]}")
    for name, target in targets.items():
        if weights[name].shape != target.shape:
            shapes = tuple(weights[name].shape), tuple(target.shape)
            raise ValueError(f"weights[{name!r}] has shape {shapes[0]}, which is not allowed: use {shapes[1]}")
    bits = {param: group["weight_bits"] for group in optimizer.param_groups for param in group["params"]}
    unique = {id(target): (target, weights[name]) for name, target in reversed(targets.items())}
    with torch.no_grad():
        for target, weight in unique.values():
            if layout.is_sharded(target) and not layout.is_sharded(weight):
                from torch.distributed.tensor import distribute_tensor

                weight = distribute_tensor(weight.to(target.device), target.device_mesh, target.placements)  # type: ignore[attr-defined]
            weight = weight.to(target.device)
            if target.dtype == torch.bfloat16 and target in bits:
                _seed(target, optimizer.state[target], layout.local(weight).float(), bits[target])
            else:
                target.copy_(weight)


def _seed(param: Tensor, state: dict[str, Any], weight: Tensor, weight_bits: int) -> None:
    """Sets one bf16 parameter and its remainder to the local part of an fp32 weight."""
    random = torch.full_like(weight, _ROUND_TO_NEAREST, dtype=torch.int32)
    high, low = storage_formats.split_weight(weight, weight_bits, random)
    layout.local(param.detach()).copy_(high)
    state.pop("weight_remainder", None)
    if low is not None:
        remainder = state["weight_remainder"] = torch.zeros_like(param, dtype=low.dtype, requires_grad=False)
        layout.local(remainder).copy_(low)


def remainder_of(full: Tensor, weight: Tensor) -> Tensor:
    """The int16 that leads from a bf16 weight to an fp32 number that rounds to it.

    A number exactly between two bf16 numbers, which round-half-even may have stored as the lower, ends one fp32 bit
    short of the middle; nothing else is lost. Numbers that are not finite have no remainder.

    Args:
        full: the numbers; fp32, or fp64 that fits.
        weight: bf16, of the same shape.
    """
    words = full.float().view(torch.int32).to(torch.int64)
    low = words - (weight.view(torch.int16).to(torch.int64) << 16)
    low = torch.where(full.isfinite() & (full.sign() * weight.sign() >= 0), low, 0)
    return low.clamp(-(2**15), 2**15 - 1).to(torch.int16)
