"""The rules over an old run's readings: what other thresholds would have seen, without training.

Gate, rules, policy and snapshots process the steps as they do in a run, one reading late. The readings are those of
the run: what follows a remedy is what the run did, not what it would have done.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from lion_lightning.guard.gate import clip_norm
from lion_lightning.guard.reading import SUMS, UPDATE_SUMS, Reading
from lion_lightning.guard.recovery import AT_ONCE, ON_DIVERGENCE, OnDivergence, Recovery, Remedy
from lion_lightning.guard.rules import Thresholds
from lion_lightning.guard.step_monitor import BACKWARD_LOSS, SQUARES, GatedRules

LOGGED = {
    "loss": "guard/loss",
    "grad_norm": "guard/grad_norm",
    "flip_rate": "guard/sign_flip_rate",
    "cosine": "guard/update_gradient_cosine",
    "dead": "guard/moved_without_gradient",
}


@dataclass(frozen=True)
class Settings:
    """What a replay needs to know of the guard and of the Trainer.

    Attributes:
        thresholds: of all rules.
        on_divergence, on_bad_loss, disabled: as LionGuard's.
        clip_val: the norm that the Trainer clipped gradients to; None for none.
    """

    thresholds: Thresholds = field(default_factory=Thresholds)
    on_divergence: OnDivergence = "warn"
    on_bad_loss: str = "note"
    disabled: tuple[str, ...] = ()
    clip_val: float | None = None


@dataclass(frozen=True)
class Replayed:
    """What the rules saw at a step, and the remedy that they would have chosen."""

    step: int
    kind: str
    remedy: Remedy

    @property
    def label(self) -> str:
        """The kind, and the remedy where the policy had a choice."""
        chosen = self.kind not in AT_ONCE and self.remedy is not Remedy.NOTE
        return f"{self.kind}: {self.remedy.name.lower().replace('_', ' ')}" if chosen else self.kind


class ReplayedRules(GatedRules):
    """Gate and rules of one optimizer over its recorded readings.

    Args:
        readings: of the optimizer.
        settings: the thresholds to try.
    """

    def __init__(self, readings: Sequence[Reading], settings: Settings) -> None:
        skips_bad_losses = settings.on_bad_loss == "skip"
        super().__init__(settings.thresholds, skips_bad_losses=skips_bad_losses, disabled=settings.disabled)
        self.readings, self.clip_val = {reading.step: reading for reading in readings}, settings.clip_val

    def judge_step(self, step: int) -> None:
        """Lets the gate judge a recorded step; its reading is read when the next step has been judged."""
        reading = self.readings.get(step)
        if reading is None:
            return
        vector = torch.zeros(len(SUMS) + len(UPDATE_SUMS) + 1, dtype=torch.float64, device="cpu")
        vector[SQUARES], vector[BACKWARD_LOSS] = reading.grad_norm**2, reading.backward_loss
        facts = (step, reading.batch_size, reading.micro_batch_size, reading.rate)
        self.judge(vector, self.clip_val, facts)

    def restored(self, read: Reading) -> Reading:
        """The recorded reading with the verdict of this replay."""
        verdict = {name: getattr(read, name) for name in ("factor", "skipped", "norm_z", "loss_z")}
        return replace(self.readings[read.step], **verdict)

    def is_latest_finite(self) -> bool:
        return all(self.restored(reading).is_finite for reading in self.unread()[-1:])


def replay(readings: Mapping[int, Sequence[Reading]], settings: Settings) -> list[Replayed]:
    """What the rules see in a run, in order; ends where they would have stopped it.

    Args:
        readings: of each optimizer by its number, as `events.read_trace` gives them.
        settings: the thresholds to try.
    """
    seen: list[Replayed] = []
    disabled = {*settings.disabled, "bad_loss"} if settings.on_bad_loss == "ignore" else settings.disabled
    recovery = Recovery(settings.thresholds, settings.on_divergence, disabled=disabled)
    recovery.monitors = monitors = [ReplayedRules(readings[number], settings) for number in sorted(readings)]
    recovery.keep(0, trusted=True)
    known = {step for monitor in monitors for step in monitor.readings}
    for step in range(min(known), max(known) + 2):  # the last reading is read when the run is over
        for monitor in monitors:
            monitor.judge_step(step)
        for monitor in monitors:
            while (reading := monitor.read(flush=step not in monitor.readings)) is not None:
                for treated in recovery.process(monitor, monitor.restored(reading)):
                    seen.append(Replayed(reading.step, treated.symptom.kind, treated.remedy))
                    if treated.remedy is Remedy.STOP:
                        return seen
        recovery.keep(step)
    return seen


def changed(thresholds: Thresholds, assignments: Iterable[str]) -> Thresholds:
    """The thresholds with some set anew, each given as `name=value`.

    Raises:
        ValueError: there is no such threshold, or the value is not one for it.
    """
    kinds = {entry.name: entry.type for entry in fields(Thresholds)}
    values: dict[str, float] = {}
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        if name not in kinds:
            raise ValueError(f"there is no threshold {name!r}: use one of {', '.join(kinds)}")
        try:
            values[name] = int(text) if kinds[name] is int else float(text)
        except ValueError:
            kind = "a whole number" if kinds[name] is int else "a number"
            raise ValueError(f"thresholds.{name} must be {kind}, got {text!r}") from None
    return replace(thresholds, **values)  # type: ignore[arg-type]


def settings_of(config: Mapping[str, Any]) -> Settings:
    """The settings that a run had, from its nested configuration; the defaults for what it leaves out.

    Raises:
        ValueError: it sets an unknown threshold, or one to what is not allowed.
    """
    guard, trainer = config.get("guard") or {}, config.get("trainer") or {}
    given = {name: value for name, value in (guard.get("thresholds") or {}).items() if name != "_target_"}
    on_divergence = guard.get("on_divergence", "warn")
    if on_divergence not in ON_DIVERGENCE:
        raise ValueError(f"on_divergence must be one of {', '.join(ON_DIVERGENCE)}, got {on_divergence!r}")
    return Settings(
        thresholds=changed(Thresholds(), [f"{name}={value}" for name, value in given.items()]),
        on_divergence=on_divergence,
        on_bad_loss=guard.get("on_bad_loss", "note"),
        disabled=tuple(guard.get("disabled") or ()),
        clip_val=clip_norm(trainer.get("gradient_clip_val"), trainer.get("gradient_clip_algorithm")),
    )


def logged_readings(history: Iterable[Mapping[str, Any]], step_key: str) -> list[Reading]:
    """Readings of the steps that a run logged; what was not logged is NaN.

    Args:
        history: rows with `guard/*` and, under `step_key`, the number of the optimizer step from 0 on.
        step_key: name of the step's column.
    """
    readings = []
    for row in history:
        values: dict[str, Any] = {name: float(row[key]) for name, key in LOGGED.items() if key in row}
        if {"loss", "grad_norm"} & values.keys():
            readings.append(Reading(**values, step=int(row.get(step_key, row.get("_step", 0))) + 1))
    return readings
