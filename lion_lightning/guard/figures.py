"""What the guard logs: `guard/*`, `lion/*` and the learning rates that were applied."""

import math
from typing import Any

import torch
from torch import Tensor

from lion_lightning.guard.readings import Mailbox, Reading
from lion_lightning.guard.warmup import WarmupHook
from lion_lightning.guard.watch import OptimizerWatch
from lion_lightning.optim import Lion


def guard_figures(watch: OptimizerWatch, reading: Reading) -> dict[str, float]:
    """`guard/*` of one optimizer after its latest reading; what is not known is left out."""
    monitors, warmup = watch.monitors, watch.warmup.warmup
    values = {
        "warmup_factor": min(1.0, warmup.step / max(1, warmup.warmup_steps)),
        "lr_factor": warmup.factor,
        "loss": reading.loss,
        "grad_norm": reading.grad_norm,
        "norm_z": reading.norm_z,
        "loss_z": reading.loss_z,
        "clipped": float(monitors.clipped),
        "skipped": float(monitors.skipped),
        "flip_rate": reading.flip_rate,
        "cosine": monitors.gauges.value("cosine"),
        "dead": monitors.gauges.value("dead"),
        "loss_average": monitors.divergence.fast.value,
        "loss_limit": monitors.divergence.limit,
    }
    return {f"guard/{name}": value for name, value in values.items() if math.isfinite(value)}


def learning_rates(hooks: list[WarmupHook]) -> dict[str, float | Tensor]:
    """The rates the last step applied: `lr-<optimizer>/<group>`, with `-1` after the name of a second optimizer."""
    rates: dict[str, float | Tensor] = {}
    for number, hook in enumerate(hooks):
        label = f"lr-{type(hook.optimizer).__name__}" + (f"-{number}" if number else "")
        for index, (group, rate) in enumerate(zip(hook.optimizer.param_groups, hook.applied, strict=False)):
            rates[f"{label}/{group.get('name', index)}"] = rate
    return rates


class TelemetryReader:
    """Has a Lion optimizer sample its `lion/*` figures, and fetches them without a wait.

    Args:
        optimizer: whoever has switched its telemetry on keeps it as it is.
        every: optimizer steps between samples; which steps are sampled does not depend on where a run was resumed.
    """

    def __init__(self, optimizer: Lion, every: int) -> None:
        self.optimizer, self.every = optimizer, every
        self._is_ours, self._is_on = not optimizer.telemetry_every, False
        self._mail, self._names = Mailbox(), list[str]()

    def before_step(self, step: int) -> None:
        """Switches sampling on for the steps that are due."""
        if self._is_ours and self._is_on != (due := self._is_due(step)):
            self.optimizer.telemetry_every, self._is_on = int(due), due

    def read(self, step: int) -> dict[str, float]:
        """What was sent a step ago, if anything; sends what a sampled step has left. Call it after every step."""
        if not self._mail and not self._is_due(step):
            return {}
        values = self._mail.take(flush=True)
        arrived: dict[str, Any] = {} if values is None else dict(zip(self._names, values, strict=True))
        if self._is_due(step) and (figures := self.optimizer.telemetry()):
            self._names = list(figures)
            self._mail.post(torch.stack([figure.float() for figure in figures.values()]))
        return arrived

    def _is_due(self, step: int) -> bool:
        return step % self.every == 1 % self.every

    def remove(self) -> None:
        """Leaves the optimizer as it was found."""
        if self._is_ours:
            self.optimizer.telemetry_every, self._is_on = 0, False

    def state_dict(self) -> dict[str, Any]:
        return {"mail": self._mail.state_dict(), "names": list(self._names)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._mail.load_state_dict(state["mail"])
        self._names = list(state["names"])
