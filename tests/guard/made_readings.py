"""Readings of runs that never were: what the rules are tested on."""

import math
import random
from collections.abc import Iterator
from dataclasses import replace

from lion_lightning.guard.reading import Reading


def healthy(seed: int, steps: int) -> Iterator[Reading]:
    """A run that learns: the loss falls from 3 to 1 and is noisy, signs flip at a rate around 0.2."""
    dice = random.Random(seed)
    for step in range(1, steps + 1):
        loss = 1 + 2 * math.exp(-step / 150) + dice.gauss(0, 0.05)
        yield Reading(
            loss=loss,
            backward_loss=loss,
            grad_norm=math.exp(dice.gauss(0, 0.2)),
            norm_z=dice.gauss(0, 1),
            loss_z=dice.gauss(0, 1),
            flip_rate=min(1.0, max(0.01, dice.gauss(0.2, 0.03))),
            cosine=dice.gauss(0.15, 0.02),
            dead=max(0.0, dice.gauss(0.01, 0.01)),
            step=step,
            batch_size=64,
        )


def troubled(seed: int, steps: int) -> Iterator[Reading]:
    """The same with everything that can go wrong, in stretches of random length."""
    dice = random.Random(seed + 1000)
    trouble, left = "none", 60
    for reading in healthy(seed, steps):
        if left == 0:
            trouble = dice.choice(["none", "none", "frozen", "high", "clipped", "bad_loss", "nan", "dull"])
            left = dice.randint(1, 45)
        left -= 1
        yield _troubled(reading, trouble)


def _troubled(reading: Reading, trouble: str) -> Reading:
    changes = {
        "none": {},
        "frozen": {"flip_rate": 0.004},
        "high": {"loss": reading.loss + 3.0},
        "clipped": {"factor": 4.0, "grad_norm": 12.0, "norm_z": 20.0},
        "bad_loss": {"skipped": True, "loss_z": 30.0},
        "nan": {"grad_norm": math.nan, "skipped": True, "loss": math.nan, "flip_rate": math.nan, "bad_ranks": (1,)},
        "dull": {"cosine": 0.01, "dead": 0.5},
    }
    return replace(reading, **changes[trouble])
