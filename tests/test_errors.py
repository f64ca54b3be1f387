"""What a setting may be, and the one line that says so."""

import math
from typing import Any

import pytest

from lion_lightning.errors import ConfigError, check_flag, check_number, configuring


@pytest.mark.parametrize(
    ("interval", "inside", "outside", "allowed"),
    [
        ("[0, 1)", (0, 0.5, 0.999), (-0.1, 1, 1.5), "in [0, 1)"),
        ("(0, 1]", (0.1, 1), (0, -1, 1.1), "in (0, 1]"),
        ("(0, 1)", (0.5,), (0, 1), "between 0 and 1"),
        ("(0, inf)", (1e-9, 1e9), (0, -1, math.inf), "above 0"),
        ("[8, inf)", (8, 8.5), (7, math.inf), "at least 8"),
    ],
)
def test_a_number_is_in_its_interval(interval: str, inside: Any, outside: Any, allowed: str) -> None:
    for value in inside:
        check_number("x.y", value, interval)
    for value in (*outside, math.nan, True, "1", None, [1]):
        with pytest.raises(ConfigError) as error:
            check_number("x.y", value, interval)
        assert str(error.value) == f"x.y must be {allowed}, got {value!r}"


def test_a_whole_number_and_null() -> None:
    check_number("x", 3, "[1, inf)", whole=True)
    check_number("x", None, "[1, inf)", whole=True, or_null=True)
    with pytest.raises(ConfigError, match=r"^x must be a whole number of at least 1 or null, got 2\.0$"):
        check_number("x", 2.0, "[1, inf)", whole=True, or_null=True)


def test_a_flag_is_no_number() -> None:
    check_flag("x", False)
    with pytest.raises(ConfigError, match=r"^x must be true or false, got 0$"):
        check_flag("x", 0)


def test_an_argument_is_named_with_the_setting_that_it_came_from() -> None:
    for name, told in (("decay", "schedule: decay must be"), ("data.seed", "data.seed must be")):
        with pytest.raises(ConfigError) as error, configuring("schedule"):
            check_number(name, 2, "[0, 1]")
        assert str(error.value).startswith(told)
