"""Checkpoint files: whole or absent, with a checksum, of plain types, and read without running code.

A checkpoint `name.ckpt` counts only together with its marker `name.ckpt.json`, which holds its size and SHA-256 and is
written after it. A kill at any moment leaves the old pair, or a file whose marker is missing or does not match. A
sharded checkpoint is a folder of files with one marker for all of them.
"""

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path, PurePath
from typing import IO, Any

import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.types import _PATH
from omegaconf import DictConfig, ListConfig, OmegaConf
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from typing_extensions import override

from lion_lightning.training.checkpoint.sharded_state import read_whole, whole_checkpoint

TEMPORARY_PREFIX = ".writing-"
READ_BYTES = 2**22
NO_HARD_LINKS = (errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS, errno.EACCES)
COMPILED_PREFIX = "_orig_mod."
_PLAIN_TYPES = (str, bytes, bool, int, float, complex, type(None), torch.dtype, torch.device, torch.Size)
_PARTS = ("callbacks", "global_step", "loops", "lr_schedulers")  # Lightning passes over some that are missing
_STEP_FILE = re.compile(r"step-(\d+)\.ckpt")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


class InvalidCheckpoint(ValueError):
    """A checkpoint that is not what was written. The message names the file and what is wrong with it."""


class CheckpointFailed(RuntimeError):
    """A checkpoint could not be written. The earlier ones are as they were.

    `train.py` exits with `exit_code` when it meets one.
    """

    exit_code = 74  # EX_IOERR of sysexits.h


@dataclass(frozen=True)
class Marker:
    """What is known of a complete checkpoint."""

    global_step: int
    size: int  # bytes
    sha256: str  # hexadecimal


class DurableCheckpointIO(CheckpointIO):
    """Writes whole files of plain types, and reads with `weights_only=True` only.

    Attributes:
        model: the module that reads and writes; the names of a loaded `state_dict` become its own. None: names stay.
        error: the failure of a write. It is kept rather than raised: raised on one rank alone, it would leave the
            others waiting. `RunCheckpoint` raises it on all ranks.
        loaded: the checkpoint that was read last.
    """

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        self.error: Exception | None = None
        self.loaded: Path | None = None

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        self.attempt(lambda: write(checkpoint, Path(path)))

    def attempt(self, task: Callable[[], None]) -> None:
        """Run `task`; keep its failure in `error`."""
        try:
            task()
        except Exception as error:
            self.error = error

    @override
    def load_checkpoint(
        self, path: _PATH, map_location: Any | None = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read `path`, a file or the folder that FSDP2 writes; code is refused whatever `weights_only` says."""
        self.loaded = Path(refuse_url(path))
        checkpoint = whole_checkpoint(self.loaded) if self.loaded.is_dir() else load(self.loaded)
        require_parts(checkpoint, "state_dict", "optimizer_states")
        if self.model is not None:
            checkpoint["state_dict"] = with_names_of(checkpoint["state_dict"], self.model.state_dict())
        return checkpoint

    @override
    def remove_checkpoint(self, path: _PATH) -> None:
        remove_marked(Path(path))


def step_path(folder: Path, global_step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step-{global_step:09d}.ckpt"


def step_files(folder: Path) -> list[Path]:
    """The step files of `folder`, oldest first, including those of which only a marker is left; not verified."""
    names = {path.name.removesuffix(".json") for path in folder.glob("step-*")}
    return [folder / name for name in sorted(names) if _STEP_FILE.fullmatch(name)]


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of `folder` that is whole, and what is wrong with those that are newer.

    Step files come first; `last.ckpt` and `best.ckpt` are names of such files and are used where those are gone.
    """
    wrong: list[str] = []
    names = [folder / "last.ckpt", folder / "best.ckpt"]
    there = [name for name in names if name.exists() or marker_of(name).exists()]
    for path in [*reversed(step_files(folder)), *there]:
        try:
            verify(path)
        except InvalidCheckpoint as error:
            wrong.append(str(error))
        else:
            return path, wrong
    return None, wrong


def load(path: Path, mmap: bool = False) -> dict[str, Any]:
    """The checkpoint at `path`, onto the CPU.

    Args:
        path: a file.
        mmap: whether tensors are read when they are used.

    Raises:
        pickle.UnpicklingError: it is no checkpoint, or holds anything but plain types.
        OSError: it cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (OSError, MemoryError, pickle.UnpicklingError):
        raise
    except Exception as error:  # arbitrary bytes fail in arbitrary ways
        raise pickle.UnpicklingError(f"{path} is no checkpoint: {error}") from error


def require_parts(checkpoint: Mapping[str, Any], *more: str) -> None:
    """Raise KeyError for the first part that a run cannot resume without, or one of `more`, that is missing."""
    for name in (*more, *_PARTS):
        if name not in checkpoint:
            raise KeyError(name)


def refuse_url(path: _PATH) -> str:
    """`path`, unless it is a URL: remote files are not loaded. ValueError names it."""
    if _URL.match(str(path)):
        raise ValueError(f"{path}: a checkpoint must be a file on this machine, not a URL; download it first")
    return str(path)


def weights_of(path: Path) -> dict[str, Any]:
    """The model's state in the checkpoint at `path`, a file or the folder that FSDP2 writes, onto the CPU."""
    return with_names_of((read_whole(path, "state_dict") if path.is_dir() else load(path))["state_dict"])


def write(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint in plain types, and its marker.

    Args:
        checkpoint: with `state_dict` and `global_step`.
        path: where to; its folder is made if missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = plain(dict(checkpoint))
    kept["state_dict"] = with_names_of(kept["state_dict"])
    write_durably(path, lambda file: torch.save(kept, file))
    mark(path, int(kept["global_step"]))


def write_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """Write the `state` of a model, on the CPU, to `path` as safetensors."""
    # safetensors keeps no aliases such as tied embeddings: every tensor gets storage of its own. Nor sparse tensors.
    dense = {name: value if value.layout is torch.strided else value.to_dense() for name, value in state.items()}
    data = safetensors_bytes({name: tensor.contiguous().clone() for name, tensor in dense.items()})
    write_durably(path, lambda file: file.write(data))


def write_durably(path: Path, fill: Callable[[IO[bytes]], Any]) -> None:
    """Write all of a file or nothing: the old content stays until the new one is on the disk.

    Args:
        path: where to.
        fill: writes the content to the open file that it is given.

    Raises:
        OSError: the disk is full, or the folder cannot be written; `path` is as it was.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{path.name}")
    try:
        with open(temporary, "wb", buffering=READ_BYTES) as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def mark(path: Path, global_step: int) -> None:
    """Write the marker of the checkpoint at `path`: from now on the checkpoint counts.

    Args:
        path: a file or folder, complete and on the disk.
        global_step: optimizer steps completed.
    """
    marker = json.dumps(asdict(Marker(global_step, *_size_and_digest(path)))).encode()
    write_durably(marker_of(path), lambda file: file.write(marker))


def publish_folder(temporary: Path, path: Path, global_step: int) -> None:
    """Rename a complete folder to its final name and mark it, once every file in it is on the disk.

    Args:
        temporary: the folder, on the same file system.
        path: its final name; a checkpoint of that name is replaced.
        global_step: optimizer steps completed.
    """
    for file in _files(temporary):
        sync(file)
    remove_marked(path)
    os.replace(temporary, path)
    sync(path.parent)
    mark(path, global_step)


def marker_of(path: Path) -> Path:
    """Where the marker of the checkpoint at `path` is."""
    return path.with_name(path.name + ".json")


def read_marker(path: Path) -> Marker:
    """The marker of `path`, without reading the checkpoint itself; InvalidCheckpoint if it is missing or malformed."""
    try:
        return Marker(**json.loads(marker_of(path).read_bytes()))
    except FileNotFoundError:
        raise InvalidCheckpoint(f"{path}: no marker beside it, so it was never finished") from None
    except (ValueError, TypeError) as error:
        raise InvalidCheckpoint(f"{path}: its marker cannot be read ({error})") from error


def has_reached(path: Path, global_step: int) -> bool:
    """Whether the checkpoint at `path` is marked as one of this step or a later one."""
    return marker_of(path).is_file() and read_marker(path).global_step >= global_step


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


def link_marked(source: Path, target: Path) -> None:
    """Make `target` another name of the checkpoint `source` and its marker; a copy where hard links are refused."""
    if source.is_dir():
        marker_of(target).unlink(missing_ok=True)  # a folder cannot be replaced in one step
    for old, new in ((source, target), (marker_of(source), marker_of(target))):
        temporary = new.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{new.name}")
        try:
            if old.is_dir():
                shutil.copytree(old, temporary, copy_function=_link_or_copy)
            else:
                _link_or_copy(old, temporary)
            if new.is_dir():
                shutil.rmtree(new)
            os.replace(temporary, new)
        finally:
            _remove(temporary)  # still there if both names were the same file already
    sync(target.parent)


def _link_or_copy(old: str | Path, new: str | Path) -> None:
    try:
        os.link(old, new)
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        with open(old, "rb") as source, open(new, "wb") as target:
            shutil.copyfileobj(source, target, READ_BYTES)
            os.fsync(target.fileno())


def remove_marked(path: Path) -> None:
    """Remove a checkpoint, its marker first, so that a half-removed one does not count."""
    marker_of(path).unlink(missing_ok=True)
    _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sweep_temporaries(folder: Path) -> None:
    """Remove the partial files of a killed process."""
    for left in folder.glob(f"{TEMPORARY_PREFIX}*"):
        _remove(left)


def sync(path: Path) -> None:
    """Make a file, or the renames in a folder, survive a power cut; Windows journals renames itself."""
    if os.name == "nt":  # cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def plain(value: Any, name: str = "checkpoint") -> Any:
    """Convert to types that `torch.load(weights_only=True)` reads back.

    Paths become strings, numpy scalars numbers, numpy arrays tensors, OmegaConf nodes dicts and lists, subclasses of
    tensor plain tensors. Other objects among a module's hyperparameters become their `repr`.

    Args:
        value: anything a checkpoint holds.
        name: where it is, for the message of the error.

    Raises:
        TypeError: another type; the message says where it is.
    """
    if type(value) in _PLAIN_TYPES:
        return value
    if isinstance(value, Tensor):
        if hasattr(value, "full_tensor"):
            raise TypeError(f"{name} is sharded; gather it first")
        return value.detach() if type(value) is Tensor else value.detach().as_subclass(Tensor)
    if isinstance(value, Enum):
        return plain(value.value, name)
    if isinstance(value, DictConfig | ListConfig):
        return plain(OmegaConf.to_container(value, resolve=True), name)
    if isinstance(value, Mapping):
        pairs = {plain(key, f"{name}'s key"): plain(item, f"{name}[{key!r}]") for key, item in value.items()}
        if not isinstance(value, OrderedDict):
            return pairs
        ordered = OrderedDict(pairs)
        ordered.__dict__.update(plain(value.__dict__, f"{name}.__dict__"))  # a state dict's versions
        return ordered
    if isinstance(value, list | tuple | set | frozenset):
        items = [plain(item, f"{name}[{index}]") for index, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items if isinstance(value, list) else set(items)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, PurePath):
        return str(value)
    if "['hyper_parameters']" in name:  # Lightning's key for what a module was made from: information for people
        return repr(value)
    raise TypeError(f"{name} is a {type(value).__module__}.{type(value).__qualname__}, which no checkpoint can keep")


def with_names_of(state: Mapping[str, Any], names: Iterable[str] = ()) -> dict[str, Any]:
    """A model's state under the names that it has when nothing is compiled.

    Args:
        state: of a model that may be compiled.
        names: those of another model, which may be compiled; they are used instead.
    """
    wanted = {name.replace(COMPILED_PREFIX, ""): name for name in names}
    plain_names = (name.replace(COMPILED_PREFIX, "") for name in state)
    renamed = OrderedDict(zip((wanted.get(name, name) for name in plain_names), state.values(), strict=True))
    renamed.__dict__.update(getattr(state, "__dict__", {}))  # a state dict's versions
    return renamed
