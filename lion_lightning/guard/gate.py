"""The gate: decides on the device, from gradient norm and loss, whether a step is taken, clipped or skipped.

Lion moves every weight by lr whatever the gradient's size, so a constant factor means nothing to it. One outlier means
much: it fills the momentum and sets the direction for hundreds of steps. So the norm is compared with its own history,
not with a fixed limit; and a batch whose loss is far out of line teaches something wrong, whatever its norm.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lion_lightning.guard.thresholds import Thresholds

DEVIATIONS_PER_MAD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
LEAST_LOG_NORM_DEVIATION, LEAST_LOSS_DEVIATION_SHARE = 1e-3, 1e-2
"""So that a history without variation does not divide by zero; of the loss, as a share of its median."""


class History:
    """The values of the last `size` steps that were accepted, in a tensor of shape (size,) on the device."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.forget()

    def forget(self) -> None:
        """Starts a new one."""
        self._values = torch.full((self.size,), torch.inf)
        self._count = torch.zeros((), dtype=torch.int64)
        self._places = torch.arange(self.size)

    def to(self, device: torch.device) -> None:
        if self._values.device != device:
            self._values, self._count = self._values.to(device), self._count.to(device)
            self._places = self._places.to(device)

    @property
    def count(self) -> Tensor:
        """Values accepted so far, shape ()."""
        return self._count

    def spread(self) -> tuple[Tensor, Tensor]:
        """Median, and standard deviation estimated from the median absolute deviation; infinite while empty."""
        filled = self._count.clamp(max=self.size)
        center = _median(self._values, filled)
        return center, DEVIATIONS_PER_MAD * _median((self._values - center).abs(), filled)

    def add(self, value: Tensor, accepted: Tensor) -> None:
        """Remembers a value where `accepted`."""
        here = accepted & (self._places == self._count % self.size)
        self._values = torch.where(here, value, self._values)
        self._count = self._count + accepted

    def state_dict(self) -> dict[str, Any]:
        return {"values": self._values.tolist(), "count": int(self._count)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        values = torch.tensor(state["values"], dtype=torch.float32)
        if len(values) != self.size:
            raise ValueError(f"thresholds.window={self.size} does not fit the checkpoint's {len(values)}")
        self._values, self._count, self._places = values, torch.tensor(state["count"]), torch.arange(self.size)


@dataclass(frozen=True)
class Verdict:
    """What to do with a step; float32 tensors of shape ().

    Attributes:
        factor: divide the gradients by it; 1 for a step that is taken as it is.
        skip: 1 for a step that must not change anything, else 0.
        norm_z, loss_z: robust z of log norm and loss; NaN until the gate is armed.
    """

    factor: Tensor
    skip: Tensor
    norm_z: Tensor
    loss_z: Tensor


class OutlierGate:
    """Robust z of the log norm, and of the loss, over the steps that were accepted. Nothing is read on the host.

    Args:
        thresholds: `window`, `armed_after`, `outlier_z`, `outlier_ratio`, `loss_z`.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self._norms, self._losses = History(thresholds.window), History(thresholds.window)

    def forget(self) -> None:
        """The next `armed_after` steps are taken as they come."""
        self._norms.forget()
        self._losses.forget()

    def judge(self, norm: Tensor, loss: Tensor) -> Verdict:
        """Judges one step, and remembers it if it is accepted.

        Args:
            norm: gradient norm, shape ().
            loss: of the same step, shape (); NaN where it is not known.
        """
        self._norms.to(norm.device)
        self._losses.to(norm.device)
        finite = norm.isfinite()
        loss_z = self._loss_z(loss)
        bad_loss = loss_z > self.thresholds.loss_z
        log_norm = norm.float().log()
        center, deviation = self._norms.spread()
        armed = self._norms.count >= self.thresholds.armed_after
        norm_z = (log_norm - center) / deviation.clamp(min=LEAST_LOG_NORM_DEVIATION)
        above = log_norm - center - math.log(self.thresholds.outlier_ratio)
        outlier = finite & armed & (norm_z > self.thresholds.outlier_z) & (above > 0)
        # A gradient of zeros says nothing about size.
        accepted = finite & ~outlier & ~bad_loss
        self._norms.add(log_norm, accepted & (norm > 0))
        self._losses.add(loss, accepted & loss.isfinite())
        return Verdict(
            factor=torch.where(outlier, above.exp(), 1.0),
            skip=(~finite | bad_loss).float(),
            norm_z=torch.where(armed, norm_z, torch.nan),
            loss_z=loss_z,
        )

    def _loss_z(self, loss: Tensor) -> Tensor:
        center, deviation = self._losses.spread()
        z = (loss - center) / deviation.maximum(LEAST_LOSS_DEVIATION_SHARE * center.abs())
        return torch.where(self._losses.count >= self.thresholds.armed_after, z, torch.nan)

    def state_dict(self) -> dict[str, Any]:
        return {"norms": self._norms.state_dict(), "losses": self._losses.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._norms.load_state_dict(state["norms"])
        self._losses.load_state_dict(state["losses"])


def _median(values: Tensor, count: Tensor) -> Tensor:
    """The lower median of the `count` smallest of `values`, where empty places hold infinity (or NaN after a sum)."""
    ordered = values.nan_to_num(nan=torch.inf).sort().values
    place = ((count - 1) // 2).clamp(min=0)
    return ordered.gather(0, place.view(1)).squeeze(0)
