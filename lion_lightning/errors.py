"""ConfigError: the run was asked for something that cannot work, and the message says what can."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

GROUPS = ("checkpoint", "data", "guard", "logger", "model", "optim", "recipe", "schedule", "trainer")
"""Of the configuration: what the name of a setting begins with."""


class ConfigError(ValueError):
    """A setting that cannot work. The message is one line: the setting, its value, and what is allowed.

    The command line prints it without a traceback and exits with status 2.

    Attributes:
        is_argument: whether it names an argument alone, to which `configuring` adds the setting that it came from.
    """

    is_argument = False


@contextmanager
def configuring(setting: str, errors: tuple[type[Exception], ...] = (ValueError, TypeError)) -> Iterator[None]:
    """Turn a constructor's complaint about a bad value into a ConfigError that names the `setting` it came from.

    Args:
        errors: what a complaint may be.
    """
    try:
        yield
    except ConfigError as error:
        if error.is_argument:
            raise ConfigError(f"{setting}: {error}") from error
        raise
    except errors as error:
        raise ConfigError(f"{setting}: {error}") from error


def check_number(name: str, value: Any, interval: str, *, whole: bool = False, or_null: bool = False) -> None:
    """Raise ConfigError unless the setting `name` has a number in `interval`. True and False are no numbers.

    Args:
        interval: such as `[0, 1)` or `(0, inf)`.
        whole: whether it must be an int.
        or_null: whether None is allowed too.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    is_inside = is_number and low <= value <= high
    if is_inside and (value != low or interval[0] == "[") and (value != high or interval[-1] == "]"):
        return
    if value is None and or_null:
        return
    words = {
        f"({low:g}, {high:g})": f"between {low:g} and {high:g}",
        f"({low:g}, inf)": f"above {low:g}",
        f"[{low:g}, inf)": f"of at least {low:g}" if whole else f"at least {low:g}",
    }
    allowed = words.get(interval, f"in {interval}")
    _refuse(name, f"{'a whole number ' * whole}{allowed}{' or null' * or_null}", value)


def check_flag(name: str, value: Any) -> None:
    """Raise ConfigError unless the setting `name` is true or false."""
    if not isinstance(value, bool):
        _refuse(name, "true or false", value)


def _refuse(name: str, allowed: str, value: Any) -> NoReturn:
    error = ConfigError(f"{name} must be {allowed}, got {value!r}")
    error.is_argument = name.partition(".")[0] not in GROUPS
    raise error
