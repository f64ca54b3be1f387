"""Medians of a moving window against `statistics` on Python's own list."""

import math
import random
import statistics

import pytest

from lion_lightning.guard.window import Window


@pytest.mark.parametrize("size", [1, 2, 3, 8, 31])
@pytest.mark.parametrize("kind", ["normal", "ties", "heavy"])
def test_median_and_spread_are_those_of_the_last_values(size, kind):
    dice = random.Random(f"{size} {kind}")
    draw = {
        "normal": lambda: dice.gauss(0, 1),
        "ties": lambda: float(dice.randint(0, 3)),
        "heavy": lambda: math.exp(dice.gauss(0, 4)),
    }[kind]
    window, everything = Window(size), []
    for _ in range(5 * size + 7):
        everything.append(draw())
        window.add(everything[-1])
        recent = everything[-size:]
        center = statistics.median_low(recent)
        assert window.values() == recent
        assert window.median() == pytest.approx(statistics.median(recent))
        assert window.spread() == (center, statistics.median_low([abs(value - center) for value in recent]))
    assert len(window) == size
    assert window.count == len(everything)


def test_an_empty_window_knows_nothing():
    window = Window(4)
    assert math.isnan(window.median())
    assert all(map(math.isnan, window.spread()))


@pytest.mark.parametrize("count", [0, 2, 4, 9])
def test_a_loaded_window_goes_on_as_the_old_one(count):
    old, new = Window(4), Window(4)
    for number in range(count):
        old.add(math.sin(number))
    new.load(old.values())
    for number in range(7):
        for window in (old, new):
            window.add(math.cos(number))
        assert (new.values(), new.median(), new.spread()) == (old.values(), old.median(), old.spread())
