"""Learning-rate schedules: plain functions from the optimizer step to a factor of the peak learning rate.

Each takes the run's length and gives a function for `torch.optim.lr_scheduler.LambdaLR`. None of them warms up: that is
`LionGuard`'s, for every optimizer and schedule alike.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

Factor: TypeAlias = Callable[[int], float]
Schedule: TypeAlias = Callable[[int], Factor]


def constant(total_steps: int) -> Factor:
    """The peak learning rate from start to end."""
    return lambda step: 1.0


def linear(total_steps: int, final: float = 0.0) -> Factor:
    """A straight line from 1 at step 0 to `final` at `total_steps`, and `final` from there on."""
    _check(total_steps, final)
    return lambda step: 1.0 - (1.0 - final) * min(1.0, step / total_steps)


def cosine(total_steps: int, final: float = 0.0) -> Factor:
    """Half a cosine from 1 at step 0 to `final` at `total_steps` (Loshchilov and Hutter, 2017, arXiv:1608.03983)."""
    _check(total_steps, final)
    return lambda step: final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / total_steps)))


def wsd(total_steps: int, decay: float = 0.2, final: float = 0.0) -> Factor:
    """Warm-up, stable, decay (Hu et al., 2024, arXiv:2404.06395): the peak, then a decay over the last steps.

    The decay follows `1 - sqrt` of its progress, which ends lower than a line (Hägele et al., 2024, arXiv:2405.18392).
    Runs of different lengths are equal until the shorter one decays, so a checkpoint of a long run from before that
    step is also one of the shorter run.

    Args:
        total_steps: Optimizer steps of the run.
        decay: Share of the steps that decay, above 0 and at most 1.
        final: Factor at `total_steps` and after it.

    Raises:
        ValueError: A value outside its range.
    """
    _check(total_steps, final)
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be above 0 and at most 1, got {decay}")
    stable_steps = total_steps - max(1, round(decay * total_steps))

    def factor(step: int) -> float:
        if step <= stable_steps:
            return 1.0
        return 1.0 - (1.0 - final) * math.sqrt(min(1.0, (step - stable_steps) / (total_steps - stable_steps)))

    return factor


def amos(total_steps: int, final: float = 0.1) -> Factor:
    """`1 / (kappa * step + 1)`, with kappa such that the factor is `final` at `total_steps`.

    The decay of the Amos optimizer (Tian and Parikh, 2022, arXiv:2210.11693); see `hyperparams.amos_groups`.
    """
    _check(total_steps, final)
    if final == 0:
        raise ValueError("final must be above 0 for the amos schedule, got 0")
    kappa = (1.0 / final - 1.0) / total_steps
    return lambda step: 1.0 / (kappa * step + 1.0)


def _check(total_steps: int, final: float) -> None:
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    if not 0 <= final <= 1:
        raise ValueError(f"final must be between 0 and 1, got {final}")
