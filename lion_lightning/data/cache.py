"""Prepared data on disk: made once, found again by what it was made from, never half-written."""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lion_lightning.errors import ConfigError

log = logging.getLogger(__name__)


def default_cache() -> Path:
    """`lion_lightning` in the user's cache folder (`XDG_CACHE_HOME`, or `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lion_lightning"


def cached_folder(cache: Path, key: str, write: Callable[[Path], None]) -> tuple[Path, bool]:
    """The folder of `cache` that belongs to `key`, filled by `write` if it is not there yet.

    It is written under another name and renamed at the end: a run that is killed leaves no half of it, and two runs
    that start together do not meet.

    Args:
        cache: made if missing.
        key: everything the content depends on, in one string.
        write: fills the empty folder it is given.

    Returns:
        The folder, and whether it was there already.
    """
    folder = cache / hashlib.blake2b(key.encode(), digest_size=10).hexdigest()
    if folder.is_dir():
        return folder, True
    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix="writing-", dir=cache))
    try:
        write(temporary)
        _publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder, False


def resumable_folder(cache: Path, key: str, write: Callable[[Path], None]) -> tuple[Path, bool]:
    """Like `cached_folder`, for what takes long: an interrupted `write` is called again and finds what it had written.

    Only one process at a time writes, the others wait for it: its lock ends with the process, however that ends.

    Args:
        cache: made if missing.
        key: everything the content depends on, in one string.
        write: fills the folder it is given, which may hold a part of it already. After a ConfigError nothing is kept.

    Returns:
        The folder, and whether it was there already.
    """
    name = hashlib.blake2b(key.encode(), digest_size=10).hexdigest()
    folder, unfinished = cache / name, cache / f"unfinished-{name}"
    if folder.is_dir():
        return folder, True
    (cache / "locks").mkdir(parents=True, exist_ok=True)
    with _locked(cache / "locks" / name):
        if folder.is_dir():
            return folder, True
        unfinished.mkdir(exist_ok=True)
        try:
            write(unfinished)
        except ConfigError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        os.rename(unfinished, folder)
    return folder, False


def _locked(path: Path) -> AbstractContextManager[Any]:
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another process that prepares the same data")
        return lock.acquire()


def _publish(temporary: Path, folder: Path) -> None:
    try:
        os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():
            raise
        log.info("%s was made by another run in the meantime", folder)


def release_freed_memory() -> None:
    """Return freed memory from glibc's malloc to the system; no effect with another C library.

    After preparing data malloc would keep most of it for the rest of the run, in pieces too small for large tensors.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
