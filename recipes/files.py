"""Files and errors of data from outside, for every recipe."""

from collections.abc import Iterable
from pathlib import Path

from lion_lightning.errors import ConfigError

SHOWN_CHARACTERS = 300  # of another library's error message


def fingerprint_of(files: Iterable[Path]) -> str:
    """Names, sizes and modification times of `files`, links resolved."""
    stats = ((file.resolve(), file.stat()) for file in files)
    return " ".join(f"{file}:{stat.st_size}:{stat.st_mtime_ns}" for file, stat in stats)


def existing_file(path: str, setting: str, suffixes: Iterable[str]) -> Path:
    """The file at `path`, resolved.

    Args:
        path: given by the user.
        setting: the setting that gave it, for error messages.
        suffixes: endings that can be read, in lower case with the dot.

    Raises:
        ConfigError: there is no file, or it has another ending.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"{setting}={path}: there is no such file or folder")
    if file.suffix.lower() not in suffixes:
        raise ConfigError(f"{setting}={path} must be a file of {', '.join(suffixes)}")
    return file.resolve()


def check_fraction(fraction: float) -> float:
    """`fraction`, if it is a possible `data.val_fraction`; else ConfigError."""
    if not 0 < fraction < 1:
        raise ConfigError(f"data.val_fraction must be between 0 and 1, got {fraction}")
    return fraction


def one_line(error: BaseException) -> str:
    """The message of `error` on one line, shortened."""
    return " ".join(str(error).split())[:SHOWN_CHARACTERS]
