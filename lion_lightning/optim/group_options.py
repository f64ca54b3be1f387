"""Validation of the options, parameters and gradients of a parameter group."""

import difflib
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lion_lightning.optim import layout

CHOICES: dict[str, tuple[object, ...]] = {
    "weight_bits": (32, 24, 16),
    "nonfinite": ("skip", "propagate"),
    "fused": (None, True, False),
    **dict.fromkeys(("cautious", "cautious_decay", "maximize"), (True, False)),
}
MOMENTUM_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
ROUNDED_ZERO = -1e-12  # some schedules of torch, such as LinearLR to 0, end a rounding error below zero
EXTREME_RATE = 0.1
EXTREME_RATE_WARNING = (
    "lr={lr:g} moves every weight of Lion by {lr:g} in each step, whatever the gradient's size; usual rates are 1e-5 "
    "to 1e-2, about a tenth of AdamW's (see lion_lightning.from_adamw)"
)
PARAM_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def momentum_dtype(value: object) -> torch.dtype | None:
    """The torch dtype of the option `momentum_dtype`, which is a torch dtype or its name; None stays None.

    Raises:
        ValueError: the value is not None, float32, bfloat16 or int8.
    """
    if value is None or value in MOMENTUM_DTYPES.values():
        return value  # type: ignore[return-value]
    if isinstance(value, str) and value in MOMENTUM_DTYPES:
        return MOMENTUM_DTYPES[value]
    raise ValueError(f"momentum_dtype={value!r} is not allowed: use None, {', '.join(MOMENTUM_DTYPES)}")


def check(group: Mapping[str, Any]) -> None:
    """Checks the options of a group. The values of tensors on an accelerator are not read, which would synchronise.

    Args:
        group: has every option of `Lion`; `step` and other keys are optional.

    Raises:
        ValueError: an option is out of range; names it, its value and what is allowed.
    """
    for name in ("lr", "weight_decay"):
        rate = plain(group[name])
        if isinstance(rate, Tensor):
            if rate.numel() != 1:
                raise ValueError(f"{name} is a tensor of shape {tuple(rate.shape)}, not allowed: use one element")
            rate = rate.item() if rate.device.type == "cpu" else 0.0
        if not isinstance(rate, (int, float)) or isinstance(rate, bool) or not ROUNDED_ZERO <= rate < math.inf:
            raise ValueError(f"{name}={rate!r} is not allowed: use a finite number, 0 or above")
    betas = plain(group["betas"])
    numbers = isinstance(betas, (tuple, list)) and all(isinstance(beta, (int, float)) for beta in betas)
    if not numbers or len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas={betas!r} is not allowed: use two numbers in [0, 1)")
    for name, allowed in CHOICES.items():
        value = plain(group[name])
        if not any(value == choice and type(value) is type(choice) for choice in allowed):  # 1 is not True
            raise ValueError(f"{name}={value!r} is not allowed: use one of {', '.join(map(repr, allowed))}")
    momentum_dtype(group["momentum_dtype"])
    seed = plain(group["seed"])
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed!r} is not allowed: use a whole number from 0 to 2**64 - 1")
    step = plain(group.get("step", 0))
    if isinstance(step, Tensor) and step.numel() == 1:
        step = step.item() if step.device.type == "cpu" else 0
    if not isinstance(step, (int, float)) or not 0 <= step < 2**63 or step != int(step):
        raise ValueError(f"step={step!r} is not allowed: use a whole number from 0 to 2**63 - 1")


def check_names(group: Mapping[str, Any], options: Collection[str]) -> None:
    """Refuses keys of a parameter group that resemble the name of an option; others may have any name.

    A key that has all the words of an option, such as `weight_decay_mult`, is a name of the user's own.

    Args:
        group: as a user gives it.
        options: names of the options.

    Raises:
        ValueError: names the key and the option it resembles.
    """
    for key in group:
        likeness = difflib.get_close_matches(key, options, n=1, cutoff=0.8)
        if likeness and key not in options and not set(likeness[0].split("_")) < set(key.split("_")):
            raise ValueError(f"parameter group option {key!r} is unknown: did you mean {likeness[0]!r}?")


def check_param(param: Tensor) -> None:
    """Refuses parameters that cannot be updated; frozen and lazy (uninitialised) ones are not checked.

    Raises:
        ValueError: the dtype is not supported, there is no data or elements share memory; names what is allowed.
    """
    if not param.requires_grad or is_lazy(param):
        return
    if param.dtype == torch.float16:
        raise ValueError(
            "params contain a tensor of dtype torch.float16, which is not allowed: it cannot hold small steps. "
            "Use bfloat16 parameters, or float32 parameters with autocast to float16"
        )
    if param.dtype not in PARAM_DTYPES:
        allowed = ", ".join(str(dtype) for dtype in PARAM_DTYPES)
        raise ValueError(f"params contain a tensor of dtype {param.dtype}, which is not allowed: use {allowed}")
    if layout.is_expanded(param):
        raise ValueError(
            f"params contain an expanded tensor (shape {tuple(param.shape)}, strides {param.stride()}), whose elements "
            "share memory, which is not allowed: use a clone of it"
        )


def check_grad(grad: Tensor, param: Tensor) -> None:
    """Refuses gradients, and parameters with a gradient, that no engine can read.

    Args:
        grad: the gradient of `param`.
        param: the parameter to be updated.

    Raises:
        ValueError: the gradient is sparse, complex or not shaped and placed as the parameter, or `check_param` refuses.
    """
    if param.dtype not in PARAM_DTYPES or not param.is_contiguous():
        check_param(param)
    if param.device.type == "meta":
        raise ValueError("the parameter is on device meta, which is not allowed: give it data (Module.to_empty)")
    if grad.layout != torch.strided:
        raise ValueError(f"gradient of layout {grad.layout} is not allowed: use dense gradients")
    if not grad.is_floating_point():
        raise ValueError(f"gradient of dtype {grad.dtype} is not allowed: use real gradients")
    if layout.is_sharded(grad) != layout.is_sharded(param):
        kinds = type(grad).__name__, type(param).__name__
        raise ValueError(
            f"gradient of type {kinds[0]} is not allowed beside a parameter of type {kinds[1]}: use the same"
        )
    if grad.shape != param.shape or grad.device != param.device:
        found, allowed = (f"{tuple(tensor.shape)} on {tensor.device}" for tensor in (grad, param))
        raise ValueError(f"gradient of shape {found} is not allowed: use {allowed}")


def saved(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group as a checkpoint keeps it: plain numbers and names, without `fused`, which depends on the machine."""
    dtype = momentum_dtype(group["momentum_dtype"])
    options = {key: value if key == "params" else plain(value) for key, value in group.items()}
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    return {**options, "fused": None, "step": int(group["step"]), "momentum_dtype": name}


def plain(value: Any) -> Any:
    """Converts a number of numpy, also within a tuple or list, to one of Python; anything else is returned as it is."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(plain, value))
    if type(value).__module__ == "numpy" and getattr(value, "size", 0) == 1:
        return value.item()
    return value
