"""What is done about a symptom: the escalation policy, rewinds on trial, and the recovery itself."""

import math
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, get_args

from torch import nn
from torch.optim import Optimizer

from lion_lightning.guard.reading import Reading
from lion_lightning.guard.rules import RULES, Stateful, StuckMomentum, Symptom, Thresholds
from lion_lightning.guard.snapshots import Snapshot, SnapshotRing, buffers_with_nan, repair, restore
from lion_lightning.guard.step_monitor import GatedRules
from lion_lightning.optim import layout

OnDivergence = Literal["recover", "stop", "warn", "ignore"]
ON_DIVERGENCE: tuple[OnDivergence, ...] = get_args(OnDivergence)
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
    RESET_STATISTICS = "running statistics of normalization layers with NaN start anew"
    REWIND = "rewound to the newest healthy snapshot"
    REWIND_AT_HALF_RATE = "rewound to an older snapshot, at half the learning rate"
    UNDO_REWIND = "the rewind was undone; the loss is compared with its new level from now on"
    STOP = "the run stops"


AGREEING_LOSSES = 3
"""Losses after a rewind that end its trial before `thresholds.trial_steps` if all are on one side of the middle."""
DECISIVE_DEVIATIONS = 3.0
"""Distance of their mean from the middle, in its own deviations, at which the losses after a rewind end its trial."""
UNDONE_LIMIT = 2
"""Rewinds undone within `thresholds.horizon` steps after which a raised loss is only noted."""
UNFIT = 0.5
"""Share of the steps that a symptom needs from which the run is not fit to be saved."""
AT_ONCE = {"outlier": Remedy.CLIP, "bad_loss": Remedy.SKIP, "nonfinite": Remedy.SKIP}
REWINDS = (Remedy.REWIND, Remedy.REWIND_AT_HALF_RATE)
RESTORED = {"divergence", "sick_weights"}
"""Symptoms that a snapshot is kept for."""
ESCALATION = (*REWINDS, Remedy.STOP)


class EscalationPolicy(Stateful):
    """Chooses the remedy for a symptom, given the remedies before it. No tensors, no Lightning.

    Every divergence gets the next remedy of `ESCALATION`; after `thresholds.horizon` steps without one the next gets
    the first again.

    Args:
        thresholds: `proven_after`, `horizon`.
        on_divergence: "recover" escalates, "stop" stops at the first divergence, "warn" and "ignore" only note it.
    """

    STATE = ("level", "last_escalation", "last_reset", "last_repair", "undone", "last_undone")
    OPTIONAL = ("last_reset", "last_repair")

    def __init__(self, thresholds: Thresholds, on_divergence: OnDivergence = "warn") -> None:
        self.thresholds = thresholds
        self.on_divergence: OnDivergence = "warn" if on_divergence == "ignore" else on_divergence
        self.level = self.last_escalation = self.undone = self.last_undone = 0
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
        if kind == "low_flip_rate":
            return Remedy.REBASELINE  # what lasts without an outlier is how the task is
        if kind == "raised_loss":
            return Remedy.NEW_LEVEL
        if kind == "sick_buffers":
            return Remedy.REPAIR if self.on_divergence == "recover" else Remedy.RESET_STATISTICS
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
            keeps_rising = self.undone >= UNDONE_LIMIT and step - self.last_undone <= self.thresholds.horizon
            return Remedy.NEW_LEVEL if keeps_rising and kind == "divergence" else self._escalate(step)
        return Remedy.STOP if self.on_divergence == "stop" else Remedy.NEW_LEVEL

    def undo(self, step: int, level: int) -> None:
        """Takes back an escalation that was not needed.

        Args:
            step: at which the rewind was undone.
            level: the number of escalations before it.
        """
        self.undone = self.undone + 1 if step - self.last_undone <= self.thresholds.horizon else 1
        self.level, self.last_undone = level, step

    def _is_recent(self, last: int | None, step: int) -> bool:
        return last is not None and step - last <= self.thresholds.proven_after

    def _escalate(self, step: int) -> Remedy:
        if self.level and step - self.last_escalation > self.thresholds.horizon:
            self.level = 0
        remedy = ESCALATION[min(self.level, len(ESCALATION) - 1)]
        self.level, self.last_escalation = self.level + 1, step
        return remedy


@dataclass
class Trial:
    """A rewind on trial. If the loss does not return with the older weights, the task has changed, not the weights.

    Attributes:
        newer: the run before the rewind, which is restored then.
        rates: for each monitor, the state of its `rate` before the rewind.
        level: number of escalations before the rewind.
        monitor: number of the monitor whose loss is compared.
        returned: loss of the snapshot's weights when it was taken; `raised` if it is not known.
        raised: loss before the rewind.
        deviation: of a step's loss; NaN if it is not known.
        losses: since the rewind.
    """

    newer: Snapshot
    rates: list[dict[str, Any]]
    level: int
    monitor: int
    returned: float
    raised: float
    deviation: float = math.nan
    losses: list[float] = field(default_factory=list)

    @property
    def middle(self) -> float:
        """Losses above it are at the raised level, others have returned."""
        return (self.returned + self.raised) / 2

    def is_over(self, trial_steps: int) -> bool:
        """Whether the losses decide: by their mean, as all are on one side of the middle, or as there are enough."""
        is_high = [loss > self.middle for loss in self.losses]
        if not is_high:
            return False
        agree = len(is_high) >= AGREEING_LOSSES and len(set(is_high)) == 1
        distance = abs(statistics.fmean(self.losses) - self.middle) * math.sqrt(len(is_high))
        return agree or distance > DECISIVE_DEVIATIONS * self.deviation or len(is_high) >= trial_steps

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "newer": dict(vars(self.newer))}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Trial":
        """From what `state_dict` returned; raises TypeError, KeyError or ValueError for anything else."""
        found = cls(**{**state, "newer": Snapshot.from_state(state["newer"])})
        found.losses = [float(loss) for loss in found.losses]
        known = range(len(found.rates))[found.monitor]  # raises if there is no such monitor
        float(found.middle + found.deviation + found.level + known)  # raises if one is not a number
        return found


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
        disabled: rules of `rules.RULES` whose symptoms are ignored.
    """

    def __init__(
        self,
        thresholds: Thresholds,
        on_divergence: OnDivergence,
        acts: bool = True,
        gates: bool = True,
        disabled: Collection[str] = (),
    ) -> None:
        self.thresholds, self.acts, self.gates = thresholds, acts, gates
        disabled = {*disabled, "divergence"} if on_divergence == "ignore" else disabled
        self.ignored = {kind for rule in disabled for kind in RULES[rule]}
        self.trial: Trial | None = None
        self.is_ending = False
        """Whether the last step is done: nothing that has to be watched further is begun."""
        self.policy, self.ring = EscalationPolicy(thresholds, on_divergence), SnapshotRing(thresholds)
        self.monitors: Sequence[GatedRules] = ()
        self.module: nn.Module = nn.Module()
        self.optimizers: Sequence[Optimizer] = ()
        self.has_restored = False
        """Whether weights were put back, since whoever asks has set this to False."""

    def process(
        self, monitor: GatedRules, reading: Reading, is_finite: Callable[[], bool] = lambda: True
    ) -> Iterator[Treated]:
        """Lets the rules look at a reading and treats what they see.

        Args:
            monitor: the reading's.
            reading: of its next step.
            is_finite: whether the weights and optimizer state of all ranks are.
        """
        trial = self.trial  # one that begins now has not seen a loss of the older weights yet
        symptoms = monitor.rules.observe(reading)
        count, limits = monitor.rules.nonfinite_in_a_row, self.thresholds
        if count == limits.nonfinite_limit:
            message = f"no gradient was finite for {count} steps, though the weights are finite"
            symptoms.append(Symptom("nonfinite_limit", message))
        elif count and count % limits.nonfinite_steps == 0 and not reading.is_finite and not is_finite():
            message = "weights or optimizer state are no longer finite: every further step is lost"
            symptoms.append(Symptom("sick_weights", message))
        overflowed = monitor.scaled and not reading.bad_ranks  # the GradScaler finds its scale by such steps
        if not reading.is_finite and not overflowed and (sick := buffers_with_nan(self.module)):
            more = f" and {len(sick) - 1} more" if len(sick) > 1 else ""
            message = f"the forward pass has left NaN in buffers ({sick[0]}{more}): evaluation may be NaN from now on"
            symptoms.append(Symptom("sick_buffers", message))
        if overflowed:
            symptoms = [symptom for symptom in symptoms if symptom.kind != "nonfinite"]
        for symptom in symptoms:
            if symptom.kind not in self.ignored:
                yield self.treat(symptom, reading.step, monitor)
        if trial is not None and trial is self.trial and monitor is self.monitors[trial.monitor]:
            yield from self._try(trial, reading)

    def _try(self, trial: Trial, reading: Reading) -> Iterator[Treated]:
        """Takes in a loss after a rewind; ends the trial when there are enough of them."""
        if math.isfinite(reading.level):
            trial.losses.append(reading.level)
        if not trial.is_over(self.thresholds.trial_steps):
            return
        self.trial = None
        loss = statistics.median(trial.losses)
        if loss <= trial.middle:
            kept = self.ring.newest  # the snapshot on trial; no other is taken meanwhile
            if kept is not None and (left := _named(restore(kept, self.module, (), params=False))):
                message = f"the loss has returned to {loss:.4g} with the older weights: the rewind stands"
                yield Treated(Symptom("rewind_stands", message), Remedy.NOTE, Remedy.NOTE.value + left)
            return
        message = (
            f"the older weights have a loss of {loss:.4g} now, those before the rewind had {trial.raised:.4g}: "
            "the task has changed, not the weights"
        )
        yield self._undo(trial, reading.step, message)

    def _undo(self, trial: Trial, step: int, message: str) -> Treated:
        """Restores the run before the rewind."""
        left = _named(restore(trial.newer, self.module, self.optimizers))
        self.has_restored = True
        for monitor, rules, rate in zip(self.monitors, trial.newer.rules, trial.rates, strict=True):
            monitor.return_to(rules)
            monitor.rules.divergence.take_level()
            monitor.rate.load_state_dict({**rate, "step": monitor.rate.step})  # the rewind has started it again
        self.policy.undo(step, trial.level)
        return Treated(Symptom("new_level", message), Remedy.UNDO_REWIND, Remedy.UNDO_REWIND.value + left)

    def end(self, step: int) -> Iterator[Treated]:
        """After the last step: a rewind that is still on trial has no steps left to prove itself, and is undone."""
        trial, self.trial = self.trial, None
        if trial is not None:
            yield self._undo(trial, step, "training ended while a rewind was on trial")

    def treat(self, symptom: Symptom, step: int, monitor: GatedRules) -> Treated:
        """Chooses the remedy for a symptom of a step of `monitor` and carries it out."""
        level, last_escalation = self.policy.level, self.policy.last_escalation
        remedy = self.policy.remedy(symptom.kind, step)
        kept = None
        recovers = symptom.kind == "divergence" and self.policy.on_divergence == "recover"
        if recovers and self.is_ending:
            remedy = Remedy.NEW_LEVEL  # no step is left to show whether a rewind helps
        if remedy is Remedy.REPAIR or remedy in REWINDS:
            older = remedy is Remedy.REWIND_AT_HALF_RATE
            kept = self.ring.newest if remedy is Remedy.REPAIR else self.ring.proven(step, older)
            if kept is None:
                otherwise = {"sick_buffers": Remedy.RESET_STATISTICS, "divergence": Remedy.NEW_LEVEL}
                remedy = otherwise.get(symptom.kind, Remedy.STOP)
        said = remedy.value if kept is None else f"{remedy.value} (of step {kept.step})"
        if remedy in (Remedy.REBASELINE, Remedy.NEW_LEVEL):  # of the rules alone, also where the run is only watched
            if remedy is Remedy.REBASELINE:
                monitor.rules.stuck_momentum = StuckMomentum(self.thresholds)
            else:
                self.policy.level, self.policy.last_escalation = level, last_escalation
                monitor.rules.divergence.take_level()
            return Treated(symptom, remedy, said)
        if not self.acts or (not self.gates and remedy in (Remedy.CLIP, Remedy.SKIP)):
            return Treated(symptom, remedy, f"nothing was done (would be: {said})")
        if remedy is Remedy.ZERO_MOMENTUM:
            monitor.zero_momentum()
        elif remedy is Remedy.REPAIR and kept is not None:
            repair(kept, self.module, self.optimizers)
            self.has_restored = True
            if symptom.kind == "sick_weights":
                monitor.rules.nonfinite_in_a_row = 0
        elif remedy is Remedy.RESET_STATISTICS:
            for part in self.module.modules():
                reset = getattr(part, "reset_running_stats", None)
                if callable(reset) and buffers_with_nan(part):
                    reset()
        elif kept is not None:
            said += self._rewind(kept, remedy, step, monitor, level if symptom.kind == "divergence" else None)
        return Treated(symptom, remedy, said)

    def _rewind(self, kept: Snapshot, remedy: Remedy, step: int, monitor: GatedRules, level: int | None) -> str:
        """Restores a snapshot.

        Args:
            kept: the snapshot.
            remedy: one of `REWINDS`.
            step: of the symptom.
            monitor: that saw it.
            level: number of escalations before; None if the rewind is not to be put on trial.

        Returns:
            The end of the event's message: the tensors that were not restored.
        """
        raised, deviation = monitor.rules.divergence.fast.value, monitor.rules.divergence.deviation
        rules = [each.rules_state() for each in self.monitors]
        newer = Snapshot.of_run(step, self.module, self.optimizers, rules)
        rates = [each.rate.state_dict() for each in self.monitors]
        # A buffer may be part of the task: a queue that fills raises the loss, whatever the weights are.
        left = restore(kept, self.module, self.optimizers, buffers=level is None)
        self.has_restored = True
        scale = HALF_RATE if remedy is Remedy.REWIND_AT_HALF_RATE else 1.0
        for each, kept_rules in zip(self.monitors, kept.rules, strict=True):
            each.return_to(kept_rules)
            each.rate.rewarm(scale)
        returned = monitor.rules.divergence.fast.value
        number = [each is monitor for each in self.monitors].index(True)
        if not returned < raised:  # not known of the weights that training started from
            returned = raised
        elif returned > 0:  # the noise of a loss grows with its level
            deviation *= math.sqrt(raised / returned)
        self.trial = None if level is None else Trial(newer, rates, level, number, returned, raised, deviation)
        return _named(left)

    def keep(self, step: int, trusted: bool = False) -> None:
        """Takes a snapshot if one is due and the run is healthy.

        Args:
            step: optimizer steps so far.
            trusted: the state that training starts from.
        """
        first = trusted and not self.ring.ring  # there is nothing else to go back to
        restores = self.policy.on_divergence == "recover" and not self.ignored >= RESTORED
        if restores and self.ring.is_due(step) and not self._saw_nonfinite() and (first or self._suspicion() == 0):
            rules = [monitor.rules_state() for monitor in self.monitors]
            if self.acts:
                self.ring.ring.append(Snapshot.of_run(step, self.module, self.optimizers, rules, trusted))
            else:  # its step is all that is told of it
                self.ring.ring.append(Snapshot(step, {}, [], rules, trusted))

    def forget(self) -> None:
        """Drops all snapshots and a rewind on trial: nothing goes back to before now."""
        self.ring.ring.clear()
        self.trial = None

    def is_healthy(self) -> bool:
        """Whether the run is fit to be saved as one to continue from.

        It is not while a rewind is on trial or a rule has counted half the steps towards a symptom on which the guard
        would act (fewer are common where losses have heavy tails), nor after `nonfinite_steps` steps in a row that were
        not finite. After fewer, which were skipped and have changed nothing, or after one that was taken, weights,
        buffers and optimizer state of this process decide.
        """
        # A GradScaler finds its scale by steps that overflow.
        rules = [monitor.rules for monitor in self.monitors if not monitor.scaled]
        streak = max((each.nonfinite_in_a_row for each in rules), default=0)
        finite = [monitor.is_finite() for monitor in self.monitors] if self._saw_nonfinite() else []
        is_lost = any(each.is_lost for each in rules) if self.is_ending else streak >= self.thresholds.nonfinite_steps
        if is_lost or not all(finite) or (finite and buffers_with_nan(self.module)):
            return False
        return self.is_ending or not self.acts or self._suspicion() < UNFIT

    def _saw_nonfinite(self) -> bool:
        return any(monitor.rules.nonfinite_in_a_row or not monitor.is_latest_finite() for monitor in self.monitors)

    def _suspicion(self) -> float:
        """As of the rules; 1 while a rewind is on trial."""
        ignored = self.ignored | ({"divergence"} if self.policy.on_divergence == "warn" else set())
        shares = [monitor.rules.suspicion(ignored) for monitor in self.monitors]
        return 1.0 if self.trial is not None else max(shares, default=0.0)

    def state_dict(self, snapshots: bool) -> dict[str, Any]:
        """Policy, snapshots and a rewind on trial.

        The last two only with `snapshots`, and not of sharded parameters, of which a checkpoint would have the parts of
        rank 0 alone.
        """
        snapshots = snapshots and self.acts and not any(map(layout.is_sharded, self.module.parameters()))
        trial = self.trial.state_dict() if snapshots and self.trial is not None else None
        return {
            "policy": self.policy.state_dict(),
            "snapshots": self.ring.state_dict() if snapshots else [],
            "trial": trial,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned. What does not fit raises here, not in a later rewind.

        To find out, all rules and rates are loaded into the monitors: load the monitors' own state afterwards.
        """
        self.policy.load_state_dict(state["policy"])
        self.ring.load_state_dict(state["snapshots"])
        trial = state.get("trial")
        self.trial = None if trial is None else Trial.from_state(trial)
        snapshots = [*self.ring.ring]
        if self.trial is not None:
            snapshots.append(self.trial.newer)
            for monitor, rate in zip(self.monitors, self.trial.rates, strict=True):
                monitor.rate.load_state_dict(rate)
        for snapshot in snapshots:
            for monitor, rules in zip(self.monitors, snapshot.rules, strict=True):
                monitor.load_rules_state(rules)


def _named(left: list[str]) -> str:
    """The end of a sentence about a restored snapshot: the tensors that it does not have."""
    names = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
    return f"; not in the snapshot in its present shape, and left as it is: {names}" if left else ""
