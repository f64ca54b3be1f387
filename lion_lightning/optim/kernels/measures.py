"""What is asked about gradients on a CPU before a step, by measures.c: one call where torch takes a dozen."""

import ctypes
import struct
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from lion_lightning.optim.kernels import library
from lion_lightning.optim.kernels.cpu import TYPES, Tasks

MEASURES = ("flips", "signs", "projection", "update_squares", "grad_squares", "dead")
"""What a `Probe` sums up, in the order of measures.c."""
NOTHING = (0.0,) * len(MEASURES)
"""What they are where there is nothing to measure."""
_TYPES = {kind: TYPES[kind] for kind in (torch.float32, torch.bfloat16)}


_STRETCH = struct.Struct("5q3d")  # Stretch in measures.c, field for field


def square_sum(tensors: Sequence[Tensor]) -> float | None:
    """Sum of squares over all elements of float32 tensors; None where one is of another type or does not fit."""
    compiled = library.load()
    fitting = [t.data_ptr() for t in tensors if t.dtype is torch.float32 and t.is_cpu and t.is_contiguous()]
    if compiled is None or len(fitting) < len(tensors):
        return None
    addresses, sizes = array("q", fitting), array("q", [tensor.numel() for tensor in tensors])
    return float(compiled.lion_square_sum(addresses.buffer_info()[0], sizes.buffer_info()[0], len(tensors)))


class Probe:
    """Stretches of parameters on which the coming update is worked out before it is made.

    Args:
        stretches: first element and the one after the last of each.
    """

    def __init__(self, stretches: Sequence[tuple[int, int]]) -> None:
        self._stretches = list(stretches)
        self._table = bytearray(_STRETCH.size * len(stretches))
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._table))

    def aim(self, index: int, grad: Tensor, exp_avg: Tensor, beta1: float, direction: float) -> bool:
        """Tells where one stretch's parameter has its gradient and momentum now.

        Args:
            grad, exp_avg: of one layout.
            beta1: weight of the momentum in the update.
            direction: -1 where the optimizer maximizes, else 1.

        Returns:
            Whether measures.c can read them: contiguous float32 or bfloat16 in the host's memory.
        """
        start, stop = self._stretches[index]
        grad_type, exp_avg_type = _TYPES.get(grad.dtype), _TYPES.get(exp_avg.dtype)
        if grad_type is None or exp_avg_type is None or not _is_plain(grad) or not _is_plain(exp_avg):
            return False
        grad_at = grad.data_ptr() + start * grad.element_size()
        exp_avg_at = exp_avg.data_ptr() + start * exp_avg.element_size()
        numbers = grad_at, exp_avg_at, stop - start, grad_type, exp_avg_type, beta1, 1 - beta1, direction
        _STRETCH.pack_into(self._table, index * _STRETCH.size, *numbers)
        return True

    def skip(self, index: int) -> None:
        """There is no gradient or momentum: no coordinate of the stretch has a sign."""
        start, stop = self._stretches[index]
        _STRETCH.pack_into(self._table, index * _STRETCH.size, 0, 0, stop - start, 0, 0, 0.0, 0.0, 0.0)

    def measure(self, signs: Tensor) -> Sequence[float]:
        """Sums over all stretches, in the order of `MEASURES`.

        Args:
            signs: float32 (coordinates,); those of the update before, and afterwards those of the coming one.
        """
        sums = array("d", NOTHING)
        sums_at, _ = sums.buffer_info()
        _library().lion_measure(self._address, len(self._stretches), signs.data_ptr(), sums_at)
        return sums


class Survey:
    """The same and the sum of squares of all gradients, read off the tasks of a step: nothing is looked up twice.

    Args:
        places: of each stretch the number of its task, its first element and the one after its last.
    """

    def __init__(self, places: Sequence[tuple[int, int, int]]) -> None:
        self._places = array("q", [number for task, start, stop in places for number in (task, start, stop - start)])
        self._count = len(places)
        self._places_at, _ = self._places.buffer_info()
        self._sums = array("d", (0.0, *NOTHING))
        self._sums_at, _ = self._sums.buffer_info()

    def measure(self, tasks: Tasks, signs: Tensor) -> Sequence[float] | None:
        """The sum of squares, then the sums in the order of `MEASURES`; good until the next call.

        Args:
            tasks: not yet done.
            signs: as `Probe.measure` takes them.

        Returns:
            None where cpu.c cannot tell: gradients that are not float32, momentum that is neither float32 nor bfloat16,
            more elements (2^20) than one thread should read, or a place that its task does not have.
        """
        arguments = tasks.table, len(tasks.updates), self._places_at, self._count, signs.data_ptr(), self._sums_at
        return self._sums if _library().lion_survey(*arguments) else None


def _library() -> ctypes.CDLL:
    compiled = library.load()
    assert compiled is not None, "fits() was not asked"
    return compiled


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.is_contiguous()
