"""The gate: decides, from gradient norm and loss, whether a step is taken, clipped or skipped.

Lion moves every weight by lr whatever the gradient's size, so a constant factor means nothing to it. One outlier means
much: it fills the momentum and sets the direction for hundreds of steps. So the norm is compared with its own history,
not with a fixed limit; and a batch whose loss is far out of line teaches something wrong, whatever its norm.

There are two of it, the same rule: `DeviceGate` on tensors, which nobody waits for, and `HostGate` on numbers, where
the gradients are on a CPU and fifty tensor operations would cost more than the rest of the guard.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lion_lightning.guard.thresholds import Thresholds
from lion_lightning.guard.window import Window

DEVIATIONS_PER_MAD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
LEAST_LOG_NORM_DEVIATION, LEAST_LOSS_DEVIATION_SHARE = 1e-3, 1e-2
"""So that a history without variation does not divide by zero; of the loss, as a share of its median."""


class History:
    """The values of the last `size` steps that were accepted, of several kinds side by side: a (kinds, size) tensor."""

    def __init__(self, kinds: int, size: int) -> None:
        self.kinds, self.size = kinds, size
        self.forget()

    def forget(self) -> None:
        """Starts a new one."""
        self._values = torch.full((self.kinds, self.size), torch.inf)
        self.count = torch.zeros(self.kinds, dtype=torch.int64)
        """Values accepted so far, shape (kinds,)."""
        self._places = torch.arange(self.size)

    def to(self, device: torch.device) -> None:
        if self._values.device != device:
            self._values, self.count = self._values.to(device), self.count.to(device)
            self._places = self._places.to(device)

    def spread(self) -> tuple[Tensor, Tensor]:
        """Median, and standard deviation from the median absolute deviation, (kinds,); infinite while empty."""
        middle = ((self.count.clamp(1, self.size) - 1) // 2).unsqueeze(1)
        center = self._values.sort(1).values.gather(1, middle)
        # Empty places hold infinity and stay last.
        deviation = (self._values - center).abs().sort(1).values.gather(1, middle)
        return center.squeeze(1), DEVIATIONS_PER_MAD * deviation.squeeze(1)

    def add(self, values: Tensor, accepted: Tensor) -> None:
        """Remembers those of the values, (kinds,), that are `accepted`."""
        here = (self._places == (self.count % self.size).unsqueeze(1)) & accepted.unsqueeze(1)
        self._values = torch.where(here, values.unsqueeze(1), self._values)
        self.count = self.count + accepted

    def state_dict(self) -> list[dict[str, Any]]:
        rows = zip(self._values.tolist(), self.count.tolist(), strict=True)
        return [{"values": values, "count": count} for values, count in rows]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        values = torch.tensor([row["values"] for row in state], dtype=torch.float32)
        if values.shape != (self.kinds, self.size):
            raise ValueError(f"thresholds.window={self.size} does not fit the checkpoint's {values.shape[-1]}")
        self._values, self.count = values, torch.tensor([row["count"] for row in state])
        self._places = torch.arange(self.size)


@dataclass(slots=True)
class Verdict:
    """What to do with a step; float32 tensors of shape () from a `DeviceGate`, numbers from a `HostGate`.

    Attributes:
        factor: divide the gradients by it; 1 for a step that is taken as it is.
        skip: 1 for a step that must not change anything, else 0.
        norm_z, loss_z: robust z of log norm and loss; NaN until the gate is armed.
    """

    factor: Any
    skip: Any
    norm_z: Any
    loss_z: Any


class DeviceGate:
    """Robust z of the log norm, and of the loss, over the steps that were accepted. Nothing is read on the host.

    Args:
        thresholds: `window`, `armed_after`, `outlier_z`, `outlier_ratio`, `loss_z`.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self._history = History(2, thresholds.window)
        self._limits = torch.tensor([thresholds.outlier_z, thresholds.loss_z])
        self._least = torch.tensor([LEAST_LOG_NORM_DEVIATION, 0.0])
        self._least_share = torch.tensor([0.0, LEAST_LOSS_DEVIATION_SHARE])

    def forget(self) -> None:
        """The next `armed_after` steps are taken as they come."""
        self._history.forget()

    def judge(self, norm: Tensor, loss: Tensor) -> Verdict:
        """Judges one step, and remembers it if it is accepted.

        Args:
            norm: gradient norm, shape ().
            loss: of the same step, shape (); NaN where it is not known.
        """
        self._to(norm.device)
        finite, values = norm.isfinite(), torch.stack([norm.float().log(), loss])
        center, deviation = self._history.spread()
        z = (values - center) / deviation.maximum(center.abs() * self._least_share + self._least)
        z = torch.where(self._history.count >= self.thresholds.armed_after, z, torch.nan)
        above = values[0] - center[0] - math.log(self.thresholds.outlier_ratio)
        far, bad_loss = (z > self._limits).unbind()
        outlier, skip = far & finite & (above > 0), bad_loss | ~finite
        # The logarithm of a gradient of zeros is not finite, and says nothing about size.
        self._history.add(values, ~(outlier | skip) & values.isfinite())
        return Verdict(torch.where(outlier, above.exp(), 1.0), skip.float(), norm_z=z[0], loss_z=z[1])

    def _to(self, device: torch.device) -> None:
        self._history.to(device)
        if self._limits.device != device:
            self._limits, self._least = self._limits.to(device), self._least.to(device)
            self._least_share = self._least_share.to(device)

    def state_dict(self) -> dict[str, Any]:
        return dict(zip(("norms", "losses"), self._history.state_dict(), strict=True))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._history.load_state_dict([state["norms"], state["losses"]])


class HostGate:
    """`DeviceGate` on Python's numbers.

    Args:
        thresholds: `window`, `armed_after`, `outlier_z`, `outlier_ratio`, `loss_z`.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self.forget()

    def forget(self) -> None:
        """The next `armed_after` steps are taken as they come."""
        self._norms, self._losses = Window(self.thresholds.window), Window(self.thresholds.window)

    def judge(self, norm: float, loss: float) -> Verdict:
        """Judges one step, and remembers it if it is accepted; see `DeviceGate.judge`."""
        limits, finite = self.thresholds, math.isfinite(norm)
        log_norm = math.log(norm) if norm > 0 else -math.inf if norm == 0 else math.nan
        above, norm_z = self._compare(self._norms, log_norm, LEAST_LOG_NORM_DEVIATION, 0.0)
        _, loss_z = self._compare(self._losses, loss, 0.0, LEAST_LOSS_DEVIATION_SHARE)
        above -= math.log(limits.outlier_ratio)
        outlier = finite and norm_z > limits.outlier_z and above > 0
        skip = loss_z > limits.loss_z or not finite
        if not outlier and not skip:
            for history, value in ((self._norms, log_norm), (self._losses, loss)):
                if math.isfinite(value):
                    history.add(value)
        return Verdict(math.exp(above) if outlier else 1.0, float(skip), norm_z, loss_z)

    def _compare(self, history: Window, value: float, least: float, least_share: float) -> tuple[float, float]:
        """Distance from the median, and robust z: NaN until the gate is armed."""
        center, deviation = history.spread()
        deviation = max(DEVIATIONS_PER_MAD * deviation, least, least_share * abs(center))
        armed = history.count >= self.thresholds.armed_after and deviation > 0
        return value - center, (value - center) / deviation if armed else math.nan

    def state_dict(self) -> dict[str, Any]:
        return {"norms": _row(self._norms), "losses": _row(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for window, row in ((self._norms, state["norms"]), (self._losses, state["losses"])):
            if len(row["values"]) != window.size:
                raise ValueError(f"thresholds.window={window.size} does not fit the checkpoint's {len(row['values'])}")
            count, place = row["count"], row["count"] % window.size
            ring = row["values"]
            window.load(ring[:count] if count < window.size else ring[place:] + ring[:place])


def _row(window: Window) -> dict[str, Any]:
    """As `History` keeps it, so that a run may move between devices: a ring, filled up with infinity."""
    values = window.values()
    return {"values": values + [math.inf] * (window.size - len(values)), "count": len(values)}
