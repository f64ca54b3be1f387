"""Carries out what the ladder says: the hands of the guard on weights, momentum and rates. No Lightning."""

from collections.abc import Callable, Sequence

from torch import nn

from lion_lightning.guard import snapshot
from lion_lightning.guard.monitors import Symptom
from lion_lightning.guard.recovery import Ladder, OnDivergence, Remedy
from lion_lightning.guard.snapshot import Snapshot, SnapshotRing
from lion_lightning.guard.thresholds import Thresholds
from lion_lightning.guard.watch import OptimizerWatch

HALF_RATE = 0.5
Agree = Callable[[bool], bool]


class Treatment:
    """Remedies for one run of one or more optimizers.

    Args:
        thresholds: of the ladder and the snapshots.
        on_divergence: see `Ladder`.
        acts: False notes what would be done and does nothing.
        gates: whether the gate is on; without it no step was clipped or skipped.
    """

    def __init__(self, thresholds: Thresholds, on_divergence: OnDivergence, acts: bool, gates: bool) -> None:
        self.thresholds, self.acts, self.gates = thresholds, acts, gates
        self.ladder, self.ring = Ladder(thresholds, on_divergence), SnapshotRing(thresholds)
        self.watches: Sequence[OptimizerWatch] = ()
        self.module: nn.Module | None = None

    def examine(self, watch: OptimizerWatch, agree: Agree) -> list[Symptom]:
        """After several skipped steps: are the weights themselves sick?

        Args:
            watch: that skipped.
            agree: whether something is true on all ranks, as `Strategy.reduce_boolean_decision`.
        """
        count, limits = watch.monitors.nonfinite_in_a_row, self.thresholds
        if count == limits.nonfinite_limit:
            return [Symptom("nonfinite_limit", f"no gradient was finite for {count} steps, though the weights are")]
        if count % limits.nonfinite_steps or not count or agree(bool(watch.is_finite())):
            return []
        return [Symptom("sick_weights", "weights or optimizer state are no longer finite: every further step is lost")]

    def treat(self, symptom: Symptom, step: int, watch: OptimizerWatch) -> tuple[Remedy, str]:
        """The remedy for a symptom, which has been carried out, and a sentence that says so."""
        remedy, kept = self._remedy(symptom, step)
        said = remedy.value if kept is None else f"{remedy.value} (of step {kept.step})"
        if not self.acts or (not self.gates and remedy in (Remedy.CLIP, Remedy.SKIP)):
            return remedy, f"nothing was done (would be: {said})"
        if remedy is Remedy.ZERO_MOMENTUM:
            watch.zero_momentum()
        elif remedy is Remedy.REBASELINE:
            watch.rebaseline(symptom.kind)
        elif remedy is Remedy.REPAIR and kept is not None:
            snapshot.repair(kept, self._module(), [watch.optimizer for watch in self.watches])
            watch.monitors.nonfinite_in_a_row = 0
        elif kept is not None:
            self._rewind(kept, HALF_RATE if remedy is Remedy.REWIND_AT_HALF_RATE else 1.0)
        return remedy, said

    def _remedy(self, symptom: Symptom, step: int) -> tuple[Remedy, Snapshot | None]:
        """What the ladder says, with the snapshot it takes; the end, if that needs one and there is none."""
        remedy = self.ladder.remedy(symptom.kind, step)
        if remedy is Remedy.REPAIR:
            kept = self.ring.newest
        elif remedy in (Remedy.REWIND, Remedy.REWIND_AT_HALF_RATE):
            kept = self.ring.proven(step, older=remedy is Remedy.REWIND_AT_HALF_RATE)
        else:
            return remedy, None
        return (remedy, kept) if kept is not None else (Remedy.STOP, None)

    def _module(self) -> nn.Module:
        assert self.module is not None, "training has not started"
        return self.module

    def _rewind(self, kept: Snapshot, scale: float) -> None:
        snapshot.restore(kept, self._module(), [watch.optimizer for watch in self.watches])
        for watch, rules in zip(self.watches, kept.rules, strict=True):
            watch.put_back(rules)
            watch.warmup.warmup.rewarm(scale)

    def keep(self, step: int, trusted: bool = False) -> None:
        """Takes a snapshot if one is due and nothing is suspicious.

        Args:
            step: optimizer steps so far.
            trusted: the state that training starts from: proven without further steps.
        """
        if self.ring.is_due(step) and self.is_healthy():  # health waits for the latest reading
            rules = [watch.rules_state() for watch in self.watches]
            self.ring.take(step, self._module(), [watch.optimizer for watch in self.watches], rules, trusted)

    def is_healthy(self) -> bool:
        """Whether no rule is on its way to a verdict, and the latest step was finite: fit to be saved.

        A dry run keeps nobody from saving but for a step that is not finite: its verdicts never come to an end.
        """
        if not self.acts:
            return all(watch.is_latest_finite() for watch in self.watches)
        ignored = self.ladder.on_divergence == "warn"
        return not any(watch.is_suspicious(ignore_divergence=ignored) for watch in self.watches)
