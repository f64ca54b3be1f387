"""Memory that the eager engine uses again and again, as fresh memory costs more than the arithmetic, and sums in it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Scratch(NamedTuple):
    """Memory that stays in cache from one chunk to the next, in the dtype of the arithmetic, and the number one."""

    weight: Tensor
    momentum: Tensor
    grad: Tensor
    change: Tensor
    one: Tensor

    @classmethod
    def of(cls, elements: int, dtype: torch.dtype) -> "Scratch":
        weight, momentum, grad, change = (torch.empty(elements, dtype=dtype) for _ in range(4))
        return cls(weight, momentum, grad, change, torch.ones((), dtype=dtype))


def add_product(total: Tensor, values: Tensor, factor: float, one: Tensor) -> None:
    """Adds values * factor in one pass, the product rounded before it is added.

    torch multiplies by the factor first, and what it may fuse with the addition is the product with `one`, which is
    exact. An addition with alpha it fuses; so it would the product of a number with a tensor in place of `one`.
    """
    total.addcmul_(values, one, value=factor)


def is_moderate(left: Tensor, right: Tensor) -> bool:
    """Whether no number is a NaN or infinite and no product of two overflows: squares do far below bf16's largest."""
    return math.isfinite(torch.dot(left, right).item())
