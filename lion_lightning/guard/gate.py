"""The gate: decides, from gradient norm and loss, whether a step is taken, clipped or skipped.

Lion moves every weight by lr whatever the gradient's size, so a constant factor changes nothing. One outlier changes
much: it fills the momentum and sets the direction for hundreds of steps. So the norm is compared with its own history,
not with a fixed limit. What recurs is data, not a fault: rare classes and heavy tails have outliers too. The gate acts
on an outlier only if it is isolated, and every finite value enters the history, whatever was done about it. Everything
is computed with tensors on the device of the gradients, without synchronising.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lion_lightning.guard.rules import Thresholds

DEVIATIONS_PER_MAD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
LEAST_LOG_NORM_DEVIATION, LEAST_LOSS_DEVIATION_SHARE = 1e-3, 1e-2
"""Lower limits of the deviations, so that a history without variation does not divide by zero; of the loss as a share
of its median."""


KEPT_OUTLIERS = 16
SAME_KIND_RATIO = 3.0
"""An earlier outlier at least a third as far out is of the same kind."""
REMEMBERED_AFTER = 8
"""Steps after which outliers are remembered, though nothing is done about them before the gate is armed."""


def clip_norm(value: float | None, algorithm: str | None) -> float | None:
    """The norm that the Trainer clips gradients to, from its arguments; None where it clips none, or by value."""
    return float(value) if value and algorithm in (None, "norm") else None


class History:
    """The values of the last `size` finite steps, of several kinds side by side: a (kinds, size) tensor.

    Args:
        kinds: number of rows.
        size: values kept of each kind.
    """

    def __init__(self, kinds: int, size: int) -> None:
        self.kinds, self.size = kinds, size
        self._values = torch.full((kinds, size), torch.inf, dtype=torch.float32, device="cpu")
        self.count = torch.zeros(kinds, dtype=torch.int64, device="cpu")
        """Values stored so far, shape (kinds,)."""

    def to(self, device: torch.device) -> None:
        self._values, self.count = self._values.to(device), self.count.to(device)

    def spread(self) -> tuple[Tensor, Tensor]:
        """Median, and standard deviation from the median absolute deviation, (kinds,); infinite while empty."""
        middle = ((self.count.clamp(1, self.size) - 1) // 2).unsqueeze(1)
        center = self._values.sort(1).values.gather(1, middle)
        # Empty places hold infinity and stay last.
        deviation = (self._values - center).abs().sort(1).values.gather(1, middle)
        return center.squeeze(1), DEVIATIONS_PER_MAD * deviation.squeeze(1)

    def add(self, values: Tensor, accepted: Tensor) -> None:
        """Stores those of the values, (kinds,), that are `accepted`, bool of shape (kinds,)."""
        places = torch.arange(self.size, device=values.device)
        here = (places == (self.count % self.size).unsqueeze(1)) & accepted.unsqueeze(1)
        self._values = torch.where(here, values.unsqueeze(1), self._values)
        self.count = self.count + accepted

    def state_dict(self) -> list[dict[str, Any]]:
        rows = zip(self._values.tolist(), self.count.tolist(), strict=True)
        return [{"values": values, "count": count} for values, count in rows]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        values = torch.tensor([row["values"] for row in state], dtype=torch.float32, device="cpu")
        if values.shape != (self.kinds, self.size):
            raise ValueError(f"thresholds.window={self.size} does not fit the checkpoint's {values.shape[-1]}")
        self._values = values
        self.count = torch.tensor([row["count"] for row in state], dtype=torch.int64, device="cpu")


@dataclass(slots=True)
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


class Gate:
    """Robust z of the log norm, and of the loss, over the latest steps; acts on isolated outliers.

    Args:
        thresholds: `window`, `armed_after`, `outlier_z`, `outlier_ratio`, `loss_z`, `horizon`.
        skips_bad_losses: whether a step with an isolated outlier of the loss is skipped.
        disabled: rules of `rules.RULES` that do not act: "nonfinite" and "outlier" are the gate's.
    """

    def __init__(
        self, thresholds: Thresholds, skips_bad_losses: bool = False, disabled: Collection[str] = frozenset()
    ) -> None:
        self.thresholds, self.skips_bad_losses = thresholds, skips_bad_losses
        self.clips_outliers, self.skips_nonfinite = "outlier" not in disabled, "nonfinite" not in disabled
        self.forget()
        single = partial(torch.tensor, dtype=torch.float32, device="cpu")  # whatever torch.set_default_dtype says
        self._limits = single([thresholds.outlier_z, thresholds.loss_z])
        self._least = single([LEAST_LOG_NORM_DEVIATION, 0.0])
        self._least_share = single([0.0, LEAST_LOSS_DEVIATION_SHARE])

    def forget(self) -> None:
        """Starts a new history."""
        self._outliers = torch.full((2, KEPT_OUTLIERS), -torch.inf, dtype=torch.float32, device="cpu")
        self._outlier_steps = torch.full((2, KEPT_OUTLIERS), -(10**9), device="cpu")
        self._step = 0
        self._history = History(2, self.thresholds.window)

    def judge(self, norm: Tensor, loss: Tensor) -> Verdict:
        """Judges one step and stores its values.

        Args:
            norm: gradient norm, floating, shape ().
            loss: of the same step, floating, shape (); NaN where it is not known.
        """
        self._to(norm.device)
        finite, values = norm.isfinite(), torch.stack([norm.log(), loss.to(norm.dtype)]).float()
        center, deviation = self._history.spread()
        scale = deviation.maximum(center.abs() * self._least_share + self._least)
        z = torch.where(scale > 0, (values - center) / scale, torch.nan)  # losses that are mostly 0 have no scale
        is_armed = self._history.count >= self.thresholds.armed_after
        above = values[0] - center[0] - math.log(self.thresholds.outlier_ratio)
        far = (z > self._limits) & values.isfinite() & (self._history.count >= REMEMBERED_AFTER)
        far = far & torch.stack([above > 0, finite])
        outlier, bad_loss = (far & is_armed & self._isolated(values, center)).unbind()
        z = torch.where(is_armed, z, torch.nan)
        skip = bad_loss & self.skips_bad_losses | ~finite & self.skips_nonfinite
        self._remember(values, far)
        # The logarithm of a gradient of zeros is not finite, and has no information about the usual size.
        self._history.add(values, values.isfinite() & finite)
        factor = torch.where(outlier & self.clips_outliers, above.exp(), 1.0)
        return Verdict(factor.float(), skip.float(), norm_z=z[0], loss_z=z[1])

    def _isolated(self, values: Tensor, center: Tensor) -> Tensor:
        """Whether no outlier of the same kind came within `thresholds.horizon` steps before, bool of shape (2,)."""
        same_norm = values[0] - math.log(SAME_KIND_RATIO)
        same_loss = center[1] + (values[1] - center[1]) / SAME_KIND_RATIO
        similar = self._outliers >= torch.stack([same_norm, same_loss]).unsqueeze(1)
        recent = self._step - self._outlier_steps <= self.thresholds.horizon
        return ~(similar & recent).any(1)

    def _remember(self, values: Tensor, far: Tensor) -> None:
        """Stores outliers, (2,), whether they are acted on or not; the oldest are dropped."""
        shifted = torch.cat([values.unsqueeze(1), self._outliers[:, :-1]], 1)
        steps = torch.cat([torch.full_like(self._outlier_steps[:, :1], self._step), self._outlier_steps[:, :-1]], 1)
        self._outliers = torch.where(far.unsqueeze(1), shifted, self._outliers)
        self._outlier_steps = torch.where(far.unsqueeze(1), steps, self._outlier_steps)
        self._step += 1

    def _to(self, device: torch.device) -> None:
        self._history.to(device)
        if self._outliers.device != device:
            self._limits, self._least = self._limits.to(device), self._least.to(device)
            self._least_share = self._least_share.to(device)
            self._outliers, self._outlier_steps = self._outliers.to(device), self._outlier_steps.to(device)

    def state_dict(self) -> dict[str, Any]:
        histories = dict(zip(("norms", "losses"), self._history.state_dict(), strict=True))
        outliers = {"values": self._outliers.tolist(), "steps": self._outlier_steps.tolist(), "step": self._step}
        return {**histories, "outliers": outliers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._history.load_state_dict([state["norms"], state["losses"]])
        device, outliers = self._limits.device, state["outliers"]
        shape = (2, KEPT_OUTLIERS)
        self._outliers = torch.tensor(outliers["values"], dtype=torch.float32, device=device).reshape(shape)
        self._outlier_steps = torch.tensor(outliers["steps"], dtype=torch.int64, device=device).reshape(shape)
        self._step = int(outliers["step"])
