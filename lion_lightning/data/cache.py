"""Prepared data on disk: made once, looked up by what it was made from, and never used half-written."""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from lion_lightning.errors import ConfigError

log = logging.getLogger(__name__)


def cache_at(folder: str | None = None) -> Path:
    """`folder`, by default `lion_lightning` in the user's cache folder (`XDG_CACHE_HOME`, or `~/.cache`)."""
    if folder:
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lion_lightning"


def cached_folder(cache: Path, key: str, write: Callable[[Path], None], resumable: bool = False) -> tuple[Path, bool]:
    """The folder of `cache` that belongs to `key`, filled by `write` if it does not exist yet.

    One process writes, under another name that is changed at the end; the others wait for it. Its lock ends with the
    process, however that ends, so a killed run leaves nothing that counts as complete.

    Args:
        cache: made if missing.
        key: everything the content depends on, in one string.
        write: fills the folder it is given.
        resumable: whether an interrupted `write` is called again on what it had written; else on an empty folder.

    Returns:
        The folder, and whether it existed already.
    """
    name = hashlib.blake2b(key.encode(), digest_size=10).hexdigest()
    folder, unfinished = cache / name, cache / f"unfinished-{name}"
    if folder.is_dir():
        return folder, True
    (cache / "locks").mkdir(parents=True, exist_ok=True)
    lock = FileLock(cache / "locks" / name)
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another process that prepares the same data")
        held = lock.acquire()
    with held:
        if folder.is_dir():
            return folder, True
        if not resumable:
            shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(exist_ok=True)
        try:
            write(unfinished)
        except Exception as error:
            if not resumable or isinstance(error, ConfigError):
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
        os.rename(unfinished, folder)
    return folder, False


def release_freed_memory() -> None:
    """Return what malloc holds after preparing data, such as training a tokenizer, to the system (glibc only).

    glibc would keep most of it for the rest of the run, in pieces too small for the tensors of the training.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
