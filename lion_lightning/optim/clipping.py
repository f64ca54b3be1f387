"""Refuses `clip_grad_norm_` on parameters whose gradients are released, where it would find none and clip nothing."""

import functools
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils import clip_grad


class Released(Protocol):
    params: dict[Tensor, Any]


_released: list[Released] = []
_clip_grad_norm_ = clip_grad.clip_grad_norm_


@functools.wraps(_clip_grad_norm_)
def _refusing(parameters: Tensor | Iterable[Tensor], *args: Any, **kwargs: Any) -> Tensor:
    listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if any(param in release.params for release in _released for param in listed):
        raise RuntimeError(
            "clip_grad_norm_ is not allowed with release_gradients: the norm over all gradients is unknown when the "
            "first parameter steps; use clip_value, or no clipping (Lion's step is bounded by lr), or remove() it"
        )
    return _clip_grad_norm_(listed, *args, **kwargs)


def forbid_norm(release: Released) -> None:
    """Makes `torch.nn.utils.clip_grad_norm_` raise for the parameters of a release; others are clipped as ever."""
    _released.append(release)
    _put(_refusing)


def allow_norm(release: Released) -> None:
    """Takes the ban back; with the last one goes the wrapper around torch's function."""
    _released.remove(release)
    if not _released:
        _put(_clip_grad_norm_)


def _put(function: Any) -> None:
    for module in (clip_grad, torch.nn.utils):  # where trainers look it up
        vars(module)["clip_grad_norm_"] = function
