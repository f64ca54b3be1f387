"""Results of tuning: a settings file with its evidence, and the heat map of learning rate and decay."""

import csv
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from lion_lightning.commands.tune_spaces import WARM_UP, rounded, settings_of
from lion_lightning.tracking.compare import Mode

LINE_WIDTH = 118
NEAR_THE_BEST = 0.05  # relative distance, of the error where more is better
Cells = Mapping[tuple[float, float], float]
LABEL = {"boxstyle": "round,pad=0.15", "facecolor": (0, 0, 0, 0.45), "edgecolor": "none"}
COMMENTS = {
    "lr": "peak learning rate",
    "weight_decay": "decoupled; coupled for sgd",
    "betas": "update direction or first moment, momentum or second moment",
    "momentum": "weight of the old momentum",
    "beta2_decay": "exponent of the second moment's decay",
    "alpha_0": "relative size of a step",
    "q": "larger is less decay",
}


def tuned_file(params: Mapping[str, Any], max_steps: int, evidence: str) -> str:
    """The YAML of conf/tuned.

    Args:
        params: The values of a trial, by key.
        max_steps: Optimizer steps of the trial.
        evidence: What was tried and by which command; becomes a comment.
    """
    lines = ["# @package _global_", *(f"# {line}" for line in textwrap.wrap(evidence, LINE_WIDTH)), "optim:"]
    settings = rounded(settings_of(params, max_steps))
    for key, value in settings.items():
        if key.startswith("optim."):
            name = key.removeprefix("optim.")
            written = f"{value:g}" if isinstance(value, float) else str(value).replace(",", ", ")
            lines.append(f"  {name}: {written}".ljust(26) + f"# {COMMENTS[name]}")
    if WARM_UP in params:
        lines += ["guard:", f"  warmup_steps: {rounded(params)[WARM_UP]}".ljust(26) + "# share of the run"]
    return "\n".join(lines) + "\n"


def write_trials(trials: Sequence[FrozenTrial], file: Path) -> None:
    """A CSV file with a row for each trial: its number, its value, whether it was ended early, and its settings."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    rows = (
        [trial.number, trial.value, trial.state == TrialState.PRUNED, *(trial.params.get(key) for key in keys)]
        for trial in trials
    )
    with file.open("w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows([["trial", "value", "ended_early", *keys], *rows])


def flatness(cells: Cells, mode: Mode) -> tuple[float, float]:
    """The share of cells near the best one, and the distance that counts as near.

    Args:
        cells: Values by learning rate and decay. The share depends on the ranges that they cover.
        mode: Whether less (`min`) or more (`max`) is better.
    """
    values = np.array(list(cells.values()))
    finite = values[np.isfinite(values)]
    if not finite.size:
        return math.nan, math.nan
    best = finite.max() if mode == "max" else finite.min()
    reach = NEAR_THE_BEST * (1 - best if mode == "max" and best <= 1 else abs(best))
    near = values >= best - reach if mode == "max" else values <= best + reach
    return float(near.mean()), float(reach)


def draw_heat_map(
    results: Mapping[str, Cells], metric: str, mode: Mode, planes: Mapping[str, tuple[str, str]], file: Path
) -> None:
    """Draw one panel per optimizer with a common colour scale; the best cell is framed, a diverged one is white.

    Args:
        results: Cells by optimizer.
        metric: Name of their values.
        mode: Whether less (`min`) or more (`max`) is better.
        planes: The keys of the two axes, by optimizer.
        file: The PNG.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    finite = [value for cells in results.values() for value in cells.values() if math.isfinite(value)]
    # The worst fifth shares a colour, so that nearly diverged cells do not compress the scale of the others.
    low, high = np.quantile(finite, (0.2, 1.0) if mode == "max" else (0.0, 0.8))
    figure = Figure(figsize=(1.5 + 3.6 * len(results), 3.6), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)
    for axes, (optim, cells) in zip(panels[0], results.items(), strict=True):
        rates, decays = (sorted({cell[place] for cell in cells}) for place in (0, 1))
        table = np.array([[cells.get((rate, decay), math.nan) for rate in rates] for decay in decays])
        table[~np.isfinite(table)] = math.nan
        image = axes.imshow(
            table, origin="lower", aspect="auto", vmin=low, vmax=high, cmap="viridis" if mode == "max" else "viridis_r"
        )
        for (row, column), value in np.ndenumerate(table):
            text = f"{value:.3f}" if math.isfinite(value) else "div."
            axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color="white", bbox=LABEL)
        if np.isfinite(table).any():
            best = np.nanargmax(table) if mode == "max" else np.nanargmin(table)
            y, x = np.unravel_index(best, table.shape)
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=1.5))
        axes.set_xticks(range(len(rates)), [f"{rate:.2g}" for rate in rates], rotation=45, fontsize=7)
        axes.set_yticks(range(len(decays)), [f"{decay:.2g}" for decay in decays], fontsize=7)
        rate, decay = (key.removeprefix("optim.").replace("_", " ") for key in planes[optim])
        axes.set(title=optim, xlabel=rate, ylabel=decay)
    figure.suptitle(f"{metric} of each trial ({'more' if mode == 'max' else 'less'} is better, the best is framed)")
    figure.colorbar(image, ax=panels[0].tolist(), label=metric)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, bbox_inches="tight")
