"""Copies of a run in host memory: taking them, a ring of the newest few, and restoring a run from one."""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lion_lightning.guard.rules import Thresholds
from lion_lightning.optim import layout


@dataclass
class Snapshot:
    """The run after `step` optimizer steps.

    Attributes:
        tensors: parameters and buffers by name (the local part of DTensors), on the host.
        optimizers: for each optimizer, the state of its parameters by position, the number of parameters, and the step
            counters of its groups.
        rules: state of the rules of each optimizer at that time.
        trusted: the run may be rewound to it without further healthy steps.
    """

    step: int
    tensors: dict[str, Tensor]
    optimizers: list[dict[str, Any]]
    rules: list[dict[str, Any]]
    trusted: bool = False

    @classmethod
    def of_run(
        cls,
        step: int,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        rules: list[dict[str, Any]],
        trusted: bool = False,
    ) -> "Snapshot":
        """Copies the run to the host; on a GPU the copies are queued without synchronising.

        Args:
            step: optimizer steps so far.
            module: parameters and buffers are copied.
            optimizers: their state is copied.
            rules: state of the rules of each optimizer.
            trusted: whether the run may be rewound to it without further healthy steps.
        """
        tensors = {name: _to_host(tensor) for name, tensor in _tensors(module)}
        return cls(step, tensors, [_kept_state(optimizer) for optimizer in optimizers], rules, trusted)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Snapshot":
        """From the attributes by name; raises TypeError, KeyError or AttributeError for other values."""
        found = cls(**state)
        states = [entry for kept in found.optimizers for entry in kept["state"].values()]
        dicts = [found.tensors, *found.rules, *states]
        tensors = all(isinstance(tensor, Tensor) for tensor in found.tensors.values())
        numbers = [found.step, *(kept["params"] for kept in found.optimizers)]
        lists = [kept["steps"] for kept in found.optimizers]
        known = all(isinstance(entry, dict) for entry in dicts) and all(isinstance(entry, list) for entry in lists)
        if not (tensors and known and all(isinstance(number, int) for number in numbers)):
            raise TypeError("not a snapshot")
        return found


class SnapshotRing:
    """The newest few snapshots. Each process keeps its own part of the run.

    Args:
        thresholds: `snapshots`, `snapshot_every`, `proven_after`.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self.ring: deque[Snapshot] = deque(maxlen=thresholds.snapshots)

    def is_due(self, step: int) -> bool:
        """Whether a snapshot should be taken now, if the run is healthy."""
        return not self.ring or step - self.ring[-1].step >= self.thresholds.snapshot_every

    @property
    def newest(self) -> Snapshot | None:
        return self.ring[-1] if self.ring else None

    def proven(self, step: int, older: bool = False) -> Snapshot | None:
        """The newest snapshot (with `older` the oldest) with enough healthy steps after it; None if there is none.

        Newer ones are dropped: they may be of a run that was already sick.
        """
        fit = [kept for kept in self.ring if kept.trusted or step - kept.step >= self.thresholds.proven_after]
        if not fit:
            return None
        chosen = fit[0] if older else fit[-1]
        while self.ring[-1] is not chosen:
            self.ring.pop()
        return chosen

    def state_dict(self) -> list[dict[str, Any]]:
        """The snapshots, tensors included; waits for copies that are still on their way to the host."""
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return [dict(vars(kept)) for kept in self.ring]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        self.ring = deque(map(Snapshot.from_state, state), self.ring.maxlen)


@torch.no_grad()
def restore(
    snapshot: Snapshot, module: nn.Module, optimizers: Sequence[Optimizer], params: bool = True, buffers: bool = True
) -> list[str]:
    """Copies a snapshot into the tensors of the run, in place. Learning rates stay as they are.

    A model may have changed since: parameters may have been added, unfrozen, resized or pruned.

    Args:
        snapshot: of this run.
        module, optimizers: those that the snapshot was taken of.
        params: whether parameters are restored.
        buffers: whether buffers are; those that are no longer finite are in any case.

    Returns:
        Names of the tensors that the snapshot does not have in their present shape, or that cannot be written; they are
        left as they are.
    """
    left = []
    tensors = [*_params_of(module, snapshot.tensors)] if params else []  # also those that have been frozen since
    tensors += [pair for pair in _buffers_of(module) if buffers or nonfinite(pair[1]) is not None]
    for name, tensor in tensors:
        kept = snapshot.tensors.get(name)
        if kept is None or kept.shape != tensor.shape or layout.is_expanded(tensor):
            left.append(name)
        else:
            tensor.copy_(kept, non_blocking=True)
    for optimizer, saved in zip(optimizers, snapshot.optimizers, strict=False):
        for index, param in enumerate(_params(optimizer)):
            if index < saved["params"]:
                _restore_state(optimizer.state, param, saved["state"].get(index, {}))
        for group, counter in zip(optimizer.param_groups, saved["steps"], strict=False):
            if counter is not None:
                device = group["step"].device if isinstance(group.get("step"), Tensor) else None
                group["step"] = counter.to(device) if isinstance(counter, Tensor) else counter
    return left


@torch.no_grad()
def repair(snapshot: Snapshot, module: nn.Module, optimizers: Sequence[Optimizer]) -> int:
    """Restores those elements that are no longer finite, and leaves all others as they are.

    Args:
        snapshot: of this run.
        module, optimizers: those that the snapshot was taken of.

    Returns:
        The number of restored elements of this process.
    """
    pairs = [(tensor, snapshot.tensors[name]) for name, tensor in _tensors(module) if name in snapshot.tensors]
    for optimizer, kept in zip(optimizers, snapshot.optimizers, strict=False):
        for index, param in enumerate(_params(optimizer)):
            for key, value in optimizer.state.get(param, {}).items():
                if isinstance(value, Tensor):
                    # What did not exist when the snapshot was taken starts again at 0.
                    here, before = layout.local(value), kept["state"].get(index, {}).get(key)
                    pairs.append((here, torch.zeros_like(here) if before is None else before))
    count = 0
    for tensor, before in pairs:
        if tensor.shape == before.shape and not layout.is_expanded(tensor) and (sick := nonfinite(tensor)) is not None:
            count += int(sick.sum())
            tensor.copy_(torch.where(sick, before.to(tensor.device), tensor))
    return count


def nonfinite(tensor: Tensor) -> Tensor | None:
    """Where a tensor is not finite, bool of its shape; None if it is nowhere, or is of a kind that cannot tell.

    Sparse and quantized tensors, lazy ones and those of 8-bit floats cannot.
    """
    if is_lazy(tensor) or tensor.layout is not torch.strided or tensor.is_quantized:
        return None
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    if tensor.element_size() == 1:
        return None
    sick = ~tensor.isfinite()
    return sick if bool(sick.any()) else None


def buffers_with_nan(module: nn.Module) -> list[str]:
    """Names of the buffers that hold NaN. Infinities are left out: masks and observers begin with them."""
    return [name for name, buffer in _buffers_of(module) if nonfinite(buffer) is not None and buffer.isnan().any()]


def _restore_state(states: Any, param: Tensor, kept: dict[str, Any]) -> None:
    if not kept:  # it had none yet
        states.pop(param, None)
        return
    state = states[param]
    shared = [key for key in state.keys() & kept.keys() if isinstance(kept[key], Tensor)]
    if any(layout.local(state[key]).shape != kept[key].shape for key in shared):
        return  # of a parameter that has been resized since
    for key in [key for key in state if key not in kept]:
        del state[key]
    for key, value in kept.items():
        if isinstance(value, Tensor) and isinstance(state.get(key), Tensor):
            layout.local(state[key]).copy_(value, non_blocking=True)
        else:
            state[key] = _nested(value, lambda tensor: _beside(tensor, param))


def _beside(tensor: Tensor, param: Tensor) -> Tensor:
    """A copy on the device of `param`; of a number, such as a step counter, on the host."""
    return tensor.to(param.device if tensor.ndim else "cpu", copy=True)


def _nested(value: Any, copy: Callable[[Tensor], Tensor]) -> Any:
    """`value` with copies of the tensors in it, also of those in lists, tuples and dicts; others as they are."""
    if isinstance(value, Tensor):
        return copy(value)
    if type(value) is dict:
        return {key: _nested(item, copy) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_nested(item, copy) for item in value)
    return value


def _kept_state(optimizer: Optimizer) -> dict[str, Any]:
    states = {
        index: {key: _nested(value, _to_host) for key, value in optimizer.state[param].items()}
        for index, param in enumerate(_params(optimizer))
        if param in optimizer.state
    }
    return {
        "state": states,
        "params": sum(1 for _ in _params(optimizer)),
        "steps": [_nested(group.get("step"), _to_host) for group in optimizer.param_groups],
    }


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from _params_of(module)
    yield from _buffers_of(module)


def _params_of(module: nn.Module, also: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Trainable parameters, and those with names in `also`.

    Frozen ones do not change in training and need no copies; lazy ones have no values yet.
    """
    for name, param in module.named_parameters():
        if (param.requires_grad or name in also) and not is_lazy(param):
            yield name, layout.local(param.detach())


def _buffers_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, buffer in module.named_buffers():
        if not is_lazy(buffer):
            yield name, layout.local(buffer.detach())


def _params(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _to_host(value: Tensor) -> Tensor:
    """A copy on the host, pinned if it comes from a GPU."""
    tensor = layout.local(value.detach())
    if tensor.device.type != "cuda":
        return tensor.to("cpu", copy=True)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
