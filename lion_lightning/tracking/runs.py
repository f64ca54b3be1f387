"""A run as a comparison needs it: who it is, how it ended, and its curves against steps, data, time and energy."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

State = Literal["finished", "failed", "crashed", "running"]
# What a curve can be drawn against, by the metric that holds it; the optimizer step is in every row.
AXES: Mapping[str, str | None] = {
    "steps": None,
    "samples": "data/samples_seen",
    "tokens": "data/tokens_seen",
    "seconds": "perf/seconds",
    "energy": "perf/energy_kj",
}
STEP = "trainer/global_step"
GUARD_EVENTS = "guard/events"


@dataclass(frozen=True)
class Run:
    """One W&B run, from disk or from the server.

    Attributes:
        source: the folder or the address that it was read from.
        state: `finished`; `failed`, closed with another exit code than 0; `running`; or `crashed`, never closed.
        config: the nested configuration.
        history: a dictionary per logged row, in order; `trainer/global_step` counts from 0.
        created: when it started, ISO 8601; runs of one seed are told apart by it.
        hardware: processor and accelerators in words, empty where unknown.
    """

    source: str
    id: str
    name: str
    group: str
    state: State
    exit_code: int | None
    config: dict[str, Any]
    history: list[dict[str, Any]] = field(repr=False)
    created: str = ""
    hardware: str = ""

    def setting(self, key: str, default: Any = None) -> Any:
        """The value of a dotted key of the configuration: `setting("optim.lr")`."""
        node: Any = self.config
        for part in key.split("."):
            if not isinstance(node, Mapping) or part not in node:
                return default
            node = node[part]
        return node

    @property
    def seed(self) -> Any:
        """What keyed the run's randomness; None where the configuration has no `seed`."""
        return self.setting("seed")

    @cached_property
    def metrics(self) -> frozenset[str]:
        """Every name that was logged."""
        return frozenset(name for row in self.history for name in row)

    @property
    def last_step(self) -> int:
        """Optimizer steps up to the last logged row."""
        return max((_steps_of(row) for row in self.history), default=0)

    def last(self, metric: str) -> float | None:
        """The last finite value of `metric`, None where there is none."""
        return next((value for _, value in reversed(self._points(metric)) if math.isfinite(value)), None)

    def has_axis(self, axis: str) -> bool:
        """Whether the run logged what `axis` needs."""
        name = AXES[axis]
        return name is None or name in self.metrics

    def curve(self, metric: str, axis: str = "steps") -> tuple[np.ndarray, np.ndarray]:
        """Places on `axis` and the values of `metric` there; of one step the last value counts.

        The place of a row that lacks the axis (a validation) is interpolated between those that have it.
        """
        steps, values = self._arrays(metric)
        return self.place(steps, axis), values

    def place(self, steps: np.ndarray | Sequence[float], axis: str) -> np.ndarray:
        """Where on `axis` the optimizer steps `steps` lie. Past the last known place the run's mean rate goes on."""
        wanted = np.asarray(steps, dtype=float)
        name = AXES[axis]
        if name is None:
            return wanted
        steps, places = self._arrays(name)
        if not len(steps):
            return np.full_like(wanted, math.nan)
        at, values = np.append(0.0, steps), np.append(0.0, places)
        rate = values[-1] / at[-1] if at[-1] else 0.0
        return np.interp(wanted, at, values) + np.maximum(wanted - at[-1], 0) * rate

    def guard_steps(self) -> list[int]:
        """The optimizer steps at which the guard's count of events was seen to rise."""
        seen, steps = 0.0, []
        for step, events in self._points(GUARD_EVENTS):
            if events > seen:
                steps.append(step)
            seen = events
        return steps

    def _points(self, metric: str) -> list[tuple[int, float]]:
        return self._series.get(metric, [])

    def _arrays(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps in order and the last value of each, not to be written to; kept, as a report asks for them often."""
        if metric not in self._kept_arrays:
            points = dict(self._points(metric))
            steps = np.array(sorted(points), dtype=float)
            values = np.array([points[int(step)] for step in steps], dtype=float)
            for array in (steps, values):
                array.flags.writeable = False
            self._kept_arrays[metric] = steps, values
        return self._kept_arrays[metric]

    @cached_property
    def _kept_arrays(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {}

    @cached_property
    def _series(self) -> dict[str, list[tuple[int, float]]]:
        """Steps and values by metric: sorted out once, because a report asks for the same curves many times."""
        series: dict[str, list[tuple[int, float]]] = {}
        for row in self.history:
            step = _steps_of(row)
            for name, value in row.items():
                if _is_number(value):
                    series.setdefault(name, []).append((step, float(value)))
        return series


def _steps_of(row: Mapping[str, Any]) -> int:
    """Optimizer steps done at a row: Lightning's count starts at 0; W&B's own stands in for a foreign run."""
    return int(row.get(STEP, row.get("_step", 0))) + 1


def _is_number(value: Any) -> bool:
    """Numbers, and NaN or an infinity, which W&B's reader spells out."""
    return type(value) in (float, int) or (type(value) is str and value in ("NaN", "Infinity", "-Infinity"))
