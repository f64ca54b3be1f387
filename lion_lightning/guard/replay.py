"""The rules over an old run's readings: what another threshold would have seen, without training.

Gate, monitors, ladder and snapshots go through the steps as they do in a run, one reading late. Only the run itself is
not there: what comes after a remedy is what the run did, not what it would have done.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from torch import nn

from lion_lightning.guard.gate import HostGate
from lion_lightning.guard.monitors import Monitors, Poison, Symptom
from lion_lightning.guard.readings import Reading
from lion_lightning.guard.recovery import AT_ONCE, ON_DIVERGENCE, Ladder, OnDivergence, Remedy
from lion_lightning.guard.snapshot import SnapshotRing
from lion_lightning.guard.thresholds import Thresholds

LOGGED = {name: f"guard/{name}" for name in ("loss", "grad_norm", "norm_z", "loss_z", "flip_rate", "cosine", "dead")}


@dataclass(frozen=True)
class Rules:
    """What a replay needs to know of the guard and of the Trainer.

    Attributes:
        thresholds: of all rules.
        on_divergence: as LionGuard's.
        clip_val: the norm that the Trainer clipped gradients to; None for none.
    """

    thresholds: Thresholds = field(default_factory=Thresholds)
    on_divergence: OnDivergence = "recover"
    clip_val: float | None = None


@dataclass(frozen=True)
class Replayed:
    """What the rules saw at a step, and the remedy that they would have given."""

    step: int
    kind: str
    remedy: Remedy

    @property
    def label(self) -> str:
        """The kind, and the remedy where the ladder had a choice."""
        chosen = self.kind not in AT_ONCE and self.remedy is not Remedy.NOTE
        return f"{self.kind}: {self.remedy.name.lower().replace('_', ' ')}" if chosen else self.kind


class _Watch:
    """The rules of one optimizer, as `watch.OptimizerWatch` holds them."""

    def __init__(self, readings: Sequence[Reading], rules: Rules) -> None:
        self.readings = {reading.step: reading for reading in readings}
        self.clip_val = rules.clip_val or math.inf
        self.gate, self.monitors = HostGate(rules.thresholds), Monitors(rules.thresholds)
        self.waiting: list[Reading] = []

    def judge(self, step: int) -> None:
        """The gate's turn; the reading waits until the next step has been judged."""
        reading = self.readings.get(step)
        if reading is None:
            return
        norm = min(reading.grad_norm, self.clip_val) if math.isfinite(reading.grad_norm) else math.nan
        verdict = self.gate.judge(norm, reading.backward_loss)
        judged: dict[str, Any] = {name: float(value) for name, value in asdict(verdict).items()}
        skipped = bool(judged.pop("skip"))
        self.waiting.append(replace(reading, **judged, skipped=skipped))

    def is_healthy(self, ignore_divergence: bool) -> bool:
        finite = not self.waiting or self.waiting[-1].is_finite
        return finite and not self.monitors.is_suspicious(ignore_divergence)

    def state_dict(self) -> dict[str, Any]:
        return {"gate": self.gate.state_dict(), "monitors": self.monitors.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gate.load_state_dict(state["gate"])
        self.monitors.load_state_dict(state["monitors"])
        self.waiting.clear()


class _Replay:
    """All optimizers of a run with the ladder and the snapshots that they share."""

    def __init__(self, readings: Mapping[int, Sequence[Reading]], rules: Rules) -> None:
        self.rules, self.events = rules, list[Replayed]()
        self.watches = [_Watch(readings[number], rules) for number in sorted(readings)]
        self.ladder, self.ring = Ladder(rules.thresholds, rules.on_divergence), SnapshotRing(rules.thresholds)
        self._keep(0, trusted=True)

    def run(self) -> list[Replayed]:
        known = {step for watch in self.watches for step in watch.readings}
        for step in range(min(known), max(known) + 2):  # the last reading arrives when the run is over
            for watch in self.watches:
                watch.judge(step)
            if not self._react(step):
                break
            self._keep(step)
        return self.events

    def _react(self, step: int) -> bool:
        """Lets the monitors see the readings of the steps before `step`; whether the run goes on."""
        for watch in self.watches:
            while watch.waiting and watch.waiting[0].step < step:
                reading = watch.waiting.pop(0)
                for symptom in [*watch.monitors.observe(reading), *self._limit(watch)]:
                    if not self._treat(watch, symptom, reading.step):
                        return False
        return True

    def _limit(self, watch: _Watch) -> list[Symptom]:
        at_limit = watch.monitors.nonfinite_in_a_row == self.rules.thresholds.nonfinite_limit
        return [Symptom("nonfinite_limit", "")] if at_limit else []

    def _treat(self, watch: _Watch, symptom: Symptom, step: int) -> bool:
        remedy = self.ladder.remedy(symptom.kind, step)
        if remedy in (Remedy.REWIND, Remedy.REWIND_AT_HALF_RATE):
            remedy = self._rewind(step, remedy)
        elif remedy is Remedy.ZERO_MOMENTUM:
            watch.monitors.poison.recovered()
        elif remedy is Remedy.REBASELINE and symptom.kind == "poison":
            watch.monitors.poison = Poison(self.rules.thresholds)
        elif remedy is Remedy.REBASELINE:
            watch.gate.forget()
        self.events.append(Replayed(step, symptom.kind, remedy))
        return remedy is not Remedy.STOP

    def _rewind(self, step: int, remedy: Remedy) -> Remedy:
        kept = self.ring.proven(step, older=remedy is Remedy.REWIND_AT_HALF_RATE)
        if kept is None:
            return Remedy.STOP
        for watch, state in zip(self.watches, kept.rules, strict=True):
            watch.load_state_dict(state)
        return remedy

    def _keep(self, step: int, trusted: bool = False) -> None:
        """A snapshot of the rules alone."""
        ignored = self.rules.on_divergence == "warn"
        if self.ring.is_due(step) and all(watch.is_healthy(ignored) for watch in self.watches):
            self.ring.take(step, nn.Module(), [], [watch.state_dict() for watch in self.watches], trusted)


def replay(readings: Mapping[int, Sequence[Reading]], rules: Rules) -> list[Replayed]:
    """What the rules see in a run, in order; ends where they would have stopped it.

    Args:
        readings: of each optimizer by its number, as `trace.read_trace` gives them.
        rules: the thresholds to try.
    """
    return _Replay(readings, rules).run()


def changed(thresholds: Thresholds, assignments: Iterable[str]) -> Thresholds:
    """The thresholds with some set anew, each given as `name=value`.

    Raises:
        ValueError: there is no such threshold, or the value is not one for it.
    """
    values: dict[str, float] = {}
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        values[name] = _number(name, text)
    return replace(thresholds, **values)  # type: ignore[arg-type]


def _number(name: str, text: str) -> float:
    kinds = {entry.name: entry.type for entry in fields(Thresholds)}
    if name not in kinds:
        raise ValueError(f"there is no threshold {name!r}: use one of {', '.join(kinds)}")
    try:
        return int(text) if kinds[name] is int else float(text)
    except ValueError:
        kind = "a whole number" if kinds[name] is int else "a number"
        raise ValueError(f"thresholds.{name} must be {kind}, got {text!r}") from None


def rules_of(config: Mapping[str, Any]) -> Rules:
    """The rules that a run had, by its nested configuration; the defaults for what it does not say.

    Raises:
        ValueError: it sets a threshold that there is not, or to what is not allowed.
    """
    guard, trainer = config.get("guard") or {}, config.get("trainer") or {}
    given = {name: value for name, value in (guard.get("thresholds") or {}).items() if name != "_target_"}
    on_divergence = guard.get("on_divergence", "recover")
    if on_divergence not in ON_DIVERGENCE:
        raise ValueError(f"on_divergence must be one of {', '.join(ON_DIVERGENCE)}, got {on_divergence!r}")
    by_norm = trainer.get("gradient_clip_algorithm") in (None, "norm")
    return Rules(
        thresholds=changed(Thresholds(), [f"{name}={value}" for name, value in given.items()]),
        on_divergence=on_divergence,
        clip_val=trainer.get("gradient_clip_val") if by_norm else None,
    )


def logged_readings(history: Iterable[Mapping[str, Any]], step_key: str) -> list[Reading]:
    """Readings of the steps that a run logged, from its history; what was not logged is NaN.

    Args:
        history: rows with `guard/*` and, under `step_key`, the number of the optimizer step from 0 on.
    """
    readings = []
    for row in history:
        values: dict[str, Any] = {name: float(row[key]) for name, key in LOGGED.items() if key in row}
        if {"loss", "grad_norm"} & values.keys():
            readings.append(Reading(**values, step=int(row.get(step_key, row.get("_step", 0))) + 1))
    return readings
