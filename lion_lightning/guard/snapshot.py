"""Snapshots of a run in host memory: weights, buffers and optimizer state, to go back to."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lion_lightning.guard.thresholds import Thresholds
from lion_lightning.optim import layout


@dataclass
class Snapshot:
    """The run after `step` optimizer steps.

    Attributes:
        tensors: parameters and buffers by name (the local part of DTensors), on the host.
        optimizers: for each optimizer, the state of its parameters by position, and the step counters of its groups.
        rules: state of the guard's rules at that time.
        trusted: it need not prove itself.
    """

    step: int
    tensors: dict[str, Tensor]
    optimizers: list[dict[str, Any]]
    rules: list[dict[str, Any]]
    trusted: bool = False


class SnapshotRing:
    """The newest few snapshots. Each process keeps its own part of the run.

    Args:
        thresholds: `snapshots`, `snapshot_every`, `proven_after`.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self.ring: deque[Snapshot] = deque(maxlen=thresholds.snapshots)

    def is_due(self, step: int) -> bool:
        """Whether a healthy run should be kept now."""
        return not self.ring or step - self.ring[-1].step >= self.thresholds.snapshot_every

    def take(
        self,
        step: int,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        rules: list[dict[str, Any]],
        trusted: bool = False,
    ) -> None:
        """Copies the run to the host; on a GPU the copies are queued and nobody waits for them."""
        tensors = {name: _to_host(tensor) for name, tensor in _tensors(module)}
        self.ring.append(Snapshot(step, tensors, [_kept_state(optimizer) for optimizer in optimizers], rules, trusted))

    @property
    def newest(self) -> Snapshot | None:
        return self.ring[-1] if self.ring else None

    def proven(self, step: int, older: bool = False) -> Snapshot | None:
        """The newest snapshot with enough healthy steps after it, or the oldest one; None if there is none.

        What is newer is dropped: it may be of a run that was already sick.
        """
        fit = [kept for kept in self.ring if kept.trusted or step - kept.step >= self.thresholds.proven_after]
        if not fit:
            return None
        chosen = fit[0] if older else fit[-1]
        while self.ring[-1] is not chosen:
            self.ring.pop()
        return chosen

    def state_dict(self) -> list[dict[str, Any]]:
        """The snapshots, tensors and all; waits for copies that are still on their way to the host."""
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return [dict(vars(kept)) for kept in self.ring]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        self.ring.clear()
        self.ring.extend(Snapshot(**kept) for kept in state)


@torch.no_grad()
def restore(snapshot: Snapshot, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Puts the run back in place, so that whoever holds its tensors sees it. Learning rates stay as they are."""
    for name, tensor in _tensors(module):
        tensor.copy_(snapshot.tensors[name], non_blocking=True)
    for optimizer, kept in zip(optimizers, snapshot.optimizers, strict=True):
        for index, param in enumerate(_params(optimizer)):
            _restore_state(optimizer.state, param, kept["state"].get(index, {}))
        for group, counter in zip(optimizer.param_groups, kept["steps"], strict=True):
            if counter is not None:
                group["step"] = counter.to(param.device) if isinstance(counter, Tensor) else counter


@torch.no_grad()
def repair(snapshot: Snapshot, module: nn.Module, optimizers: Sequence[Optimizer]) -> int:
    """Puts back those elements that are no longer finite, and leaves all others as they are.

    Returns:
        How many elements of this process there were.
    """
    pairs = [(tensor, snapshot.tensors[name]) for name, tensor in _tensors(module)]
    for optimizer, kept in zip(optimizers, snapshot.optimizers, strict=True):
        for index, param in enumerate(_params(optimizer)):
            for key, value in optimizer.state.get(param, {}).items():
                if isinstance(value, Tensor):
                    # What did not exist when the snapshot was taken starts again at 0.
                    before = kept["state"].get(index, {}).get(key)
                    pairs.append(
                        (layout.local(value), torch.zeros_like(layout.local(value)) if before is None else before)
                    )
    return sum(_repair_tensor(tensor, before) for tensor, before in pairs if tensor.is_floating_point())


def _repair_tensor(tensor: Tensor, before: Tensor) -> int:
    sick = ~tensor.isfinite()
    count = int(sick.sum())
    if count:
        tensor.copy_(torch.where(sick, before.to(tensor.device), tensor))
    return count


def _restore_state(states: Any, param: Tensor, kept: dict[str, Any]) -> None:
    if not kept:  # it had none yet
        states.pop(param, None)
        return
    state = states[param]
    for key in [key for key in state if key not in kept]:
        del state[key]
    for key, value in kept.items():
        if isinstance(value, Tensor) and isinstance(state.get(key), Tensor):
            layout.local(state[key]).copy_(value, non_blocking=True)
        else:
            state[key] = value.clone() if isinstance(value, Tensor) else value


def _kept_state(optimizer: Optimizer) -> dict[str, Any]:
    states = {
        index: {key: _to_host(value) for key, value in optimizer.state[param].items()}
        for index, param in enumerate(_params(optimizer))
        if param in optimizer.state
    }
    return {"state": states, "steps": [_to_host(group.get("step")) for group in optimizer.param_groups]}


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        yield name, layout.local(tensor.detach())


def _params(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _to_host(value: Any) -> Any:
    """A copy on the host, pinned if it comes from a GPU; anything but tensors as it is."""
    if not isinstance(value, Tensor):
        return value
    tensor = layout.local(value.detach())
    if tensor.device.type != "cuda":
        return tensor.to("cpu", copy=True)
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
