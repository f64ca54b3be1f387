"""Linear warm-up around `optimizer.step`, for any torch optimizer, invisible to schedulers.

A scheduler reads and writes `group["lr"]`: LambdaLR and OneCycleLR overwrite a rate that was changed from outside,
others keep it for ever. So the rate is multiplied right before the step and restored right after it. A closure runs
with the true rates: in Lightning all of `training_step` is within the optimizer's step.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lion_lightning.guard.rules import Stateful

WARMUP_SHARE, MAX_WARMUP_STEPS = 0.3, 2000
"""Of the default warm-up. The share did least harm over all learning rates in runs of 300 and 3,000
steps (docs/experiments.md#warm_up); the steps are those of Wen et al. (2025, arXiv:2509.02046) in long ones."""
UNKNOWN_LENGTH_STEPS = 200
"""The default where the length of the run is not known: Lion's momentum fills within 2 / (1 - 0.99) steps."""
REWARM_START = 0.1
LEAST_REWARM_STEPS = 10


def warmup_length(given: float | None, total_steps: float) -> int:
    """Optimizer steps of warm-up, the same for every optimizer.

    Args:
        given: a number of steps, below 1 a share of the run; None for 30 % of the run, at most 2,000 steps.
        total_steps: of the run, infinite if it is not known: 200 steps then take the place of a share.
    """
    if given is not None and not 0 < given < 1:
        return round(given)
    if not math.isfinite(total_steps):
        return UNKNOWN_LENGTH_STEPS
    return round(given * total_steps) if given else round(min(WARMUP_SHARE * total_steps, MAX_WARMUP_STEPS))


class LinearWarmup(Stateful):
    """Multiplies every group's learning rate by `min(1, (step + 1) / warmup_steps)` while the optimizer steps.

    Args:
        warmup_steps: number of optimizer steps below the full rate; 0 for none.

    Attributes:
        step: optimizer steps so far.
        scale: a lasting factor; 1 until `rewarm` lowers it.
        rewarmed_at: the step of the last `rewarm`, None before it.
    """

    STATE = ("step", "warmup_steps", "scale", "rewarmed_at")
    OPTIONAL = ("rewarmed_at",)

    def __init__(self, warmup_steps: int) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps}")
        self.warmup_steps = warmup_steps
        self.step = 0
        self.scale = 1.0
        self.rewarmed_at: int | None = None

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if not 0 < self.factor <= 1:
            raise ValueError(f"a warm-up cannot multiply the learning rate by {self.factor}")

    @property
    def factor(self) -> float:
        """The factor of the coming step, in (0, 1]."""
        warm = 1.0 if self.step >= self.warmup_steps else (self.step + 1) / self.warmup_steps
        if self.rewarmed_at is not None:
            share = (self.step - self.rewarmed_at) / max(LEAST_REWARM_STEPS, self.warmup_steps)
            warm *= min(1.0, REWARM_START + (1 - REWARM_START) * share)
        return warm * self.scale

    def rewarm(self, scale: float = 1.0) -> None:
        """Starts again at a tenth of the rate, for a run that was rewound; `scale` lowers the rate for good."""
        self.rewarmed_at = self.step
        self.scale *= scale


class WarmupHook:
    """Applies a warm-up to one optimizer by its step hooks.

    An exception between the hooks leaves the scaled rates in the groups; the next step restores the true ones before
    it scales them again, and so does `remove`. Groups without a rate, such as those of Adafactor, are left alone.
    A rate that the step's closure sets is scaled and kept; one that a hook sets after the step is kept.

    Args:
        optimizer: of torch or with torch's hooks.
        warmup: gives the factor, and is advanced by every step.
        wrap: applied to the hooks before they are registered.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: LinearWarmup,
        wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda hook: hook,
    ) -> None:
        self.optimizer, self.warmup = optimizer, warmup
        self.factor = 1.0
        """Of the last step."""
        self.applied: list[float | Tensor | None] = []
        self._true_rates: list[float | Tensor | None] = []
        self._is_in_step = False  # torch before 2.13 runs the hooks twice for a step that calls its base class's
        self._scale = wrap(self._multiply)
        self._handles: list[Any] = [
            optimizer.register_step_pre_hook(wrap(self._begin)),
            optimizer.register_step_post_hook(wrap(self._finish)),
        ]

    def remove(self) -> None:
        """Takes the hooks off the optimizer and leaves its learning rates as the schedule set them."""
        self._restore()
        for handle in self._handles:
            handle.remove()

    def _begin(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Scales the rates for the step, but not for its closure."""
        self._is_in_step = True
        self._scale()  # some, such as LBFGS, read the rate before they run the closure
        return with_closure(args, kwargs, self._scaling)

    def _scaling(self, closure: Callable[[], Any]) -> Any:
        self._restore()
        loss = closure()
        self._scale()
        return loss

    def _multiply(self) -> None:
        self._restore()
        groups = self.optimizer.param_groups
        factor = self.factor = self.warmup.factor
        if factor != 1:
            self._true_rates = [_copy(group.get("lr")) for group in groups]
            for group, rate in zip(groups, self._true_rates, strict=True):
                if rate is not None:
                    _assign(group, rate * factor)
        self.applied = [_copy(group.get("lr")) for group in groups]

    def _finish(self, *_: Any) -> None:
        self._restore()
        self.warmup.step += self._is_in_step
        self._is_in_step = False

    def _restore(self) -> None:
        for group, rate, applied in zip(self.optimizer.param_groups, self._true_rates, self.applied, strict=False):
            if rate is not None and not _differs(group.get("lr"), applied):
                _assign(group, rate)
        self._true_rates = []


def with_closure(args: Any, kwargs: Any, run: Callable[[Callable[[], Any]], Any]) -> tuple[Any, Any] | None:
    """The arguments of a pre-hook of an optimizer's step with `run(closure)` in place of its closure.

    Args:
        args, kwargs: those of the hook; the first of `args` is the optimizer.
        run: calls the closure and returns its loss.

    Returns:
        None if there is no closure.
    """
    closure = kwargs.get("closure") or next(iter(args[1:]), None)
    if not callable(closure):
        return None
    changed = functools.partial(run, closure)
    return (args, {**kwargs, "closure": changed}) if "closure" in kwargs else ((args[0], changed, *args[2:]), kwargs)


def _differs(rate: float | Tensor | None, applied: float | Tensor | None) -> bool:
    """Whether somebody has set a rate since it was scaled. A tensor of an accelerator is not waited for."""
    if rate is None or applied is None:
        return rate is not applied
    if isinstance(rate, Tensor) and rate.device.type != "cpu":
        return False
    return float(rate) != float(applied)


def _copy(rate: float | Tensor | None) -> float | Tensor | None:
    return rate.clone() if isinstance(rate, Tensor) else rate


def _assign(group: dict[str, Any], rate: float | Tensor) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)  # in place: a compiled or captured step holds on to the tensor itself
    else:
        group["lr"] = rate
