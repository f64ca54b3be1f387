"""The ranges that `lion-tune` searches, per optimizer and equally wide for all.

Learning rates span two decades around the usual values for small models, Lion's half a decade below AdamW's. The decay
is searched as a time scale, the share of the run over which a weight forgets, 1 / (lr * weight_decay) steps (Wang and
Aitchison, 2024, arXiv:2405.13698; Bergsma et al., 2025, arXiv:2505.13738): equal shares decay equally much at any
learning rate. Keys are Hydra's, except `decay_time` and `warm_up`, which are shares of the run.

An end of a range is not a limit: a search moves it outwards while its best trial lies near it (`Space.around`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import optuna

WARM_UP, DECAY_TIME = "warm_up", "decay_time"
GRID_LR, GRID_DECAY = 6, 4
SIGNIFICANT_DIGITS = 3
EDGE = 0.1  # of a range, in the logarithm, at either end
WIDENING = 0.25  # of a range, in the logarithm, added at the end where the best trial lies


@dataclass(frozen=True)
class Range:
    """An interval that is searched evenly in the logarithm.

    Attributes:
        most: What `high` cannot exceed.
    """

    low: float
    high: float
    most: float = math.inf

    def points(self, count: int) -> list[float]:
        """`count` values from low to high, both included."""
        return [min(self.high, max(self.low, float(f"{x:.4g}"))) for x in np.geomspace(self.low, self.high, count)]

    def around(self, best: float) -> "Range":
        """This interval, with an end moved outwards until `best` is not near it, or `high` is at its most."""
        wide = self
        while wide.position(best) < EDGE:
            wide = replace(wide, low=wide.low * (wide.low / wide.high) ** WIDENING)
        while wide.position(best) > 1 - EDGE and wide.high < wide.most:
            wide = replace(wide, high=min(wide.most, wide.high * (wide.high / wide.low) ** WIDENING))
        return wide

    def position(self, value: float) -> float:
        """Where a value lies in the logarithm: 0 at the lower end, 1 at the upper."""
        return math.log(value / self.low) / math.log(self.high / self.low)


@dataclass(frozen=True)
class Space:
    """The ranges of one optimizer.

    Attributes:
        ranges: Numeric keys; the first two, learning rate and decay or their equivalents, are the axes of the heat map.
        choices: Keys with a list of values.
        published: Settings of a publication, with `optim.weight_decay`; None if there are none.
    """

    ranges: Mapping[str, Range]
    choices: Mapping[str, tuple[str, ...]]
    published: Mapping[str, Any] | None = None

    @property
    def plane(self) -> tuple[str, str]:
        """The keys of the heat map's axes."""
        rate, decay = list(self.ranges)[:2]
        return rate, decay

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """Values for every key, chosen by the study's sampler."""
        numbers = {key: trial.suggest_float(key, span.low, span.high, log=True) for key, span in self.ranges.items()}
        return {**numbers, **{key: trial.suggest_categorical(key, values) for key, values in self.choices.items()}}

    def published_trial(self, max_steps: int) -> dict[str, Any]:
        """The published settings as the values of a trial.

        Args:
            max_steps: of the run.

        Returns:
            Empty if there are none, or if the run is so short that their decay would be outside its range.
        """
        if self.published is None:
            return {}
        params = dict(self.published)
        time = 1.0 / (params["optim.lr"] * params.pop("optim.weight_decay") * max_steps)
        span = self.ranges[DECAY_TIME]
        return {**params, DECAY_TIME: time} if span.low <= time <= span.high else {}

    def around(self, best: Mapping[str, Any]) -> "Space":
        """This space, with its ranges widened where the best values lie near an end; see `Range.around`."""
        return replace(self, ranges={key: span.around(best[key]) for key, span in self.ranges.items()})

    def grid(self) -> list[dict[str, float]]:
        """The cells of the heat map, in the order they are tried."""
        rate, decay = self.plane
        return [
            {rate: x, decay: y}
            for x in self.ranges[rate].points(GRID_LR)
            for y in self.ranges[decay].points(GRID_DECAY)
        ]

    def describe(self) -> str:
        """The ranges in one line."""
        spans = [f"{short(key)} {span.low:g} to {span.high:g}" for key, span in self.ranges.items()]
        return ", ".join([*spans, *(f"{short(key)} {' or '.join(values)}" for key, values in self.choices.items())])


def short(key: str) -> str:
    """A key in words."""
    return key.removeprefix("optim.").replace("_", " ")


_DECAY, _WARM = Range(0.03, 30), Range(0.03, 0.3, most=0.4)
_LIONS_PAIRS = ("[0.9,0.9]", "[0.9,0.95]", "[0.9,0.99]", "[0.95,0.98]")


def _space(low: float, key: str, choices: tuple[str, ...], published: Mapping[str, Any] | None = None) -> Space:
    """Learning rates from `low` on over two decades, the usual ranges of decay and warm-up, and one choice."""
    ranges = {"optim.lr": Range(low, 100 * low), DECAY_TIME: _DECAY, WARM_UP: _WARM}
    return Space(ranges, {f"optim.{key}": choices}, published)


def _wen(lr: float, weight_decay: float, betas: str) -> dict[str, Any]:
    """The settings of Wen et al. (2025, arXiv:2509.02046) for 130 M parameters, with a warm-up of 20 % of the run.

    Read in github.com/marin-community/marin, experiments/optimizer_sweep/Analysis/PhaseI/tex (1x Chinchilla data). The
    runs there warm up over 2,000 steps.
    """
    return {"optim.lr": lr, "optim.weight_decay": weight_decay, WARM_UP: 0.2, "optim.betas": betas}


SPACES: Mapping[str, Space] = MappingProxyType({
    "lion": _space(1e-4, "betas", _LIONS_PAIRS, _wen(2e-3, 0.7, "[0.9,0.95]")),
    "adamw": _space(
        3e-4, "betas", ("[0.9,0.95]", "[0.9,0.98]", "[0.9,0.99]", "[0.9,0.999]"), _wen(8e-3, 0.1, "[0.9,0.98]")
    ),
    "signum": _space(1e-4, "momentum", ("0.8", "0.9", "0.95", "0.99")),
    "adafactor": _space(1e-3, "beta2_decay", ("-0.5", "-0.65", "-0.8", "-1.0")),
    "muon": _space(3e-4, "momentum", ("0.8", "0.9", "0.95", "0.98")),
    "sgd": _space(1e-2, "momentum", ("0.8", "0.9", "0.95", "0.99")),
    "lion_amos": Space(
        {"optim.alpha_0": Range(3e-4, 3e-2), "optim.q": Range(3e-2, 30), WARM_UP: _WARM},
        {"optim.betas": _LIONS_PAIRS},
    ),
})  # fmt: skip


def space_around(settings: Mapping[str, Any]) -> Space:
    """The ranges of an optimizer without an entry in `SPACES`: two decades of learning rates around its own.

    Args:
        settings: Of its file. Without `weight_decay` there is no decay to search.

    Raises:
        ValueError: no learning rate to search.
    """
    if not isinstance(settings.get("lr"), int | float):
        raise ValueError(f"--optim {settings.get('name')}: its file has no number as lr, which a search begins from")
    rate, decay = float(settings["lr"]), {DECAY_TIME: _DECAY} if "weight_decay" in settings else {}
    return Space({"optim.lr": Range(rate / 10, rate * 10), **decay, WARM_UP: _WARM}, {})


def rounded(params: Mapping[str, Any]) -> dict[str, Any]:
    """The values with three significant digits."""
    return {
        key: float(f"{value:.{SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value
        for key, value in params.items()
    }


def settings_of(params: Mapping[str, Any], max_steps: int) -> dict[str, Any]:
    """Hydra's keys and values for those of a trial, the decay in place of its time scale.

    Args:
        params: The values of a trial.
        max_steps: Optimizer steps of the run.
    """
    settings = dict(params)
    if DECAY_TIME in settings:
        settings["optim.weight_decay"] = 1.0 / (settings["optim.lr"] * settings.pop(DECAY_TIME) * max_steps)
    if WARM_UP in settings:
        settings["guard.warmup_steps"] = round(settings.pop(WARM_UP) * max_steps)
    return settings


def untried(best: Mapping[str, Any], tried: list[Mapping[str, Any]], space: Space) -> dict[str, Any]:
    """By key, a value that the search has missed: beyond the best one on a side on which no trial lies, or a choice.

    Args:
        best: The values of the best trial.
        tried: The values of all trials.
        space: The space of the search, around the best.
    """
    missed: dict[str, Any] = {}
    for key, choices in space.choices.items():
        if left := [value for value in choices if value not in {params[key] for params in tried}]:
            missed[key] = left[0]
    for key, span in space.ranges.items():
        step = (span.high / span.low) ** EDGE
        values = [params[key] for params in tried]
        if best[key] >= max(values) and best[key] < span.most:
            missed[key] = min(span.high, best[key] * step)
        elif best[key] <= min(values):
            missed[key] = max(span.low, best[key] / step)
    return missed
