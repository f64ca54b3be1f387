"""The ladder: which remedy a symptom gets, given the remedies it has had. No tensors, no Lightning."""

from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from lion_lightning.guard.thresholds import Thresholds

OnDivergence = Literal["recover", "stop", "warn"]
ON_DIVERGENCE: tuple[OnDivergence, ...] = ("recover", "stop", "warn")


class Remedy(str, Enum):
    """What is done about a symptom, from the mildest on."""

    NOTE = "noted"
    CLIP = "the step was clipped"
    SKIP = "the step was skipped"
    REBASELINE = "the rule starts a new history"
    ZERO_MOMENTUM = "the momentum was zeroed"
    REPAIR = "what was not finite was put back from the newest snapshot"
    REWIND = "rewound to the newest healthy snapshot"
    REWIND_AT_HALF_RATE = "rewound to an older snapshot, at half the learning rate"
    STOP = "the run stops"


AT_ONCE = {"outlier": Remedy.CLIP, "bad_loss": Remedy.SKIP, "nonfinite": Remedy.SKIP, "lock_in": Remedy.REBASELINE}
RUNGS = (Remedy.REWIND, Remedy.REWIND_AT_HALF_RATE, Remedy.STOP)


@dataclass
class Ladder:
    """Climbs a rung with every divergence and comes down after `thresholds.horizon` steps without one.

    Args:
        thresholds: `proven_after`, `horizon`.
        on_divergence: "recover" climbs, "stop" stops at the first divergence, "warn" only says so.
    """

    thresholds: Thresholds
    on_divergence: OnDivergence = "recover"
    rung: int = 0
    last_climb: int = 0
    last_reset: int | None = None
    last_repair: int | None = None

    def remedy(self, kind: str, step: int) -> Remedy:
        """The remedy for a symptom of `kind` at a step; remembers that it was given."""
        if kind in AT_ONCE:
            return AT_ONCE[kind]
        if kind == "poison":
            return self._reset(step)
        if kind not in ("divergence", "sick_weights", "nonfinite_limit"):
            return Remedy.NOTE
        if kind == "nonfinite_limit" or (self.on_divergence != "recover" and kind == "sick_weights"):
            return Remedy.STOP
        if kind == "sick_weights" and not self._is_recent(self.last_repair, step):
            self.last_repair = step
            return Remedy.REPAIR
        if self.on_divergence == "recover":
            return self._climb(step)
        return Remedy.STOP if self.on_divergence == "stop" else Remedy.NOTE

    def _reset(self, step: int) -> Remedy:
        """A momentum that looks poisoned again right after it was zeroed was not poisoned."""
        again = self._is_recent(self.last_reset, step)
        self.last_reset = step
        return Remedy.REBASELINE if again else Remedy.ZERO_MOMENTUM

    def _is_recent(self, last: int | None, step: int) -> bool:
        return last is not None and step - last <= self.thresholds.proven_after

    def _climb(self, step: int) -> Remedy:
        if self.rung and step - self.last_climb > self.thresholds.horizon:
            self.rung = 0
        remedy = RUNGS[min(self.rung, len(RUNGS) - 1)]
        self.rung, self.last_climb = self.rung + 1, step
        return remedy

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in MEMORY}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in MEMORY:
            setattr(self, name, state[name])


MEMORY = ("rung", "last_climb", "last_reset", "last_repair")
