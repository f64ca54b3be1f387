"""How a run resumes from a checkpoint, or says in one line why it cannot.

`checkpoint_to_resume` picks the checkpoint, `DurableCheckpointIO` (or `ShardedStrategy`) reads it, and `RunCheckpoint`
checks that it fits the run while Lightning restores its parts.
"""

import logging
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lion_lightning import __version__
from lion_lightning.errors import ConfigError
from lion_lightning.training.checkpoint import files
from lion_lightning.training.checkpoint.files import newest_valid, step_files

log = logging.getLogger(__name__)
AUTO = "auto"
WAY_OUT = (
    f"go on with the settings and the version of lion_lightning that wrote it (this is {__version__}), "
    "or start afresh with resume=null in another run_dir="
)
LOAD_FAILURES = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, pickle.UnpicklingError)
_BATCHES, _VALIDATION = "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"  # of Lightning's fit loop
# Other kinds of RuntimeError are faults of the machine, such as memory that ran out or a lost rank.
_MISFITS = re.compile(r"Error\(s\) in loading state_dict|cannot be loaded")
_MAX_CHARACTERS = 300


def checkpoint_to_resume(resume: str | None, folder: Path) -> Path | None:
    """The checkpoint that `resume` means for a run that keeps its own in `folder`; None to start afresh.

    Args:
        resume: `auto` for the newest valid one of `folder`, a path, or None.
        folder: the run's checkpoints; need not exist.

    Raises:
        ConfigError: a URL; no such file; a file that is not what was written; or `folder` belongs to a run already.
    """
    if resume == AUTO:
        path, wrong = newest_valid(folder)
        for line in wrong:
            log.warning("resume=auto skips %s", line)
        if path is None and wrong:
            raise ConfigError(f"resume=auto: none of the checkpoints in {folder} is valid: {'; '.join(wrong)}")
        if path is None:
            log.info("resume=auto: no checkpoint in %s, so the run starts afresh", folder)
        return path
    if existing := step_files(folder):
        raise ConfigError(
            f"{folder} holds checkpoints of a run up to {existing[-1].name}: "
            "resume=auto goes on with it, another run_dir= starts afresh"
        )
    if resume is None:
        return None
    try:
        path = Path(files.refuse_url(resume))
        if files.marker_of(path).is_file():
            files.verify(path)
    except ValueError as error:
        raise ConfigError(f"resume={error}") from error
    if not path.exists():
        raise ConfigError(f"resume={resume}: there is no such checkpoint file; auto is the newest one of run_dir")
    if path.is_dir() and step_files(path / "checkpoints"):
        raise ConfigError(f"resume={resume} is the folder of a run: run_dir={resume} resume=auto goes on with it")
    if path.is_dir() and not (path / ".metadata").is_file():
        raise ConfigError(f"resume={resume} is a folder that holds no checkpoint; name the .ckpt itself")
    return path


@contextmanager
def restoring(path: object, setting: str = "resume") -> Iterator[None]:
    """Turn a failure to restore a run from the checkpoint at `path`, which `setting` names, into one line.

    Raises:
        ConfigError: names the file, what of it is missing or does not fit, and the way out.
    """
    try:
        yield
    except ConfigError:
        raise
    except LOAD_FAILURES as error:
        text = " ".join(str(error).split())
        if isinstance(error, RuntimeError) and not _MISFITS.search(text):
            raise
        if isinstance(error, pickle.UnpicklingError):
            told = "it is no checkpoint, or one that holds more than tensors and plain values; it was not loaded"
        elif isinstance(error, KeyError):
            told = f"the checkpoint lacks {error.args[0]!r}"
        else:
            told = f"the checkpoint does not fit ({text[:_MAX_CHARACTERS]}{' ...' * (len(text) > _MAX_CHARACTERS)})"
        way_out = f"; {WAY_OUT}" if setting == "resume" else ""
        raise ConfigError(f"{setting}={path}: {told}{way_out}") from error


def differences(name: str, before: Any, now: Any) -> Iterator[str]:
    """A text for each value that differs, with its dotted name."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            if key in before and key in now:
                yield from differences(f"{name}.{key}", before[key], now[key])
            else:
                yield f"{name}.{key} was {before.get(key, 'missing')} and is now {now.get(key, 'missing')}"
    elif before != now:
        yield f"{name} was {before!r} and is now {now!r}"


def expect_validation(checkpoint: dict[str, Any]) -> None:
    """Make a run resumed from `checkpoint` begin with the validation that its last step should have ended with.

    Lightning skips that validation where a checkpoint was written before it. It repeats one that was interrupted, so
    the loop counters are set to: the step is complete, and the first validation batch has been started.
    """
    state = checkpoint["loops"]["fit_loop"]
    for counts in (state[_BATCHES]["total"], state[_BATCHES]["current"]):
        counts["completed"] = counts["processed"]
    for counts in (state[_VALIDATION]["total"], state[_VALIDATION]["current"]):
        counts.update(ready=1, started=1, processed=0, completed=0)
    state[_VALIDATION]["is_last_batch"] = False


def convert_loop_counters(checkpoint: dict[str, Any], before: int | None, now: int) -> None:
    """Convert the loop counters to micro-batches of the resumed run, which may accumulate another number of them."""
    if before is None or before == now:
        return
    state = checkpoint["loops"]["fit_loop"][_BATCHES]
    for counts in (state["total"], state["current"]):
        unfinished = counts["processed"] - counts["completed"]
        for name in ("ready", "started", "processed"):
            counts[name] = counts[name] // before * now
        counts["completed"] = counts["processed"] - unfinished
