"""Linear warm-up around `optimizer.step`, for any torch optimizer, unseen by any scheduler.

A scheduler reads and writes `group["lr"]`: LambdaLR and OneCycleLR overwrite what somebody else put there, others keep
it for ever. So the factor is put on right before the step and taken off right after it.
"""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

REWARM_START = 0.1
LEAST_REWARM_STEPS = 10


class LinearWarmup:
    """Multiplies every group's learning rate by `min(1, (step + 1) / warmup_steps)` while the optimizer steps.

    Args:
        warmup_steps: number of optimizer steps below the full rate; 0 for none.

    Attributes:
        step: optimizer steps so far.
        scale: a factor for good; 1 until `rewarm` lowers it.
    """

    def __init__(self, warmup_steps: int) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps}")
        self.warmup_steps = warmup_steps
        self.step = 0
        self.scale = 1.0
        self._rewarmed_at: int | None = None

    @property
    def factor(self) -> float:
        """The factor of the coming step, in (0, 1]."""
        warm = 1.0 if self.step >= self.warmup_steps else (self.step + 1) / self.warmup_steps
        return warm * self._rewarm_factor() * self.scale

    def rewarm(self, scale: float = 1.0) -> None:
        """Starts again at a tenth of the rate, for a run that was put back; `scale` lowers the rate for good."""
        self._rewarmed_at = self.step
        self.scale *= scale

    def _rewarm_factor(self) -> float:
        if self._rewarmed_at is None:
            return 1.0
        share = (self.step - self._rewarmed_at) / max(LEAST_REWARM_STEPS, self.warmup_steps)
        return min(1.0, REWARM_START + (1 - REWARM_START) * share)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "warmup_steps": self.warmup_steps,
            "scale": self.scale,
            "rewarmed_at": self._rewarmed_at,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.warmup_steps = state["step"], state["warmup_steps"]
        self.scale, self._rewarmed_at = state["scale"], state["rewarmed_at"]


class WarmupHook:
    """Ties a warm-up to one optimizer by its step hooks.

    An exception between the hooks leaves the scaled rates in the groups; the next step puts the true ones back before
    it scales them again, and so does `remove`.
    """

    def __init__(self, optimizer: Optimizer, warmup: LinearWarmup) -> None:
        self.optimizer, self.warmup = optimizer, warmup
        self.applied: list[float | Tensor] = []
        self._true_rates: list[float | Tensor] = []
        self._handles: list[Any] = []
        self.attach()

    def attach(self) -> None:
        """Puts the hooks on the optimizer, again after a `remove`."""
        self._handles = [
            self.optimizer.register_step_pre_hook(self._scale),
            self.optimizer.register_step_post_hook(self._finish),
        ]

    def remove(self) -> None:
        """Take the hooks off the optimizer and leave its learning rates as the schedule set them."""
        self._restore()
        for handle in self._handles:
            handle.remove()

    def _scale(self, optimizer: Optimizer, *_: Any) -> None:
        self._restore()
        factor, groups = self.warmup.factor, optimizer.param_groups
        if factor != 1:
            self._true_rates = [_copy(group["lr"]) for group in groups]
            for group in groups:
                _assign(group, group["lr"] * factor)
        self.applied = [_copy(group["lr"]) for group in groups]

    def _finish(self, *_: Any) -> None:
        self._restore()
        self.warmup.step += 1

    def _restore(self) -> None:
        if self._true_rates:
            for group, rate in zip(self.optimizer.param_groups, self._true_rates, strict=False):
                _assign(group, rate)
            self._true_rates = []


def _copy(rate: float | Tensor) -> float | Tensor:
    return rate.clone() if isinstance(rate, Tensor) else rate


def _assign(group: dict[str, Any], rate: float | Tensor) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)  # in place: a compiled or captured step holds on to the tensor itself
    else:
        group["lr"] = rate
