"""Files that are whole or not there: written beside their place, synced, renamed, and marked complete last.

A checkpoint `name.ckpt` counts only together with its marker `name.ckpt.json`, which holds its size and SHA-256 and is
written after it. A kill at any moment leaves the old pair, or a file whose marker is missing or does not fit. A sharded
checkpoint is a folder of files; it has one marker for all of them.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

MARKER_SUFFIX = ".json"
TEMPORARY_PREFIX = ".writing-"
READ_BYTES = 2**22
NO_HARD_LINKS = (errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS, errno.EACCES)


class InvalidCheckpoint(ValueError):
    """A checkpoint that is not what was written. The message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Marker:
    """What is known of a complete checkpoint.

    Attributes:
        global_step: optimizer steps it has behind it.
        size: bytes.
        sha256: hexadecimal digest of the whole file.
    """

    global_step: int
    size: int
    sha256: str


class HashedFile:
    """A file open for writing that hashes and counts what passes through; enough of a file for `torch.save`."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self.size = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self._file.write(data)
        self.size += memoryview(data).nbytes
        return memoryview(data).nbytes

    def flush(self) -> None:
        self._file.flush()

    def digest(self) -> str:
        return self._hash.hexdigest()


def marker_of(path: Path) -> Path:
    """Where the marker of the checkpoint at `path` is."""
    return path.with_name(path.name + MARKER_SUFFIX)


def write_durably(path: Path, write: Callable[[IO[bytes]], Any]) -> HashedFile:
    """Fill `path` by `write`, all of it or none: what was there before stays until the new file is on the disk.

    Raises:
        OSError: the disk is full, or the folder cannot be written; `path` is as it was.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{path.name}")
    try:
        with open(temporary, "wb", buffering=READ_BYTES) as file:
            hashed = HashedFile(file)
            write(cast(IO[bytes], hashed))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return hashed


def write_marked(path: Path, write: Callable[[IO[bytes]], Any], global_step: int) -> Marker:
    """`write_durably`, and then the marker: from now on the checkpoint counts."""
    hashed = write_durably(path, write)
    marker = Marker(global_step, hashed.size, hashed.digest())
    text = json.dumps(asdict(marker)).encode()
    write_durably(marker_of(path), lambda file: file.write(text))
    return marker


def publish_folder(temporary: Path, path: Path, global_step: int) -> Marker:
    """Give a folder that is filled its place and its marker, once every file in it is on the disk."""
    for file in _files(temporary):
        with open(file, "rb") as written:
            os.fsync(written.fileno())
    size, digest = _size_and_digest(temporary)
    remove_marked(path)
    os.replace(temporary, path)
    sync_folder(path.parent)
    marker = Marker(global_step, size, digest)
    text = json.dumps(asdict(marker)).encode()
    write_durably(marker_of(path), lambda file: file.write(text))
    return marker


def link_marked(source: Path, target: Path) -> None:
    """Make `target` another name of the checkpoint `source`, marker and all; a copy where there are no hard links."""
    if source.is_dir():
        marker_of(target).unlink(missing_ok=True)  # a folder cannot be replaced in one go
    for old, new in ((source, target), (marker_of(source), marker_of(target))):
        temporary = new.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{new.name}")
        try:
            _link_or_copy(old, temporary)
            if new.is_dir():
                shutil.rmtree(new)
            os.replace(temporary, new)
        finally:
            _remove(temporary)  # still there where both names were the same file already
    sync_folder(target.parent)


def _link_or_copy(old: Path, new: Path) -> None:
    if old.is_dir():
        new.mkdir()
        for file in _files(old):
            _link_or_copy(file, new / file.relative_to(old))
        return
    try:
        os.link(old, new)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        with open(old, "rb") as source, open(new, "wb") as target:
            shutil.copyfileobj(source, target, READ_BYTES)
            os.fsync(target.fileno())


def remove_marked(path: Path) -> None:
    """Remove a checkpoint, its marker first: what is half removed does not count."""
    marker_of(path).unlink(missing_ok=True)
    _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def verify(path: Path) -> Marker:
    """The marker of the checkpoint at `path`, if every byte is as it was written.

    Raises:
        InvalidCheckpoint: the file or its marker is missing, empty, cut short, or changed.
    """
    marker = read_marker(path)
    if not path.exists():
        raise InvalidCheckpoint(f"{path}: the file is missing")
    size = sum(file.stat().st_size for file in _files(path))
    if size != marker.size:
        raise InvalidCheckpoint(f"{path}: {size:,} bytes, but {marker.size:,} were written")
    if _size_and_digest(path)[1] != marker.sha256:
        raise InvalidCheckpoint(f"{path}: its bytes have changed since they were written")
    return marker


def _size_and_digest(path: Path) -> tuple[int, str]:
    """Bytes and SHA-256 of a file; of a folder, the digest of its files' names and digests."""
    if path.is_dir():
        parts = [(str(file.relative_to(path)), *_size_and_digest(file)) for file in _files(path)]
        return sum(size for _, size, _ in parts), hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return path.stat().st_size, digest.hexdigest()


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]


def read_marker(path: Path) -> Marker:
    """The marker of `path`, without a look at the file itself; InvalidCheckpoint if there is none that can be read."""
    try:
        return Marker(**json.loads(marker_of(path).read_bytes()))
    except FileNotFoundError:
        raise InvalidCheckpoint(f"{path}: no marker beside it, so it was never finished") from None
    except (ValueError, TypeError) as error:
        raise InvalidCheckpoint(f"{path}: its marker cannot be read ({error})") from error


def sweep_temporaries(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for left in folder.glob(f"{TEMPORARY_PREFIX}*"):
        _remove(left)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
