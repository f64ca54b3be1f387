"""The options of a parameter group: what is allowed, said in one sentence when it is not."""

import difflib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

OPTIONS = (
    "lr",
    "betas",
    "weight_decay",
    "weight_bits",
    "momentum_dtype",
    "cautious",
    "maximize",
    "nonfinite",
    "fused",
    "seed",
)
WEIGHT_BITS = (32, 24, 16)
NONFINITE = ("skip", "propagate")
MOMENTUM_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
PARAM_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def momentum_dtype(value: object) -> torch.dtype | None:
    """The dtype that `momentum_dtype` names, as a torch dtype or a string; None stays None.

    Raises:
        ValueError: it is none of None, float32, bfloat16, int8.
    """
    if value is None or value in MOMENTUM_DTYPES.values():
        return value  # type: ignore[return-value]
    if isinstance(value, str) and value in MOMENTUM_DTYPES:
        return MOMENTUM_DTYPES[value]
    raise ValueError(f"momentum_dtype={value!r} is not allowed: use None, {', '.join(MOMENTUM_DTYPES)}")


def check(group: Mapping[str, Any]) -> None:
    """Checks the options of a group.

    Tensors on an accelerator are taken on trust: looking at them would wait for the device.

    Raises:
        ValueError: an option is out of range; names it, its value and what is allowed.
    """
    _check_rate("lr", group["lr"])
    _check_rate("weight_decay", group["weight_decay"])
    betas = plain(group["betas"])
    numbers = isinstance(betas, (tuple, list)) and all(isinstance(beta, (int, float)) for beta in betas)
    if not numbers or len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas={betas!r} is not allowed: use two numbers in [0, 1)")
    _check_choice("weight_bits", group["weight_bits"], WEIGHT_BITS)
    _check_choice("nonfinite", group["nonfinite"], NONFINITE)
    _check_choice("fused", group["fused"], (None, True, False))
    _check_choice("cautious", group["cautious"], (True, False))
    _check_choice("maximize", group["maximize"], (True, False))
    momentum_dtype(group["momentum_dtype"])
    seed = plain(group["seed"])
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed!r} is not allowed: use a whole number from 0 to 2**64 - 1")
    step = plain(group.get("step", 0))
    if isinstance(step, Tensor) and step.numel() == 1:
        step = step.item() if step.device.type == "cpu" else 0
    if not isinstance(step, (int, float)) or not 0 <= step < 2**63 or step != int(step):
        raise ValueError(f"step={step!r} is not allowed: use a whole number from 0 to 2**63 - 1")


def check_names(group: Mapping[str, Any]) -> None:
    """Refuses a key of a parameter group that is an option misspelt; other keys are the caller's own.

    Raises:
        ValueError: names the key and the option it resembles.
    """
    for key in group:
        likeness = difflib.get_close_matches(key, OPTIONS, n=1, cutoff=0.8)
        if likeness and key not in OPTIONS:
            raise ValueError(f"parameter group option {key!r} is unknown: did you mean {likeness[0]!r}?")


def check_param(param: Tensor) -> None:
    """Refuses parameters that cannot be updated. Frozen ones may be of any kind; a lazy one has no elements yet.

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
    if any(size > 1 and stride == 0 for size, stride in zip(param.shape, param.stride(), strict=True)):
        raise ValueError(
            f"params contain an expanded tensor (shape {tuple(param.shape)}, strides {param.stride()}), whose elements "
            "share memory, which is not allowed: use a clone of it"
        )


def check_grad(grad: Tensor, param: Tensor) -> None:
    """Refuses gradients, and parameters that have one, which no engine can read.

    Args:
        grad: of the parameter.
        param: to be updated.

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
    if grad.shape != param.shape or grad.device != param.device:
        found, allowed = (f"{tuple(tensor.shape)} on {tensor.device}" for tensor in (grad, param))
        raise ValueError(f"gradient of shape {found} is not allowed: use {allowed}")


def plain(value: Any) -> Any:
    """A number of numpy as one of Python, also within a tuple; anything else as it is."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(plain, value))
    if type(value).__module__ == "numpy" and getattr(value, "size", 0) == 1:
        return value.item()
    return value


def _check_rate(name: str, value: object) -> None:
    value = plain(value)
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} is a tensor of shape {tuple(value.shape)}, not allowed: use one element")
        if value.device.type != "cpu":
            return
        value = value.item()
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0.0 <= value < math.inf:
        raise ValueError(f"{name}={value!r} is not allowed: use a finite number, 0 or above")


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    value = plain(value)
    if not any(value == choice and type(value) is type(choice) for choice in allowed):
        raise ValueError(f"{name}={value!r} is not allowed: use one of {', '.join(map(repr, allowed))}")
