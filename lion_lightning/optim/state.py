"""The state of a parameter: this module alone checks, creates, converts, loads and exports it.

Keys, each present only if it is needed:
    exp_avg: momentum, with the shape and memory layout of the parameter.
    exp_avg_scale: fp32 scales of an int8 momentum, one per block of 256 elements in memory order.
    weight_remainder: int16 (32 bits) or int8 (24 bits), the bits that a bf16 weight cannot hold, with the shape and
        memory layout of the parameter.
A DTensor parameter has DTensors as state. Each local shard has scales for its own blocks. The number of scales
identifies the sharding, so that the state of another sharding is refused.
"""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lion_lightning.optim import layout
from lion_lightning.optim.kernels import storage_formats

SMALL_ELEMENTS = 4096
"""Parameters with fewer elements have fp32 momentum if int8 is requested, which takes little memory."""

DTYPES = {
    "exp_avg": (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int8),
    "exp_avg_scale": (torch.float32, torch.float64, torch.bfloat16),
    "weight_remainder": (torch.int16, torch.int8),
}
"""The tensors of a state, and the dtypes in which they are accepted."""

OF_OTHER_OPTIMIZERS = {"exp_avg_sq", "momentum_buffer", "square_avg", "step"}
"""Usual names of what other optimizers keep; beside them `exp_avg` means something else."""

_ROUND_TO_NEAREST = -(2**31)
"""The random word with which `storage_formats.store_words` rounds to nearest: only its top bit is set."""


def is_ready(entry: Mapping[str, Any], param: Tensor, weight_bits: int, momentum_dtype: torch.dtype | None) -> bool:
    """Whether a parameter's state is complete and stored as engines read it; only then may its addresses be taken.

    Args:
        entry: the parameter's entry in `Optimizer.state`.
        param: bf16, fp32 or fp64 parameter.
        weight_bits: 32, 24 or 16; used for bf16 parameters only.
        momentum_dtype: requested of `exp_avg`; None accepts any that an engine reads.
    """
    exp_avg, scale, remainder = entry.get("exp_avg"), entry.get("exp_avg_scale"), entry.get("weight_remainder")
    remainder_dtype = storage_formats.REMAINDER_DTYPES[weight_bits] if param.dtype == torch.bfloat16 else None
    if not isinstance(exp_avg, Tensor) or exp_avg.dtype not in DTYPES["exp_avg"]:
        return False
    if exp_avg.dtype != _stored_dtype(exp_avg.dtype, param, momentum_dtype):
        return False
    if not _fits(exp_avg, param) or (exp_avg.dtype == torch.int8) != (scale is not None):
        return False
    if scale is not None:
        whole = isinstance(scale, Tensor) and scale.dtype == torch.float32 and scale.device == param.device
        if not whole or scale.shape != _scale_shape(param) or not layout.local(scale).is_contiguous():
            return False
        if not _has_enough_scales(scale, param):
            return False
    if remainder is None or remainder_dtype is None:
        return remainder is None and remainder_dtype is None
    return isinstance(remainder, Tensor) and remainder.dtype == remainder_dtype and _fits(remainder, param)


def check(entry: Mapping[str, Any], param: Tensor) -> None:
    """Refuses state that does not fit a parameter; `prepare` can convert any other.

    Args:
        entry: the parameter's entry in `Optimizer.state`, or a candidate for it.
        param: the parameter.

    Raises:
        ValueError: names the tensor, the value found and the values allowed.
    """
    for key in DTYPES:
        if key in entry:
            _check_tensor(key, entry[key], param)
    dtype = entry["exp_avg"].dtype if "exp_avg" in entry else None
    if dtype == torch.int8 and "exp_avg_scale" not in entry:
        raise ValueError(
            f"exp_avg_scale is missing beside an exp_avg of int8: use float32 of shape {tuple(_scale_shape(param))}"
        )
    if dtype != torch.int8 and "exp_avg_scale" in entry:
        beside = "no exp_avg" if dtype is None else f"an exp_avg of {dtype}"
        raise ValueError(
            f"exp_avg_scale is given with {beside}, which is not allowed: use it beside an exp_avg of int8"
        )
    if "weight_remainder" in entry and param.dtype != torch.bfloat16:
        raise ValueError(
            f"weight_remainder is given with a parameter of {param.dtype}, which is not allowed: use it beside one of "
            "bfloat16 (full_precision_state_dict exports the weights in fp32), or remove it from the state"
        )


def check_device(entry: Mapping[str, Any], param: Tensor) -> None:
    """Refuses, before a step, state that is not where its parameter is. Loading moves state, as torch does.

    Args:
        entry: the parameter's entry in `Optimizer.state`, which `check` accepts.
        param: the parameter.

    Raises:
        ValueError: names the tensor and both devices.
    """
    for key in DTYPES:
        if key in entry and entry[key].device != param.device:
            raise ValueError(
                f"{key} is on {entry[key].device}, which is not allowed for a parameter on {param.device}: move the "
                "model before its optimizer steps; optimizer.load_state_dict(optimizer.state_dict()) moves the state"
            )


def _check_tensor(key: str, value: Any, param: Tensor) -> None:
    """Refuses one tensor of a state."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{key} is a {type(value).__name__}, which is not allowed: use a tensor")
    if nn.parameter.is_lazy(param):
        raise ValueError(f"{key} is not allowed for a lazy parameter: run the module once, which gives it a shape")
    if value.layout != torch.strided or value.device.type == "meta":
        kind = "device meta, without data," if value.device.type == "meta" else f"layout {value.layout}"
        raise ValueError(f"{key} has {kind}, which is not allowed: use a dense tensor with data")
    if value.dtype not in DTYPES[key]:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES[key])
        raise ValueError(f"{key} has dtype {value.dtype}, which is not allowed: use {names}")
    is_scale = key == "exp_avg_scale"
    shape = _scale_shape(param) if is_scale else param.shape
    if value.shape != shape:
        sharded = " (those of sharded parameters fit the same shards only)" if is_scale else ""
        raise ValueError(f"{key} has shape {tuple(value.shape)}, which is not allowed: use {tuple(shape)}{sharded}")
    if layout.is_sharded(value) != layout.is_sharded(param):
        kinds = type(value).__name__, type(param).__name__
        raise ValueError(
            f"{key} is a {kinds[0]} beside a parameter of type {kinds[1]}, which is not allowed: load by "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
        )
    same_shards = layout.local(value).shape == layout.local(param).shape
    if not (_has_enough_scales(value, param) if is_scale else same_shards):
        raise ValueError(f"{key} is sharded as {value.placements}, which is not allowed: use {param.placements}")  # type: ignore[attr-defined]


def prepare(
    entry: dict[str, Any], param: Tensor, weight_bits: int, momentum_dtype: torch.dtype | None
) -> dict[str, Any]:
    """A new state in which missing tensors are created, and others are converted to the form requested.

    Args:
        entry: the parameter's entry in `Optimizer.state`, which `check` accepts; it does not change, so that after an
            interrupt the state is either the old one or the new one.
        param: bf16, fp32 or fp64 parameter.
        weight_bits: 32, 24 or 16; used for bf16 parameters only.
        momentum_dtype: of `exp_avg`; None keeps the dtype found, and starts with that of the parameter.
    """
    entry = dict(entry)
    exp_avg, scale = entry.get("exp_avg"), entry.pop("exp_avg_scale", None)
    if exp_avg is None:
        dtype = _stored_dtype(param.dtype, param, momentum_dtype)
        entry["exp_avg"] = torch.zeros_like(param, dtype=dtype, requires_grad=False)
        if dtype == torch.int8:
            entry["exp_avg_scale"] = _zero_scale(param)
    else:
        dtype = _stored_dtype(exp_avg.dtype, param, momentum_dtype)
        if scale is not None:
            scale = scale.float().contiguous()
        if dtype != exp_avg.dtype or not _fits(exp_avg, param):
            entry |= _converted_momentum(exp_avg, scale, param, dtype)
        elif scale is not None:
            entry["exp_avg_scale"] = scale
    remainder_dtype = storage_formats.REMAINDER_DTYPES[weight_bits] if param.dtype == torch.bfloat16 else None
    remainder = entry.get("weight_remainder")
    if remainder_dtype is None:
        entry.pop("weight_remainder", None)
    elif remainder is None:
        entry["weight_remainder"] = torch.zeros_like(param, dtype=remainder_dtype, requires_grad=False)
    elif remainder.dtype != remainder_dtype or not _fits(remainder, param):
        if remainder.dtype != remainder_dtype:  # 8 bits are the upper half of 16
            is_narrower = remainder_dtype == torch.int8
            remainder = (remainder >> 8).to(torch.int8) if is_narrower else remainder.to(torch.int16) << 8
        entry["weight_remainder"] = torch.zeros_like(param, dtype=remainder_dtype, requires_grad=False).copy_(remainder)
    return entry


def momentum_slice(state: dict[str, Tensor], start: int, stop: int) -> Tensor:
    """The momentum of a range of elements in float32, from any storage format.

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


def loaded(entry: Any, param: Tensor) -> dict[str, Any]:
    """Loads a parameter's state: copies on the parameter's device, in the dtype saved.

    Momentum in fp16, or in fp64 beside a parameter that is not fp64, becomes fp32, as no engine reads it. What tools
    around the optimizer keep there, such as the slow weights of Lookahead, is copied as it is.

    Args:
        entry: the parameter's entry in a state dict; does not change.
        param: the parameter.

    Raises:
        ValueError: the entry is no dict, has unknown keys without a momentum or keys of other optimizers, or `check`
            refuses it.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"the state is a {type(entry).__name__}, which is not allowed: use a dict")
    # torch.distributed.checkpoint's unflattening leaves an empty dict where a tensor is missing.
    entry = {key: value for key, value in entry.items() if not (isinstance(value, dict) and not value)}
    unknown = [key for key in entry if key not in DTYPES]
    if unknown and ("exp_avg" not in entry or OF_OTHER_OPTIMIZERS & set(unknown)):
        raise ValueError(f"the state has unknown keys {unknown}; allowed are {', '.join(DTYPES)}")
    check(entry, param)
    fresh = {}
    for key, value in entry.items():
        if key in unknown:
            fresh[key] = value.to(param.device, copy=True) if isinstance(value, Tensor) else deepcopy(value)
            continue
        dtype = _stored_dtype(value.dtype, param, None) if key == "exp_avg" else value.dtype
        moved = value.detach().to(param.device, dtype)
        fresh[key] = moved.clone() if layout.local(moved).data_ptr() == layout.local(value).data_ptr() else moved
    return fresh


def check_gatherable(entry: Mapping[str, Any], param: Tensor) -> None:
    """Refuses to save state that FSDP1 (FullyShardedDataParallel) cannot gather, which is all but `exp_avg`.

    Args:
        entry: the parameter's entry in `Optimizer.state`.
        param: the parameter; FSDP1 sets an attribute on its parameters.

    Raises:
        ValueError: names the tensors and the alternatives.
    """
    beyond = [key for key in ("exp_avg_scale", "weight_remainder") if key in entry]
    if beyond and (getattr(param, "_fsdp_flattened", False) or getattr(param, "_is_flat_param", False)):
        raise ValueError(
            f"{' and '.join(beyond)} of a parameter of FSDP1 cannot be gathered, so that saving is not allowed: use "
            "float32 parameters with a momentum_dtype other than int8, or FSDP2 (torch.distributed.fsdp.fully_shard)"
        )


def _stored_dtype(found: torch.dtype, param: Tensor, requested: torch.dtype | None) -> torch.dtype:
    """The dtype of a parameter's momentum, given the one found and the group's `momentum_dtype`."""
    if requested is not None:
        return torch.float32 if requested == torch.int8 and param.numel() < SMALL_ELEMENTS else requested
    widest = torch.float64 if param.dtype == torch.float64 else torch.float32
    return widest if found in (torch.float16, torch.float64) else found


def _scale_count(shape: Sequence[int], ways: Sequence[int]) -> int:
    """Number of scales of an int8 momentum over all shards, cut `ways` along each dimension; identifies the sharding.

    If the blocks of the shards are those of the whole tensor, there is one scale per block. Otherwise each shard has a
    few more than it uses: an odd number, so that world sizes that are powers of two differ, congruent to 1 modulo 4 if
    rows are sharded and to 3 otherwise. State of another sharding therefore has another shape and is refused.
    """
    block = storage_formats.BLOCK_ELEMENTS
    shards, whole = math.prod(ways), -(-math.prod(shape) // block)
    elements = math.prod(-(-size // cut) for size, cut in zip(shape, ways, strict=True))
    blocks, is_by_rows = -(-elements // block), shards == max(ways[:1], default=1)
    if shards == 1 or (is_by_rows and shape[0] % shards == 0 and elements % block == 0):
        return whole
    while blocks % 4 != (1 if is_by_rows else 3) or blocks * shards == whole:
        blocks += 1
    return blocks * shards


def _scale_shape(param: Tensor) -> torch.Size:
    """Shape of the scales of an int8 momentum, which are sharded along their only dimension."""
    if not layout.is_sharded(param):
        return torch.Size((-(-param.numel() // storage_formats.BLOCK_ELEMENTS),))
    ways = [1] * param.ndim
    placements: tuple[Any, ...] = param.placements  # type: ignore[attr-defined]
    for cut, placement in zip(param.device_mesh.shape, placements, strict=True):  # type: ignore[attr-defined]
        if _is_cut(placement):
            ways[placement.dim] *= cut
    return torch.Size((_scale_count(param.shape, ways),))


def _is_cut(placement: Any) -> bool:
    """Whether a placement shards; that of FSDP over tensor parallelism says False to `is_shard`."""
    return not (placement.is_replicate() or placement.is_partial())


def _zero_scale(param: Tensor) -> Tensor:
    """Scales of a momentum of zeros."""
    shape = _scale_shape(param)
    if not layout.is_sharded(param):
        return torch.zeros(shape, dtype=torch.float32, device=param.device)
    from torch.distributed.tensor import DTensor, Shard

    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    shards = math.prod(ways for ways, placement in zip(mesh.shape, placements, strict=True) if _is_cut(placement))
    here = torch.zeros(shape[0] // shards, dtype=torch.float32, device=layout.local(param).device)
    across = [Shard(0) if _is_cut(placement) else placement for placement in placements]
    return DTensor.from_local(here, mesh, across, run_check=False, shape=shape, stride=(1,))


def _converted_momentum(exp_avg: Tensor, scale: Tensor | None, param: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The momentum as `dtype` with the memory layout of the parameter, and its scales; int8 rounds to nearest."""
    momentum = layout.local(exp_avg)
    if scale is not None:
        if not layout.is_dense(momentum):
            momentum = momentum.contiguous()
        values = storage_formats.dequantize(layout.flat(momentum), layout.local(scale))
        shaped = values.as_strided(momentum.shape, momentum.stride())
        momentum = torch.empty_like(momentum, dtype=torch.float32).copy_(shaped)
    target = torch.zeros_like(param, dtype=dtype, requires_grad=False)
    here = layout.local(target)
    if dtype != torch.int8:
        here.copy_(momentum)
        return {"exp_avg": target}
    levels, scales = storage_formats.quantize(layout.flat(layout.laid_out_like(momentum.float(), here)), None)
    layout.flat(here).copy_(levels)
    scale = _zero_scale(param)
    layout.local(scale)[: scales.numel()].copy_(scales)
    return {"exp_avg": target, "exp_avg_scale": scale}


def _has_enough_scales(scale: Tensor, param: Tensor) -> bool:
    """Whether the local part of the scales covers every block of the parameter's local part."""
    return layout.local(scale).numel() * storage_formats.BLOCK_ELEMENTS >= layout.local(param).numel()


def _fits(tensor: Tensor, param: Tensor) -> bool:
    """Whether state has the memory layout of the parameter, or a dense one if the parameter has gaps."""
    if tensor.layout != torch.strided or tensor.device != param.device:
        return False
    here, weight = layout.local(tensor), layout.local(param)
    if here.shape != weight.shape or here.is_neg():
        return False
    if here.is_contiguous() and weight.is_contiguous():
        return True
    return layout.same_layout(here, torch.empty_like(weight, device="meta"))  # dense


def full_precision_state_dict(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The model's state dict with every bf16 tensor as the fp32 numbers that it represents, exactly.

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
            if target.dtype != torch.bfloat16 or target not in bits:
                target.copy_(weight)
                continue
            words = storage_formats.ordinary(layout.local(weight.to(target.device)).float()).view(torch.int32)
            random = torch.full_like(words, _ROUND_TO_NEAREST)
            dtype, low = storage_formats.REMAINDER_DTYPES[bits[target]], None
            optimizer.state[target].pop("weight_remainder", None)
            if dtype is not None:
                remainder = torch.zeros_like(target, dtype=dtype, requires_grad=False)
                optimizer.state[target]["weight_remainder"], low = remainder, layout.local(remainder)
            storage_formats.store_words(words, layout.local(target.detach()), low, bits[target], random)
