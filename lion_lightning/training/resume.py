"""`resume=`: which checkpoint a run goes on from, and whether its folder is free for a new run."""

import logging
import re
from pathlib import Path

from lion_lightning.errors import ConfigError
from lion_lightning.training.checkpoint_io import refuse_url
from lion_lightning.training.durable import InvalidCheckpoint, marker_of, verify

log = logging.getLogger(__name__)
AUTO = "auto"
_STEP_FILE = re.compile(r"step-(\d+)\.ckpt")


def step_path(folder: Path, global_step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step-{global_step:09d}.ckpt"


def step_files(folder: Path) -> list[Path]:
    """The step files of `folder`, or what their markers promise, oldest first; whether they are valid is not asked."""
    names = {path.name.removesuffix(".json") for path in folder.glob("step-*")}
    return [folder / name for name in sorted(names) if _STEP_FILE.fullmatch(name)]


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of `folder` that is whole, and what is wrong with those that are newer.

    Step files come first; `last.ckpt` and `best.ckpt` are names of such files and stand in where those are gone.
    """
    wrong: list[str] = []
    names = [folder / "last.ckpt", folder / "best.ckpt"]
    for path in [*reversed(step_files(folder)), *(name for name in names if name.exists() or marker_of(name).exists())]:
        try:
            verify(path)
        except InvalidCheckpoint as error:
            wrong.append(str(error))
        else:
            return path, wrong
    return None, wrong


def resolve(resume: str | None, folder: Path) -> Path | None:
    """The checkpoint that `resume` means for a run that keeps its own in `folder`; None to start afresh.

    Args:
        resume: `auto` for the newest valid one of `folder`, a path, or None.
        folder: the run's checkpoints; need not exist.

    Raises:
        ConfigError: a URL; no such file; a file that is not what was written; or `folder` belongs to a run already.
    """
    if resume == AUTO:
        return _auto(folder)
    if step_files(folder):
        raise ConfigError(
            f"{folder} holds checkpoints of a run up to {step_files(folder)[-1].name}: "
            "resume=auto goes on with it, another run_dir= starts afresh"
        )
    return None if resume is None else _given(resume)


def _auto(folder: Path) -> Path | None:
    path, wrong = newest_valid(folder)
    for line in wrong:
        log.warning("resume=auto skips %s", line)
    if path is None and wrong:
        raise ConfigError(f"resume=auto: none of the checkpoints in {folder} is valid: {'; '.join(wrong)}")
    if path is None:
        log.info("resume=auto: no checkpoint in %s, so the run starts afresh", folder)
    return path


def _given(resume: str) -> Path:
    try:
        path = Path(refuse_url(resume))
    except ValueError as error:
        raise ConfigError(f"resume={error}") from error
    if not path.exists():
        raise ConfigError(f"resume={resume}: there is no such checkpoint file")
    if marker_of(path).is_file():
        try:
            verify(path)
        except InvalidCheckpoint as error:
            raise ConfigError(f"resume={error}") from error
    return path
