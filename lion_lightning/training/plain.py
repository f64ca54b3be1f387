"""Checkpoints of plain types: tensors, numbers, strings and containers of them, so that loading one can run no code."""

from collections import OrderedDict
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

HYPER_PARAMETERS = "hyper_parameters"  # Lightning's key for what a module was made from: for people to read
COMPILED_PREFIX = "_orig_mod."
_AS_IT_IS = (str, bytes, bool, int, float, complex, type(None), torch.dtype, torch.device, torch.Size)


def plain(value: Any, name: str = "checkpoint") -> Any:
    """`value` in types that `torch.load(weights_only=True)` reads back.

    Paths become strings, numpy scalars numbers, numpy arrays tensors, OmegaConf nodes dicts and lists, subclasses of
    tensor plain tensors. What else a module keeps in its hyperparameters becomes its `repr`.

    Raises:
        TypeError: something else; the message says where it is.
    """
    if isinstance(value, torch.Tensor):
        return value.detach() if type(value) in (torch.Tensor, torch.nn.Parameter) else _plain_tensor(value, name)
    if isinstance(value, Enum):
        return plain(value.value, name)
    if type(value) in _AS_IT_IS:
        return value
    if isinstance(value, DictConfig | ListConfig):
        return plain(OmegaConf.to_container(value, resolve=True), name)
    if isinstance(value, Mapping):
        return _plain_mapping(value, name)
    if isinstance(value, list | tuple | set | frozenset):
        items = [plain(item, f"{name}[{index}]") for index, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items if isinstance(value, list) else set(items)
    return _plain_scalar(value, name)


def _plain_mapping(value: Mapping[Any, Any], name: str) -> dict[Any, Any]:
    pairs = {plain(key, f"{name}'s key"): plain(item, f"{name}[{key!r}]") for key, item in value.items()}
    if not isinstance(value, OrderedDict):
        return pairs
    ordered = OrderedDict(pairs)
    ordered.__dict__.update(plain(value.__dict__, f"{name}.__dict__"))  # a state dict's versions
    return ordered


def _plain_scalar(value: Any, name: str) -> Any:
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if f"[{HYPER_PARAMETERS!r}]" in name:
        return repr(value)
    raise TypeError(f"{name} is a {type(value).__module__}.{type(value).__qualname__}, which no checkpoint can keep")


def _plain_tensor(value: torch.Tensor, name: str) -> torch.Tensor:
    if hasattr(value, "full_tensor"):
        raise TypeError(f"{name} is sharded; gather it first")
    return value.detach().as_subclass(torch.Tensor)


def without_compiled_prefix(state: Mapping[str, Any]) -> dict[str, Any]:
    """A model's state under the names it has when nothing is compiled."""
    renamed = OrderedDict((name.replace(COMPILED_PREFIX, ""), value) for name, value in state.items())
    renamed.__dict__.update(getattr(state, "__dict__", {}))
    return renamed


def with_names_of(state: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    """`state` under `names`, which may be those of a compiled model; a name that is not among them stays."""
    compiled = {name.replace(COMPILED_PREFIX, ""): name for name in names}
    renamed = OrderedDict((compiled.get(name, name), value) for name, value in state.items())
    renamed.__dict__.update(getattr(state, "__dict__", {}))
    return renamed
