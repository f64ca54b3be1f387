"""A checkpoint that a run cannot go on from is told in one line: the file, what it lacks, and what to do."""

import pickle
import re
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from types import FrameType
from typing import Any

from lightning.pytorch import Callback

import lion_lightning
from lion_lightning.errors import ConfigError
from lion_lightning.training.progress_state import KEY

VERSION = "version"  # of lion_lightning, in our part of a checkpoint
PARTS = ("callbacks", "global_step", "loops", "lr_schedulers", KEY)
"""What a checkpoint must have, sharded or not; Lightning leaves out most of them where they are missing."""
COUNTED = {"optimizer_states": "optimizers", "lr_schedulers": "schedules"}
WAY_OUT = (
    f"go on with the settings and the version of lion_lightning that wrote it (this is {lion_lightning.__version__}), "
    "or start afresh with resume=null in another run_dir="
)
_FAILURES = (LookupError, TypeError, ValueError, AttributeError, EOFError, RuntimeError, pickle.UnpicklingError)
# Functions of Lightning, of ours and of torch in which state is taken over from a checkpoint.
_RESTORING = {"restore_callbacks", "restore_training_state", "load_checkpoint", "load_state_dict", "_restore"}
_TRAINING = "advance"  # of Lightning's loops: the guard also loads state, when it rewinds
_MISFITS = re.compile(
    r"Error\(s\) in loading state_dict|Missing key|[Ss]ize mismatch|no place in the metadata|Weights only load"
)
_MAX_CHARACTERS = 300


class DoesNotFit(ValueError):
    """A checkpoint of another run than the one that is to go on from it."""


@contextmanager
def restoring(path: Path | None) -> Iterator[None]:
    """Turn what goes wrong while state is taken over from the checkpoint at `path` into one line.

    Args:
        path: None where a run starts afresh; then nothing is changed.

    Raises:
        ConfigError: names the file, what of it is missing or does not fit, and the way out.
    """
    try:
        yield
    except ConfigError:
        raise
    except _FAILURES as error:
        frames = [frame for frame, _ in walk_tb(error.__traceback__)]
        names = {frame.f_code.co_name for frame in frames}
        is_restoring = bool(names & _RESTORING) and _TRAINING not in names and not _is_of_the_machine(error)
        if path is None or not (is_restoring or isinstance(error, DoesNotFit)):
            raise
        raise ConfigError(f"resume={path}: {_told(error, frames)}; {WAY_OUT}") from error


def check_parts(checkpoint: Mapping[str, Any], sharded: bool) -> None:
    """KeyError for the first part that a checkpoint of a run has and this one does not.

    Args:
        checkpoint: as it was read.
        sharded: whether its weights and optimizers are in shards, and so not in it.
    """
    for name in PARTS if sharded else ("state_dict", "optimizer_states", *PARTS):
        if name not in checkpoint:
            raise KeyError(name)


def without_state(checkpoint: Mapping[str, Any], callbacks: Sequence[Callback]) -> list[str]:
    """The classes of the callbacks of a run that keep a state, and have none in `checkpoint`."""
    keeping = [callback for callback in callbacks if type(callback).state_dict is not Callback.state_dict]
    return [type(callback).__name__ for callback in keeping if callback.state_key not in checkpoint["callbacks"]]


def check_counts(kept: Mapping[str, int] | None, trained: Mapping[str, Sized]) -> None:
    """DoesNotFit if a checkpoint has the state of more or fewer optimizers or schedules than the run.

    Args:
        kept: how many the checkpoint has, by its keys (those of shards are not known); None if Lightning passed over
            its callbacks, which it does where there are none.
        trained: those of the run, by the same keys.
    """
    if kept is None:
        raise DoesNotFit("the checkpoint lacks 'callbacks'")
    for key, count in kept.items():
        if count != len(trained[key]):
            raise DoesNotFit(f"it has the state of {count} {COUNTED[key]}, and this run has {len(trained[key])}")


def counts(checkpoint: Mapping[str, Any]) -> dict[str, int]:
    """How many optimizers and schedules a checkpoint has the state of."""
    return {key: len(checkpoint[key]) for key in COUNTED if key in checkpoint}


def _is_of_the_machine(error: Exception) -> bool:
    """Another rank that is gone, memory that ran out: no fault of the checkpoint."""
    return isinstance(error, RuntimeError) and not _MISFITS.search(str(error))


def _told(error: Exception, frames: list[FrameType]) -> str:
    if isinstance(error, DoesNotFit):
        return str(error)
    if any(frame.f_globals.get("__name__") == "torch.serialization" for frame in frames):
        return "it is no checkpoint, or one that holds more than tensors and plain values; it was not loaded"
    if isinstance(error, KeyError):
        return f"{_owner(frames)} lacks {error.args[0]!r}"
    if str(error).startswith("zip()"):
        return f"{_owner(frames)} has more or fewer parts than this run"
    text = " ".join(str(error).split())
    return f"{_owner(frames)} does not fit ({text[:_MAX_CHARACTERS]}{' ...' * (len(text) > _MAX_CHARACTERS)})"


def _owner(frames: list[FrameType]) -> str:
    """Whose state it was: the object into which the innermost function was loading it."""
    for frame in reversed(frames):
        if frame.f_code.co_name in ("load_state_dict", "_restore") and "self" in frame.f_locals:
            return f"the state of {type(frame.f_locals['self']).__name__}"
    return "the checkpoint"
