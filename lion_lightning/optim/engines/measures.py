"""What is asked about gradients on a CPU before a step, by measures.c: one call where torch takes a dozen."""

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from lion_lightning.optim.engines import library
from lion_lightning.optim.engines.cpu import TYPES

MEASURES = ("flips", "signs", "projection", "update_squares", "grad_squares", "dead")
"""What a `Probe` sums up, in the order of measures.c."""
_KNOWN_TYPES = (torch.float32, torch.bfloat16)


class _Stretch(ctypes.Structure):
    """Stretch in measures.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("grad", "exp_avg", "signs")),
        *((name, ctypes.c_int64) for name in ("count", "grad_type", "exp_avg_type")),
        *((name, ctypes.c_double) for name in ("beta1", "rest1", "direction")),
    )


def fits(tensor: Tensor) -> bool:
    """Whether measures.c can read it: contiguous float32 or bfloat16 in the host's memory, and there is a library."""
    return tensor.dtype in _KNOWN_TYPES and tensor.is_cpu and tensor.is_contiguous() and library.load() is not None


def square_sum(tensors: Sequence[Tensor], sizes: "array[int]") -> float | None:
    """Sum of squares over all elements of float32 tensors; None where one is of another type or does not fit.

    Args:
        sizes: their numbers of elements, of type "q".
    """
    if library.load() is None or not all(
        tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous() for tensor in tensors
    ):
        return None
    addresses = array("q", [tensor.data_ptr() for tensor in tensors])
    return float(_library().lion_square_sum(addresses.buffer_info()[0], sizes.buffer_info()[0], len(tensors)))


class Probe:
    """Stretches of parameters on which the coming update is worked out before it is made.

    Args:
        stretches: first element and the one after the last of each.
    """

    def __init__(self, stretches: Sequence[tuple[int, int]]) -> None:
        self._starts = [start for start, _ in stretches]
        self._table = (_Stretch * len(stretches))()
        for row, (start, stop) in zip(self._table, stretches, strict=True):
            row.count = stop - start

    def aim(self, index: int, grad: Tensor | None, exp_avg: Tensor | None, beta1: float, direction: float) -> None:
        """Tells where one stretch's parameter has its gradient and momentum now.

        Args:
            grad, exp_avg: tensors of one layout that `fits`; None where there is none: it has no sign.
            beta1: weight of the momentum in the update.
            direction: -1 where the optimizer maximizes, else 1.
        """
        row = self._table[index]
        if grad is None or exp_avg is None:
            row.grad = None
            return
        start = self._starts[index]
        row.grad = grad.data_ptr() + start * grad.element_size()
        row.exp_avg = exp_avg.data_ptr() + start * exp_avg.element_size()
        row.grad_type, row.exp_avg_type = TYPES[grad.dtype], TYPES[exp_avg.dtype]
        row.beta1, row.rest1, row.direction = beta1, 1 - beta1, direction

    def measure(self, signs: Tensor) -> dict[str, float]:
        """Sums over all stretches, by the names of `MEASURES`.

        Args:
            signs: float32 (coordinates,); those of the update before, and afterwards those of the coming one.
        """
        place = signs.data_ptr()
        for row in self._table:
            row.signs = place
            place += row.count * signs.element_size()
        sums = (ctypes.c_double * len(MEASURES))()
        _library().lion_measure(self._table, len(self._table), sums)
        return dict(zip(MEASURES, sums, strict=True))


def _library() -> ctypes.CDLL:
    compiled = library.load()
    assert compiled is not None, "fits() was not asked"
    return compiled
