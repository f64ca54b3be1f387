"""The fp32 weights behind a bf16 model: exact export, and seeding from an fp32 checkpoint."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lion_lightning.optim import layout
from lion_lightning.optim.kernels import storage_formats
from lion_lightning.optim.state import REMAINDER_DTYPES

HALF_OF_WHAT_IS_DROPPED = -(2**31)
"""The random word for `storage_formats.split_weight` that rounds to nearest: only its top bit is set."""


def full_precision_state_dict(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The model's state dict with every bf16 tensor as the fp32 number it stands for, exactly.

    Names are those of `model.state_dict()`. A weight with a remainder in the optimizer is joined with it; other bf16
    tensors are widened, and what is not bf16 is copied. Tied weights are converted once and stay one tensor under
    their names, in memory and in a file of torch.save. DTensors stay sharded.

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
            done[id(value)] = _full(value, optimizer.state.get(value, {}))
        exported[name] = done[id(value)]
    return exported


def seed_full_precision(model: nn.Module, optimizer: Optimizer, weights: Mapping[str, Tensor]) -> None:
    """Sets a model and the remainders in its optimizer to fp32 weights, the inverse of `full_precision_state_dict`.

    A bf16 parameter that the optimizer steps takes as many bits as its group's `weight_bits` says (24 and 16 round to
    nearest); every other tensor is copied. The momentum is left alone.

    Args:
        model: takes the weights in place.
        optimizer: `Lion` over parameters of the model.
        weights: fp32 tensors under the names of `model.state_dict()`.

    Raises:
        ValueError: names are missing or unknown, or a shape does not fit; nothing has been changed then.
    """
    targets = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    _check_names(targets, weights)
    kept = {param: group["weight_bits"] for group in optimizer.param_groups for param in group["params"]}
    done: set[int] = set()
    with torch.no_grad():
        for name, target in targets.items():
            if id(target) in done:
                continue
            done.add(id(target))
            if target.dtype == torch.bfloat16 and target in kept:
                _seed(target, optimizer.state[target], _like(weights[name], target), kept[target])
            else:
                target.copy_(_like(weights[name], target))


def remainder_of(full: Tensor, weight: Tensor) -> Tensor:
    """The int16 that leads from a bf16 weight to an fp32 number that rounds to it.

    A number exactly between two bf16 numbers, which round-half-even may have stored as the lower, ends one fp32 bit
    short of the middle; nothing else is lost. Numbers that are not finite have no remainder.
    """
    low = _words(full) - (weight.view(torch.int16).to(torch.int64) << 16)
    low = torch.where(full.isfinite() & (full.sign() * weight.sign() >= 0), low, 0)
    return low.clamp(-(2**15), 2**15 - 1).to(torch.int16)


def _words(full: Tensor) -> Tensor:
    return full.float().view(torch.int32).to(torch.int64)


def _full(value: Tensor, state: Mapping[str, Any]) -> Tensor:
    value = value.detach()
    if value.dtype != torch.bfloat16:
        return value.clone()
    remainder = state.get("weight_remainder")
    out = torch.empty_like(value, dtype=torch.float32)
    layout.local(out).copy_(
        storage_formats.join_weight(layout.local(value), None if remainder is None else layout.local(remainder))
    )
    return out


def _seed(param: Tensor, state: dict[str, Any], full: Tensor, weight_bits: int) -> None:
    here = layout.local(full).float()
    random = torch.full_like(here, HALF_OF_WHAT_IS_DROPPED, dtype=torch.int32)
    high, low = storage_formats.split_weight(here, weight_bits, random)
    layout.local(param.detach()).copy_(high)
    dtype = REMAINDER_DTYPES[weight_bits]
    state.pop("weight_remainder", None)
    if dtype is not None and low is not None:
        remainder = state["weight_remainder"] = torch.zeros_like(param, dtype=dtype, requires_grad=False)
        layout.local(remainder).copy_(low)


def _like(value: Tensor, target: Tensor) -> Tensor:
    """The value on the target's device, sharded as the target is."""
    if layout.is_sharded(target) and not layout.is_sharded(value):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)  # type: ignore[attr-defined]
    return value.to(target.device)


def _check_names(targets: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    missing, unknown = sorted(set(targets) - set(weights)), sorted(set(weights) - set(targets))
    if missing or unknown:
        raise ValueError(f"weights do not fit the model; the first missing are {missing[:5]}, unknown {unknown[:5]}")
    for name, target in targets.items():
        if weights[name].shape != target.shape:
            shapes = tuple(weights[name].shape), tuple(target.shape)
            raise ValueError(f"weights[{name!r}] has shape {shapes[0]}, which is not allowed: use {shapes[1]}")
