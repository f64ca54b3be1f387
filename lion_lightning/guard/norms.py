"""Sum of squares of many gradients, fast where they are small and many: then looking them up takes the time."""

import torch
from torch import Tensor

from lion_lightning.optim.kernels import measures

Grads = dict[int, Tensor]
"""Gradients by the number of their parameter; by the parameter itself takes longer, as tensors hash in Python."""
SMALL_ELEMENTS = 32_768


class SquareSum:
    """Sum of squares of many tensors, a number or of shape (). Small ones are done together: one call for all."""

    def __init__(self) -> None:
        self._known: list[int] = []
        self._small: list[int] = []
        self._large: list[int] = []

    def __call__(self, grads_of: Grads) -> Tensor | float:
        grads = list(grads_of.values())
        if (numbers := list(grads_of)) != self._known:
            self._sort(grads)
            self._known = numbers
        parts: list[Tensor | float] = []
        if self._large:
            parts += [norm.float().square() for norm in torch._foreach_norm([grads[i] for i in self._large], 2.0)]
        if self._small:
            parts.append(self._of_small([grads[i] for i in self._small]))
        if len(parts) < 2:
            return parts[0] if parts else 0.0
        return torch.stack([torch.as_tensor(part, dtype=torch.float32, device=grads[0].device) for part in parts]).sum()

    def _sort(self, grads: list[Tensor]) -> None:
        fits = [grad.numel() < SMALL_ELEMENTS and grad.dtype == torch.float32 for grad in grads]
        one_device = len({grad.device for grad in grads}) == 1
        self._small = [i for i, small in enumerate(fits) if small and one_device]
        self._large = [i for i, small in enumerate(fits) if not (small and one_device)]

    def _of_small(self, grads: list[Tensor]) -> Tensor | float:
        squares = measures.square_sum(grads)
        if squares is not None:
            return squares
        together = torch._utils._flatten_dense_tensors(grads)
        return together.dot(together)
