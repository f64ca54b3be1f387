"""What is done about a symptom: the escalation policy, snapshots in host memory, and the recovery itself."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lion_lightning.guard.rules import Reading, Stateful, Symptom, Thresholds
from lion_lightning.guard.step_monitor import GatedRules
from lion_lightning.optim import layout

OnDivergence = Literal["recover", "stop", "warn"]
ON_DIVERGENCE: tuple[OnDivergence, ...] = ("recover", "stop", "warn")
HALF_RATE = 0.5


class Remedy(str, Enum):
    """What is done about a symptom, from the mildest on."""

    NOTE = "noted"
    CLIP = "the step was clipped"
    SKIP = "the step was skipped"
    REBASELINE = "the rule starts a new history"
    NEW_LEVEL = "noted; the loss is compared with its new level from now on"
    ZERO_MOMENTUM = "the momentum was zeroed"
    REPAIR = "what was not finite was restored from the newest snapshot"
    REWIND = "rewound to the newest healthy snapshot"
    REWIND_AT_HALF_RATE = "rewound to an older snapshot, at half the learning rate"
    STOP = "the run stops"


AT_ONCE = {"outlier": Remedy.CLIP, "bad_loss": Remedy.SKIP, "nonfinite": Remedy.SKIP}
REWINDS = (Remedy.REWIND, Remedy.REWIND_AT_HALF_RATE)
ESCALATION = (*REWINDS, Remedy.STOP)


class EscalationPolicy(Stateful):
    """Chooses the remedy for a symptom, given the remedies before it. No tensors, no Lightning.

    Every divergence gets the next remedy of `ESCALATION`; after `thresholds.horizon` steps without one the next gets
    the first again.

    Args:
        thresholds: `proven_after`, `horizon`.
        on_divergence: "recover" escalates, "stop" stops at the first divergence, "warn" only notes it.
    """

    STATE = ("level", "last_escalation", "last_reset", "last_repair")

    def __init__(self, thresholds: Thresholds, on_divergence: OnDivergence = "warn") -> None:
        self.thresholds, self.on_divergence = thresholds, on_divergence
        self.level = self.last_escalation = 0
        self.last_reset: int | None = None
        self.last_repair: int | None = None

    def remedy(self, kind: str, step: int) -> Remedy:
        """The remedy for a symptom of `kind` at a step; remembers that it was chosen."""
        if kind in AT_ONCE:
            return AT_ONCE[kind]
        if kind == "poison":
            # A momentum that looks stuck again right after it was zeroed was not stuck.
            again, self.last_reset = self._is_recent(self.last_reset, step), step
            return Remedy.REBASELINE if again else Remedy.ZERO_MOMENTUM
        if kind not in ("divergence", "sick_weights", "nonfinite_limit"):
            return Remedy.NOTE
        if kind != "divergence" and self.on_divergence == "warn":
            return Remedy.NOTE
        if kind == "nonfinite_limit" or (self.on_divergence != "recover" and kind == "sick_weights"):
            return Remedy.STOP
        if kind == "sick_weights" and not self._is_recent(self.last_repair, step):
            self.last_repair = step
            return Remedy.REPAIR
        if self.on_divergence == "recover":
            return self._escalate(step)
        return Remedy.STOP if self.on_divergence == "stop" else Remedy.NEW_LEVEL

    def _is_recent(self, last: int | None, step: int) -> bool:
        return last is not None and step - last <= self.thresholds.proven_after

    def _escalate(self, step: int) -> Remedy:
        if self.level and step - self.last_escalation > self.thresholds.horizon:
            self.level = 0
        remedy = ESCALATION[min(self.level, len(ESCALATION) - 1)]
        self.level, self.last_escalation = self.level + 1, step
        return remedy


@dataclass
class Snapshot:
    """The run after `step` optimizer steps.

    Attributes:
        tensors: parameters and buffers by name (the local part of DTensors), on the host.
        optimizers: for each optimizer, the state of its parameters by position, and the step counters of its groups.
        rules: state of the rules of each optimizer at that time.
        trusted: the run may be rewound to it without further healthy steps.
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
        """Whether a snapshot should be taken now, if the run is healthy."""
        return not self.ring or step - self.ring[-1].step >= self.thresholds.snapshot_every

    def take(
        self,
        step: int,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        rules: list[dict[str, Any]],
        trusted: bool = False,
    ) -> None:
        """Copies the run to the host; on a GPU the copies are queued without synchronising.

        Args:
            step: optimizer steps so far.
            module: parameters and buffers are copied.
            optimizers: their state is copied.
            rules: state of the rules of each optimizer.
            trusted: whether the run may be rewound to it without further healthy steps.
        """
        tensors = {name: _to_host(tensor) for name, tensor in _tensors(module)}
        self.ring.append(Snapshot(step, tensors, [_kept_state(optimizer) for optimizer in optimizers], rules, trusted))

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
        self.ring.clear()
        self.ring.extend(Snapshot(**kept) for kept in state)


@torch.no_grad()
def restore(snapshot: Snapshot, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Copies a snapshot into the tensors of the run, in place. Learning rates stay as they are.

    Args:
        snapshot: of this run.
        module, optimizers: those that the snapshot was taken of.
    """
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
    """Restores those elements that are no longer finite, and leaves all others as they are.

    Args:
        snapshot: of this run.
        module, optimizers: those that the snapshot was taken of.

    Returns:
        The number of restored elements of this process.
    """
    pairs = [(tensor, snapshot.tensors[name]) for name, tensor in _tensors(module)]
    for optimizer, kept in zip(optimizers, snapshot.optimizers, strict=True):
        for index, param in enumerate(_params(optimizer)):
            for key, value in optimizer.state.get(param, {}).items():
                if isinstance(value, Tensor):
                    # What did not exist when the snapshot was taken starts again at 0.
                    here, before = layout.local(value), kept["state"].get(index, {}).get(key)
                    pairs.append((here, torch.zeros_like(here) if before is None else before))
    count = 0
    for tensor, before in pairs:
        if tensor.is_floating_point() and (sick := ~tensor.isfinite()).any():
            count += int(sick.sum())
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


@dataclass(frozen=True)
class Treated:
    """A symptom, the remedy that was chosen, and a sentence that says what was done."""

    symptom: Symptom
    remedy: Remedy
    said: str


class Recovery:
    """Carries out the remedies for one run of one or more optimizers; a replay runs it without module and optimizers.

    Args:
        thresholds: of the policy and the snapshots.
        on_divergence: see `EscalationPolicy`.
        acts: False reports what would be done and does nothing.
        gates: whether the gate's verdicts are carried out.
    """

    def __init__(
        self, thresholds: Thresholds, on_divergence: OnDivergence, acts: bool = True, gates: bool = True
    ) -> None:
        self.thresholds, self.acts, self.gates = thresholds, acts, gates
        self.policy, self.ring = EscalationPolicy(thresholds, on_divergence), SnapshotRing(thresholds)
        self.monitors: Sequence[GatedRules] = ()
        self.module: nn.Module = nn.Module()
        self.optimizers: Sequence[Optimizer] = ()

    def process(
        self, monitor: GatedRules, reading: Reading, is_finite: Callable[[], bool] = lambda: True
    ) -> Iterator[Treated]:
        """Lets the rules look at a reading and treats what they see.

        Args:
            monitor: the reading's.
            reading: of its next step.
            is_finite: whether the weights and optimizer state of all ranks are.
        """
        symptoms = monitor.rules.observe(reading)
        count, limits = monitor.rules.nonfinite_in_a_row, self.thresholds
        if count == limits.nonfinite_limit:
            message = f"no gradient was finite for {count} steps, though the weights are"
            symptoms.append(Symptom("nonfinite_limit", message))
        elif count and count % limits.nonfinite_steps == 0 and not reading.is_finite and not is_finite():
            message = "weights or optimizer state are no longer finite: every further step is lost"
            symptoms.append(Symptom("sick_weights", message))
        for symptom in symptoms:
            yield self.treat(symptom, reading.step, monitor)

    def treat(self, symptom: Symptom, step: int, monitor: GatedRules) -> Treated:
        """Chooses the remedy for a symptom of a step of `monitor` and carries it out."""
        remedy = self.policy.remedy(symptom.kind, step)
        kept = None
        if remedy is Remedy.REPAIR:
            kept = self.ring.newest
        elif remedy in REWINDS:
            kept = self.ring.proven(step, older=remedy is Remedy.REWIND_AT_HALF_RATE)
        if kept is None and remedy in (Remedy.REPAIR, *REWINDS):
            remedy = Remedy.STOP
        said = remedy.value if kept is None else f"{remedy.value} (of step {kept.step})"
        if not self.acts or (not self.gates and remedy in (Remedy.CLIP, Remedy.SKIP)):
            return Treated(symptom, remedy, f"nothing was done (would be: {said})")
        if remedy is Remedy.ZERO_MOMENTUM:
            monitor.zero_momentum()
        elif remedy in (Remedy.REBASELINE, Remedy.NEW_LEVEL):
            monitor.rebaseline(symptom.kind)
        elif remedy is Remedy.REPAIR and kept is not None:
            repair(kept, self.module, self.optimizers)
            monitor.rules.nonfinite_in_a_row = 0
        elif kept is not None:
            restore(kept, self.module, self.optimizers)
            scale = HALF_RATE if remedy is Remedy.REWIND_AT_HALF_RATE else 1.0
            for each, rules in zip(self.monitors, kept.rules, strict=True):
                each.rewind(rules, scale)
        return Treated(symptom, remedy, said)

    def keep(self, step: int, trusted: bool = False) -> None:
        """Takes a snapshot if one is due and the run is healthy.

        Args:
            step: optimizer steps so far.
            trusted: the state that training starts from.
        """
        rewinds = self.policy.on_divergence == "recover"
        if rewinds and self.ring.is_due(step) and self.is_healthy():  # health waits for the latest reading
            rules = [monitor.rules_state() for monitor in self.monitors]
            self.ring.take(step, self.module, self.optimizers, rules, trusted)

    def is_healthy(self) -> bool:
        """Whether no rule is counting steps towards a symptom, and the latest step was finite: fit to be saved.

        In a dry run only a step that is not finite prevents saving, as symptoms have no consequence that ends them.
        """
        if not self.acts:
            return all(monitor.is_latest_finite() for monitor in self.monitors)
        ignored = self.policy.on_divergence == "warn"
        return not any(monitor.is_suspicious(ignore_divergence=ignored) for monitor in self.monitors)
