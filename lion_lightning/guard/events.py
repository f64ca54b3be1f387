"""What the guard reports: events, metrics for the loggers, and a trace of every step for replays."""

import csv
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from lion_lightning.guard.reading import Reading
from lion_lightning.guard.step_monitor import AsyncReadback, StepMonitor
from lion_lightning.optim import Lion

log = logging.getLogger(__name__)

COLUMNS = ["step", "kind", "remedy", "message"]
TRACE_COLUMNS = ["optimizer", *(field.name for field in fields(Reading))]
FLUSH_EVERY_ROWS = 100
MAX_EVENTS_OF_A_KIND = 1000
MAX_LOGGED_GROUPS = 4
NOT_LOGGED = ("lion/flip_rate", "lion/nonfinite", "lion/step_ratio_scalar", "lion/step_ratio_vector")
"""Telemetry that is left out of the logs: `guard/sign_flip_rate` and `guard/skipped_steps` see every step."""


@dataclass(frozen=True)
class Event:
    """One line of the event log.

    Attributes:
        step: the optimizer step it is about, from 1 on; 0 before training. It is reported a step later.
        kind: the rule (see `rules.Symptom` and `preflight.inspect`).
        remedy: what was done.
        message: what was seen and why it matters.
    """

    step: int
    kind: str
    remedy: str
    message: str


class EventLog:
    """Every event in order. Prints the first few of a kind, and after that every tenth, hundredth, ...

    So a run of a million steps prints a bounded number of lines about clipped steps. It keeps `MAX_EVENTS_OF_A_KIND`.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._counts: Counter[str] = Counter()

    def add(self, event: Event, loggers: Sequence[Logger]) -> None:
        """Stores an event and reports it in the terminal and in W&B (rank 0)."""
        self._counts[event.kind] += 1
        count = self._counts[event.kind]
        if count <= MAX_EVENTS_OF_A_KIND:
            self.events.append(event)
        if count <= 3 or count in (10, 100, 1000, 10_000):
            times = f" (number {count})" if count > 1 else ""
            report(f"LionGuard, step {event.step}, {event.kind}{times}: {event.message}; {event.remedy}.")
            self._publish(event if count == 1 else None, loggers)

    @rank_zero_only
    def _publish(self, alert: Event | None, loggers: Sequence[Logger]) -> None:
        """The table `guard/event_table`, and an alert, in every logger that has such things (W&B's has)."""
        for logger in loggers:
            log_table = getattr(logger, "log_table", None)  # WandbLogger's: wandb need not be installed
            if log_table is not None:
                rows = [[event.step, event.kind, event.remedy, event.message] for event in self.events]
                step = max(0, self.events[-1].step - 1)  # without one W&B takes step 0, as if the run began anew
                log_table("guard/event_table", columns=COLUMNS, data=rows, step=step)
                send = getattr(getattr(logger, "experiment", None), "alert", None)
                if alert is not None and send is not None:
                    send(title=f"LionGuard: {alert.kind}", text=f"{alert.message}; {alert.remedy}")

    def state_dict(self) -> list[dict[str, Any]]:
        return [asdict(event) for event in self.events]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        self.events = [Event(**event) for event in state]
        self._counts = Counter(event.kind for event in self.events)


@rank_zero_only
def report(message: str, level: int = logging.WARNING) -> None:
    log.log(level, message)


def metrics(monitors: Sequence[StepMonitor], reading: Reading) -> dict[str, float | Tensor]:
    """`guard/*` of the first optimizer after its latest reading, and the learning rates that the last step applied.

    What is not known is left out. A second optimizer's rates have `-1` after its name. Of more than four parameter
    groups the smallest and the largest rate are given.

    Args:
        monitors: of all optimizers.
        reading: of the first.
    """
    rules = monitors[0].rules
    values = {
        "warmup_factor": monitors[0].warmup.factor,
        "loss": reading.loss,
        "grad_norm": reading.grad_norm,
        "sign_flip_rate": reading.flip_rate,
        "clipped_steps": float(rules.clipped),
        "skipped_steps": float(rules.skipped),
        "bad_loss_steps": float(rules.bad_losses),
        "update_gradient_cosine": rules.averages.cosine.value,
        "moved_without_gradient": rules.averages.dead.value,
        "divergence_margin": rules.divergence.limit - rules.divergence.fast.value,
    }
    found: dict[str, float | Tensor] = {
        f"guard/{name}": value for name, value in values.items() if math.isfinite(value)
    }
    for number, hook in enumerate(monitor.warmup for monitor in monitors):
        label = f"lr/{type(hook.optimizer).__name__}" + (f"-{number}" if number else "")
        groups = enumerate(zip(hook.optimizer.param_groups, hook.applied, strict=False))
        rates = {str(group.get("name", index)): rate for index, (group, rate) in groups if rate is not None}
        if len(rates) > MAX_LOGGED_GROUPS:
            rates = {"min": min(rates.values()), "max": max(rates.values())}
        found |= {f"{label}/{name}": rate for name, rate in rates.items()}
    return found


class TelemetryReader:
    """Lets a Lion optimizer sample its `lion/*` figures every few steps, and reads them one step late.

    Args:
        optimizer: one whose telemetry is on already is left as it is.
        every: optimizer steps between samples; which steps are sampled does not depend on where a run was resumed.
    """

    def __init__(self, optimizer: Lion, every: int) -> None:
        self.optimizer, self.every = optimizer, every
        self._is_ours = not optimizer.telemetry_every
        self._readback, self._names = AsyncReadback(), list[str]()

    def _is_due(self, step: int) -> bool:
        return step % self.every == 1 % self.every

    def before_step(self, step: int) -> None:
        """Switches sampling on for the steps that are due."""
        if self._is_ours:
            self.optimizer.telemetry_every = int(self._is_due(step))

    def read(self, step: int) -> dict[str, float]:
        """Figures of the sampled step before, if there are any. To be called after every step."""
        values = self._readback.take(flush=True)
        arrived = {} if values is None else dict(zip(self._names, values, strict=True))
        if self._is_due(step) and (figures := self.optimizer.telemetry()):
            self._names = list(figures)
            self._readback.post(torch.stack([figure.float() for figure in figures.values()]))
        return arrived

    def remove(self) -> None:
        """Leaves the optimizer as it was found."""
        if self._is_ours:
            self.optimizer.telemetry_every = 0

    def state_dict(self) -> dict[str, Any]:
        return {"unread": self._readback.state_dict(), "names": list(self._names)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        names = list(state["names"])
        if any(len(values) != len(names) for values in state["unread"]):
            raise ValueError("telemetry has other names than values")
        self._readback.load_state_dict(state["unread"])
        self._names = names


class Trace:
    """Appends every step's reading to a CSV file (rank 0), from which thresholds can be tried without training.

    Args:
        path: made with its folder when the first rows are written; a resumed run goes on in the same file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._rows: list[list[Any]] = []

    @rank_zero_only
    def add(self, optimizer: int, reading: Reading) -> None:
        """Stores the reading of the optimizer with this number; every hundredth row writes."""
        values = asdict(reading)
        values["bad_ranks"] = " ".join(map(str, reading.bad_ranks))
        values["skipped"] = int(reading.skipped)
        self._rows.append([optimizer, *values.values()])
        if len(self._rows) >= FLUSH_EVERY_ROWS:
            self.flush()

    @rank_zero_only
    def flush(self) -> None:
        """Writes the rows that are still in memory."""
        if not self._rows:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(([TRACE_COLUMNS] if is_new else []) + self._rows)
        self._rows.clear()


def read_trace(path: str | Path) -> dict[int, list[Reading]]:
    """The readings of each optimizer in the order of their steps; of a step that was repeated, the last.

    Raises:
        ValueError: the file is not a trace, or one of another version.
    """
    found: dict[int, dict[int, Reading]] = {}
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames not in (TRACE_COLUMNS, TRACE_COLUMNS[:-1]):  # older ones have no rate
            wanted = f"its columns are {reader.fieldnames}, not {TRACE_COLUMNS}"
            raise ValueError(f"{path} is not a trace of this version of the guard: {wanted}")
        for row in reader:
            values: dict[str, Any] = {
                field.name: int(row[field.name]) if field.type is int else float(row.get(field.name) or math.nan)
                for field in fields(Reading)
                if field.type in (int, float)
            }
            ranks = tuple(int(rank) for rank in row["bad_ranks"].split())
            reading = Reading(**values, skipped=row["skipped"] == "1", bad_ranks=ranks)
            found.setdefault(int(row["optimizer"]), {})[reading.step] = reading
    return {optimizer: [rows[step] for step in sorted(rows)] for optimizer, rows in found.items()}
