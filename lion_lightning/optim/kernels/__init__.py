"""The engines: one rule, several ways to run it.

An engine is an object with the three members of `Engine`. `choose` asks the engines registered for a device, in order
of preference, whether they support an update, and falls back on the eager engine, which supports everything. A new
engine is a module with such an object and one line in `ENGINES`; it is imported when a parameter on its device takes
its first step.

`step` gets all updates of one optimizer step that the engine is to run, over all parameter groups, as flat dense
tensors (`rule.TensorUpdate`) with the settings of their group, so it may launch one kernel per dtype combination.
It must

- compute what `rule.ruled` computes, each product and sum rounded by itself, and store as `bits` stores;
- leave `grad` alone, and leave an element whose scaled gradient is not finite as it is when
  `settings.skip_nonfinite` is set;
- add the number of elements with non-finite gradients to `nonfinite`, skipped or propagated (a 0-d int64 tensor on
  the device of the updates);
- where `update.statistics` is not None, add to it, or to that of another update of the same kind and settings, the sums
  that `telemetry.observe` adds, and refresh `update.signs`;
- draw random bits as `bits.random_bits` does: a hash of (`settings.seed`, `settings.step`, `update.index`,
  `update.offset` + element);
- never wait for the device, except on a CPU.
"""

import functools
import importlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lion_lightning.optim.kernels.rule import TensorUpdate


class Engine(Protocol):
    """What an engine offers to the optimizer."""

    name: str

    def objection(self, update: TensorUpdate) -> str | None:
        """Why this engine cannot run the update here and now, as the end of a sentence, or None if it can."""

    def step(self, updates: Sequence[TensorUpdate], nonfinite: Tensor) -> None:
        """Runs the updates in place and adds to the count of non-finite gradient elements."""


ENGINES: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("triton",)}
"""Device type -> modules of this package, best first, each with an `engine` object."""


def engines_for(device: torch.device) -> tuple[Engine, ...]:
    """The engines beside eager that are made for a device, best first."""
    return _imported(ENGINES.get(device.type, ()))


@functools.cache
def _imported(modules: tuple[str, ...]) -> tuple[Engine, ...]:
    return tuple(importlib.import_module(f"{__name__}.{module}").engine for module in modules)


def choose(update: TensorUpdate, fused: bool | None) -> Engine:
    """The engine for an update.

    Args:
        update: the tensors to be updated and their settings.
        fused: None takes the best engine, True insists on one that is not eager, False takes eager.

    Raises:
        ValueError: `fused` is True and no engine but eager can do it.
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
