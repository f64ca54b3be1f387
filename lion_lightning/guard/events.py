"""What the guard has seen and done, for the terminal, the log and the checkpoint."""

import logging
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

log = logging.getLogger(__name__)

COLUMNS = ["step", "kind", "remedy", "message"]


@runtime_checkable
class TableLogger(Protocol):
    """Lightning's WandbLogger, told by what it can do: wandb need not be installed."""

    @property
    def experiment(self) -> Any: ...

    def log_table(self, key: str, columns: list[str], data: list[list[Any]]) -> None: ...


@dataclass(frozen=True)
class Event:
    """One line of the guard's diary.

    Attributes:
        step: the optimizer step it is about, from 1 on; 0 before training. The guard looks at it a step later or more.
        kind: the rule (see `monitors.Symptom` and `preflight.Finding`).
        remedy: what was done.
        message: what was seen and why it matters.
    """

    step: int
    kind: str
    remedy: str
    message: str


class Diary:
    """Every event in order. Says the first few of a kind aloud, and after that every tenth, hundredth, ...

    A run of a million steps must not drown in lines about clipped steps.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._counts: Counter[str] = Counter()

    def note(self, event: Event, loggers: list[Logger]) -> None:
        """Remembers an event, says it in the terminal and in W&B (rank 0)."""
        self.events.append(event)
        self._counts[event.kind] += 1
        count = self._counts[event.kind]
        if count <= 3 or count in (10, 100, 1000, 10_000):
            times = f" (number {count})" if count > 1 else ""
            _say(f"LionGuard, step {event.step}, {event.kind}{times}: {event.message}; {event.remedy}.")
            publish(self.events, event if count == 1 else None, loggers)

    def state_dict(self) -> list[dict[str, Any]]:
        return [asdict(event) for event in self.events]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        self.events = [Event(**event) for event in state]
        self._counts = Counter(event.kind for event in self.events)


@rank_zero_only
def remark(message: str) -> None:
    """A line for the terminal that is no event: nothing is wrong."""
    log.info("LionGuard: %s", message)


@rank_zero_only
def _say(message: str) -> None:
    log.warning(message)


@rank_zero_only
def publish(events: list[Event], alert: Event | None, loggers: list[Logger]) -> None:
    """The table `guard/events`, and an alert, in every logger that has such things (W&B's has)."""
    for logger in loggers:
        if isinstance(logger, TableLogger):
            rows = [[event.step, event.kind, event.remedy, event.message] for event in events]
            logger.log_table("guard/event_table", columns=COLUMNS, data=rows)
            if alert is not None:
                logger.experiment.alert(title=f"LionGuard: {alert.kind}", text=f"{alert.message}; {alert.remedy}")
