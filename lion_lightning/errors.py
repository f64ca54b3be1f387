"""ConfigError: the run was asked for something that cannot work, and the message says what can."""

from collections.abc import Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """A setting that cannot work. The message is one line: the setting, its value, and what is allowed.

    The command line prints it without a traceback and exits with status 2.
    """


@contextmanager
def configuring(setting: str) -> Iterator[None]:
    """Turn a constructor's complaint about a bad value into a ConfigError that names the `setting` it came from."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{setting}: {error}") from error
