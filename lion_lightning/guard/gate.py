"""The gate: decides on the device, from the gradient norm alone, whether a step is taken, clipped or skipped.

Lion moves every weight by lr whatever the gradient's size, so a constant factor means nothing to it. One outlier means
much: it fills the momentum and sets the direction for hundreds of steps. So the norm is compared with its own history,
not with a fixed limit.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lion_lightning.guard.thresholds import Thresholds

DEVIATIONS_PER_MAD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
LEAST_DEVIATION = 1e-3
"""Of the log norm, so that a history without any variation does not divide by zero."""


class OutlierGate:
    """Robust z of the log norm over the norms of the last steps that were accepted.

    All state lives in tensors of shape (window,) and () on the device of the norms, and nothing is read on the host.

    Args:
        thresholds: `window`, `armed_after`, `outlier_z`, `outlier_ratio`.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self.forget()

    def forget(self) -> None:
        """Starts a new history: the next `armed_after` steps are taken as they come."""
        self._logs = torch.full((self.thresholds.window,), torch.inf)
        self._count = torch.zeros((), dtype=torch.int64)
        self._places = torch.arange(self.thresholds.window)

    def judge(self, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Judges one step and remembers its norm if the step is accepted.

        Args:
            norm: gradient norm, shape ().

        Returns:
            The factor to divide gradients by (1 for a step taken as it is), 1 for a step to skip and else 0, and the
            robust z (NaN until the gate is armed); all float32 of shape ().
        """
        self._move(norm.device)
        limits, log_norm = self.thresholds, norm.float().log()
        finite = norm.isfinite()
        filled = self._count.clamp(max=limits.window)
        center = _median(self._logs, filled)
        deviation = DEVIATIONS_PER_MAD * _median((self._logs - center).abs(), filled)
        z = (log_norm - center) / deviation.clamp(min=LEAST_DEVIATION)
        above = log_norm - center - math.log(limits.outlier_ratio)
        outlier = finite & (self._count >= limits.armed_after) & (z > limits.outlier_z) & (above > 0)
        factor = torch.where(outlier, above.exp(), 1.0)
        # A gradient of zeros says nothing about size.
        accepted = finite & ~outlier & (norm > 0)
        here = accepted & (self._places == self._count % limits.window)
        self._logs = torch.where(here, log_norm, self._logs)
        self._count = self._count + accepted
        return factor, (~finite).float(), torch.where(filled >= limits.armed_after, z, torch.nan)

    def _move(self, device: torch.device) -> None:
        if self._logs.device != device:
            self._logs, self._count = self._logs.to(device), self._count.to(device)
            self._places = self._places.to(device)

    def state_dict(self) -> dict[str, Any]:
        return {"logs": self._logs.tolist(), "count": int(self._count)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        logs = torch.tensor(state["logs"], dtype=torch.float32)
        if logs.shape != self._logs.shape:
            raise ValueError(f"thresholds.window={len(self._logs)} does not fit the checkpoint's {len(logs)}")
        self._logs, self._count = logs, torch.tensor(state["count"])
        self._places = torch.arange(len(logs))


def _median(values: Tensor, count: Tensor) -> Tensor:
    """The lower median of the `count` smallest of `values`, where empty places hold infinity (or NaN after a sum)."""
    ordered = values.nan_to_num(nan=torch.inf).sort().values
    place = ((count - 1) // 2).clamp(min=0)
    return ordered.gather(0, place.view(1)).squeeze(0)
