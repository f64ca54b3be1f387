"""The ranges that `scripts/tune.py` searches, per optimizer and equally wide for all.

Learning rates span two and a half decades around the usual values for small models, decays three. Lion's rates are
half a decade below AdamW's and its decays a decade above (Chen et al., 2023, arXiv:2302.06675, section 5), so that the
ranges contain both optima. Keys are Hydra's, except `warm_up`, a share of the run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import optuna

WARM_UP = "warm_up"
GRID_LR, GRID_DECAY = 6, 4
SIGNIFICANT_DIGITS = 3


@dataclass(frozen=True)
class Range:
    """An interval that is searched evenly in the logarithm."""

    low: float
    high: float

    def points(self, count: int) -> list[float]:
        """`count` values from low to high, both included."""
        return [min(self.high, max(self.low, float(f"{x:.4g}"))) for x in np.geomspace(self.low, self.high, count)]


@dataclass(frozen=True)
class Space:
    """The ranges of one optimizer.

    Attributes:
        ranges: Numeric keys; the first two, learning rate and decay or their equivalents, are the axes of the heat map.
        choices: Keys with a list of values.
    """

    ranges: Mapping[str, Range]
    choices: Mapping[str, tuple[str, ...]]

    @property
    def plane(self) -> tuple[str, str]:
        """The keys of the heat map's axes."""
        rate, decay = list(self.ranges)[:2]
        return rate, decay

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """Values for every key, chosen by the study's sampler."""
        numbers = {key: trial.suggest_float(key, span.low, span.high, log=True) for key, span in self.ranges.items()}
        return {**numbers, **{key: trial.suggest_categorical(key, values) for key, values in self.choices.items()}}

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
        spans = [f"{_short(key)} {span.low:g} to {span.high:g}" for key, span in self.ranges.items()]
        return ", ".join([*spans, *(f"{_short(key)} {' or '.join(values)}" for key, values in self.choices.items())])


def _short(key: str) -> str:
    return key.removeprefix("optim.").replace("_", " ")


DEFAULT = "default"  # warm-up as the guard chooses it
_SHARES = ("default", "0.03", "0.2")
SPACES: Mapping[str, Space] = MappingProxyType({
    "lion": Space(
        {"optim.lr": Range(3e-5, 1e-2), "optim.weight_decay": Range(1e-2, 10)},
        {"optim.betas": ("[0.9,0.99]", "[0.95,0.98]", "[0.9,0.999]"), WARM_UP: _SHARES},
    ),
    "adamw": Space(
        {"optim.lr": Range(1e-4, 3e-2), "optim.weight_decay": Range(1e-3, 1)},
        {"optim.betas": ("[0.9,0.999]", "[0.9,0.98]", "[0.9,0.95]"), WARM_UP: _SHARES},
    ),
    "signum": Space(
        {"optim.lr": Range(3e-5, 1e-2), "optim.weight_decay": Range(1e-2, 10)},
        {"optim.momentum": ("0.9", "0.95", "0.99"), WARM_UP: _SHARES},
    ),
    "adafactor": Space(
        {"optim.lr": Range(1e-3, 3e-1), "optim.weight_decay": Range(1e-3, 1)},
        {"optim.beta2_decay": ("-0.8", "-0.5", "-1.0"), WARM_UP: _SHARES},
    ),
    "muon": Space(
        {"optim.lr": Range(1e-4, 3e-2), "optim.weight_decay": Range(1e-3, 1)},
        {"optim.momentum": ("0.9", "0.95", "0.98"), WARM_UP: _SHARES},
    ),
    "sgd": Space(
        {"optim.lr": Range(3e-3, 1), "optim.weight_decay": Range(1e-6, 1e-3)},
        {"optim.momentum": ("0.9", "0.95", "0.99"), WARM_UP: _SHARES},
    ),
    "lion_amos": Space(
        {"optim.alpha_0": Range(1e-4, 3e-2), "optim.q": Range(3e-2, 30)},
        {"optim.betas": ("[0.9,0.99]", "[0.95,0.98]", "[0.9,0.999]"), WARM_UP: _SHARES},
    ),
})  # fmt: skip


def rounded(params: Mapping[str, Any]) -> dict[str, Any]:
    """The values with three significant digits."""
    return {
        key: float(f"{value:.{SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value
        for key, value in params.items()
    }


def overrides_of(params: Mapping[str, Any]) -> list[str]:
    """Hydra overrides for the values of a trial, without the warm-up."""
    return [f"++{key}={value}" for key, value in params.items() if key != WARM_UP]


def warmup_steps(params: Mapping[str, Any], max_steps: int) -> int | None:
    """Optimizer steps of warm-up; None: the guard's default."""
    share = params.get(WARM_UP, DEFAULT)
    return None if share == DEFAULT else round(float(share) * max_steps)
