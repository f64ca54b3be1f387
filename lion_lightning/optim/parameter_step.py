"""One parameter's share of an optimizer step, taken alone: what `release_gradients` runs inside backward."""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lion_lightning.optim import group_options, layout
from lion_lightning.optim.kernels import choose
from lion_lightning.optim.kernels.rule import Settings, TensorUpdate
from lion_lightning.optim.lion import Lion
from lion_lightning.optim.state import prepare

Place = tuple[int, int]
"""Number of a parameter's group, and of the parameter over all groups."""


def places(optimizer: Optimizer) -> dict[Tensor, Place]:
    """Where each parameter of an optimizer stands."""
    pairs = [(number, param) for number, group in enumerate(optimizer.param_groups) for param in group["params"]]
    return {param: (number, index) for index, (number, param) in enumerate(pairs)}


class ParameterStep(Protocol):
    """How an optimizer steps one parameter at a time; the sum of an iteration is one ordinary step."""

    def begin(self) -> None:
        """Starts an iteration: called once, before its first parameter."""

    def step(self, param: Tensor, place: Place) -> None:
        """Steps a parameter that has a gradient."""

    def remove(self) -> None:
        """Leaves the optimizer as it was found."""


class LionStep:
    """Lion's step in parts: the step number that keys its rounding advances once, when the iteration ends.

    Telemetry is sampled at the same steps as ever; a parameter without a gradient counts as one at rest.
    """

    def __init__(self, optimizer: Lion) -> None:
        self._optimizer = optimizer
        self._settings: dict[tuple[int, torch.device], Settings | None] = {}
        self._sampled: dict[int, TensorUpdate] = {}
        self._begun = False
        optimizer._update = self._finish  # type: ignore[method-assign]

    def begin(self) -> None:
        self._begun, self._settings, self._sampled = True, {}, {}
        if self._optimizer.telemetry_every:
            pairs = places(self._optimizer).items()
            updates = [self._outline(param, place) for param, place in pairs if param.requires_grad]
            self._optimizer._telemetry.attach([update for update in updates if update.param.numel()])
            self._sampled = {update.index: update for update in updates if update.statistics is not None}

    def step(self, param: Tensor, place: Place) -> None:
        assert param.grad is not None
        group, state = self._optimizer.param_groups[place[0]], self._optimizer.state[param]
        group_options.check_grad(param.grad)
        prepare(state, param, group["weight_bits"], group_options.momentum_dtype(group["momentum_dtype"]))
        settings = self._settings_of(param, place)
        if settings is None:
            return
        copies: list[tuple[Tensor, Tensor]] = []
        update = layout.tensor_update(param, state, place[1], settings, copies)
        sampled = self._sampled.get(place[1])
        if sampled is not None:
            update.statistics, update.observed_below = sampled.statistics, sampled.observed_below
            update.signs, update.sign_stride = sampled.signs, sampled.sign_stride
        if update.param.numel():
            choose(update, group["fused"]).step([update], self._nonfinite(update.param.device))
        for target, source in copies:
            target.copy_(source)
        torch.autograd.graph.increment_version(param)  # engines that write memory do not tell autograd

    def remove(self) -> None:
        self._optimizer.__dict__.pop("_update", None)

    def _finish(self) -> None:
        """Stands in for `Lion._update`: steps what still has a gradient, then counts the step."""
        if not self._begun:
            self.begin()
        for param, place in places(self._optimizer).items():
            if param.grad is not None:
                self.step(param, place)
        for number, group in enumerate(self._optimizer.param_groups):
            used = [value for (owner, _), value in self._settings.items() if owner == number and value is not None]
            self._optimizer._count_step(group, used)
        self._begun = False

    def _settings_of(self, param: Tensor, place: Place) -> Settings | None:
        key = (place[0], param.device)
        if key not in self._settings:
            self._settings[key] = self._optimizer._settings(self._optimizer.param_groups[place[0]], param.device)
        return self._settings[key]

    def _nonfinite(self, device: torch.device) -> Tensor:
        counts = self._optimizer._nonfinite
        if device not in counts:
            counts[device] = torch.zeros((), dtype=torch.int64, device=device)
        return counts[device]

    def _outline(self, param: Tensor, place: Place) -> TensorUpdate:
        """A stand-in for telemetry, which wants to see all tensors of a step at once: it holds no gradient."""
        weight = layout.local(param.detach()).reshape(-1)
        settings = self._settings_of(param, place)
        assert settings is not None
        kind = ("scalar", "vector")[param.ndim] if param.ndim < 2 else "matrix"
        return TensorUpdate(weight, weight, weight, None, None, place[1], 0, settings, kind)


class TorchStep:
    """Any other optimizer whose state belongs to single parameters: its own step, shown one parameter at a time.

    Raises:
        ValueError: the optimizer is LBFGS, whose step needs all gradients at once.
        RuntimeError: during training, when the optimizer turns out to keep state in its groups.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                "optimizer=LBFGS is not allowed in release_gradients: its step needs all gradients at once; use an "
                "optimizer that steps each parameter by itself, like Lion, SGD or AdamW"
            )
        self._optimizer = optimizer
        step: Any = type(optimizer).step
        self._plain_step = step.__wrapped__ if hasattr(step, "hooked") else step  # hooks run once an iteration

    def begin(self) -> None:
        pass

    def step(self, param: Tensor, place: Place) -> None:
        optimizer, groups = self._optimizer, self._optimizer.param_groups
        group = groups[place[0]]
        alone = {**group, "params": [param]}
        optimizer.param_groups = [alone]
        try:
            self._plain_step(optimizer)
        finally:
            optimizer.param_groups = groups
        changed = [key for key, value in alone.items() if key != "params" and value is not group.get(key)]
        if changed:
            raise RuntimeError(
                f"{type(optimizer).__name__} keeps state in its parameter groups ({', '.join(changed)}), so that it "
                "cannot step one parameter at a time: do not use release_gradients with it"
            )

    def remove(self) -> None:
        pass


def parameter_step(optimizer: Optimizer) -> ParameterStep:
    """The way to step an optimizer's parameters one by one."""
    return LionStep(optimizer) if isinstance(optimizer, Lion) else TorchStep(optimizer)
