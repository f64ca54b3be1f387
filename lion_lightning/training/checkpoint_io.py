"""How a run's checkpoints get to the disk and back: whole, marked, of plain types, at once or in the background."""

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning_utilities.core.apply_func import apply_to_collection
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from typing_extensions import override

from lion_lightning.training.durable import link_marked, remove_marked, write_durably, write_marked
from lion_lightning.training.plain import plain, with_names_of, without_compiled_prefix
from lion_lightning.training.sharded_state import whole_checkpoint

WEIGHTS_SUFFIX = ".safetensors"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


class CheckpointFailed(RuntimeError):
    """A checkpoint could not be written. The ones from before it are as they were.

    `train.py` exits with `exit_code` when it meets one.
    """

    exit_code = 74  # EX_IOERR of sysexits.h


@dataclass(frozen=True)
class Placement:
    """What goes with a checkpoint file, in this order once the file is safe on the disk.

    Attributes:
        links: further names of it.
        weights: names of it beside which the weights alone are written as safetensors.
        remove: older checkpoints that it replaces.
    """

    links: tuple[Path, ...] = ()
    weights: tuple[Path, ...] = ()
    remove: tuple[Path, ...] = field(default=())


class DurableCheckpointIO(CheckpointIO):
    """Writes with `durable`, in `plain` types, and reads with `weights_only=True` and nothing else.

    A failure to write is kept in `error` and not raised here, where one rank alone would meet it and the others wait
    for it for ever; whoever saves asks for it (`RunCheckpoint` does, on all ranks).

    Args:
        background: copy the state, and let a thread write it while training goes on. One write at a time: the next
            save waits for it.
    """

    def __init__(self, background: bool = False) -> None:
        self.error: Exception | None = None
        self.model: nn.Module | None = None
        self._executor = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._pending: Future[None] | None = None

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path`, then do what the `Placement` in `storage_options` says."""
        self.wait()
        placement = storage_options or Placement()
        state = copied_to_cpu(checkpoint) if self.background else checkpoint
        self.run(lambda: write(state, Path(path), placement))

    @property
    def background(self) -> bool:
        """Whether a thread writes while training goes on."""
        return self._executor is not None

    def run(self, task: Callable[[], None]) -> None:
        """Do `task`, at once or in the background; its failure is kept in `error`."""
        self.wait()
        if self._executor is None:
            self.attempt(task)
        else:
            self._pending = self._executor.submit(self.attempt, task)

    def wait(self) -> None:
        """Return when nothing is being written any more."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def attempt(self, task: Callable[[], None]) -> None:
        """Do `task` here and now; its failure is kept in `error`."""
        try:
            task()
        except Exception as error:
            self.error = error

    @override
    def load_checkpoint(
        self, path: _PATH, map_location: Any | None = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read `path`, a file or the folder that FSDP2 writes; code is refused whatever `weights_only` says."""
        file = Path(refuse_url(path))
        checkpoint = whole_checkpoint(file) if file.is_dir() else load(file)
        if self.model is not None:
            checkpoint["state_dict"] = with_names_of(checkpoint["state_dict"], self.model.state_dict())
        return checkpoint

    @override
    def remove_checkpoint(self, path: _PATH) -> None:
        remove_marked(Path(path))

    @override
    def teardown(self) -> None:
        self.wait()


def write(checkpoint: Mapping[str, Any], path: Path, placement: Placement) -> None:
    """Write `checkpoint` to `path` in plain types, then its links and weights, and remove what it replaces."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = plain(dict(checkpoint))
    kept["state_dict"] = without_compiled_prefix(kept["state_dict"])
    write_marked(path, _saving(kept), int(kept["global_step"]))
    write_weights(kept["state_dict"], placement.weights)
    for link in placement.links:
        link_marked(path, link)
    for old in placement.remove:
        remove_marked(old)


def write_weights(state: Mapping[str, Any], beside: Sequence[Path]) -> None:
    """Write the weights alone as safetensors, beside each of these names of a checkpoint."""
    for name in beside:
        data = safetensors_bytes(_unshared(without_compiled_prefix(state)))
        write_durably(name.with_suffix(WEIGHTS_SUFFIX), _writing(data))


def load(path: Path) -> dict[str, Any]:
    """The checkpoint at `path`, onto the CPU.

    Raises:
        pickle.UnpicklingError: it holds anything but plain types.
    """
    return torch.load(path, map_location="cpu", weights_only=True)


def refuse_url(path: _PATH) -> str:
    """`path`, unless it is a URL: what a stranger serves is not loaded. ValueError names it."""
    if _URL.match(str(path)):
        raise ValueError(f"{path}: a checkpoint must be a file on this machine, not a URL; download it first")
    return str(path)


def _saving(checkpoint: Mapping[str, Any]) -> Callable[[IO[bytes]], None]:
    return lambda file: torch.save(checkpoint, file)


def _writing(data: bytes) -> Callable[[IO[bytes]], Any]:
    return lambda file: file.write(data)


def copied_to_cpu(state: Any) -> Any:
    """A copy of nested containers whose tensors are copied too."""
    return apply_to_collection(state, Tensor, _copy_to_cpu)


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _unshared(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of `state` on storage of their own: safetensors keeps no aliases such as tied embeddings."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
