"""The protocol of an engine, and the choice of an engine for an update."""

import functools
import importlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lion_lightning.optim.kernels.rule import TensorUpdate


class Engine(Protocol):
    """One way to run the rule on flat tensors.

    A new engine is a module with an object named `engine`, listed in `ENGINES`. The module is imported when a parameter
    on its device takes its first step.
    """

    name: str

    def objection(self, update: TensorUpdate) -> str | None:
        """Why this engine cannot run the update here and now, as the end of a sentence; None if it can."""

    def step(self, updates: Sequence[TensorUpdate], nonfinite: Tensor) -> None:
        """Runs updates in place, without waiting for a device other than a CPU.

        The engine computes what `rule.ruled` computes, each product and sum rounded separately, and stores as
        `storage_formats` does. It does not write `grad`. If `settings.skip_nonfinite` is set, an element whose scaled
        gradient is not finite keeps its weight and momentum. Random bits are those of `storage_formats.random_bits`
        for `settings.seed`, `settings.step`, `update.index` and `update.offset` + element.

        Args:
            updates: all updates of one optimizer step on one device that this engine runs, over all parameter groups;
                none is empty. Tensors of one dtype combination may share a launch.
            nonfinite: int64 of shape () on the device; the number of gradients that are not finite is added to it.
        """


ENGINES: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("triton",)}
"""Device type -> modules of this package, best first."""


def engines_for(device: torch.device) -> tuple[Engine, ...]:
    """The engines other than eager for a device, best first."""
    return _imported(ENGINES.get(device.type, ()))


@functools.cache
def _imported(modules: tuple[str, ...]) -> tuple[Engine, ...]:
    return tuple(importlib.import_module(f"lion_lightning.optim.kernels.{module}").engine for module in modules)


def choose(update: TensorUpdate, fused: bool | None) -> Engine:
    """The engine for an update: the best that supports it, else eager, which supports everything.

    Args:
        update: the tensors to be updated and their settings.
        fused: None takes the best engine, True insists on one other than eager, False takes eager.

    Raises:
        ValueError: `fused` is True and no engine other than eager supports the update.
    """
    objections = []
    for engine in () if fused is False else engines_for(update.param.device):
        objection = engine.objection(update)
        if objection is None:
            return engine
        objections.append(f"{engine.name}: {objection}")
    if not fused:
        return _imported(("eager",))[0]
    reasons = "; ".join(objections) or f"there is none for device type {update.param.device.type!r}"
    raise ValueError(f"fused=True needs a fused engine ({reasons}); allowed here are fused=None and fused=False")
