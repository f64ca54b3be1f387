"""What a run leaves about itself: its configuration, its logger's summaries, and an end to the W&B run."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from lion_lightning.training.redaction import redacted, redacted_argument

if TYPE_CHECKING:
    from lion_lightning.tracking.wandb import RunLogger

RUN_ID_FILE = "wandb_run_id"


@rank_zero_only
def log_config(logger: Logger | None, cfg: DictConfig) -> None:
    """Keep the resolved configuration beside the checkpoints and in the logger, without its secrets."""
    plain = redacted(OmegaConf.to_container(cfg, resolve=True))
    OmegaConf.save(OmegaConf.create(plain), Path(cfg.run_dir) / "config.yaml")
    if logger is None:
        return
    with _arguments_redacted():  # W&B takes them down when its run begins, which is here
        logger.log_hyperparams(plain)
    if wandb_logger := wandb_logger_of(logger):
        wandb_logger.define_summaries({**SUMMARIES, cfg.recipe.monitor: cfg.recipe.mode})
        if wandb_logger.mode == "online":
            (Path(cfg.run_dir) / RUN_ID_FILE).write_text(wandb_logger.experiment.id)


def known_run_id(run_dir: str) -> str | None:
    """The id of the online W&B run that `run_dir` has had, if it has had one."""
    file = Path(run_dir) / RUN_ID_FILE
    return (file.read_text().strip() or None) if file.is_file() else None


@contextmanager
def _arguments_redacted() -> Iterator[None]:
    kept = sys.argv
    sys.argv = [kept[0], *map(redacted_argument, kept[1:])]
    try:
        yield
    finally:
        sys.argv = kept


# What stands for the run in W&B's table, by exact name.
SUMMARIES: dict[str, Any] = {
    "train/loss": "last",
    "val/loss": "min",
    "val/perplexity": "min",
    "val/accuracy": "max",
    "val/top1": "max",
    "val/top5": "max",
    "val/ece": "min",
    "perf/samples_per_second": "last",
    "perf/tokens_per_second": "last",
    "perf/step_ms": "last",
    "perf/mfu": "last",
    "perf/peak_memory_gib": "max",
}


@contextmanager
def closing(logger: Logger | None) -> Iterator[None]:
    """Finish a W&B run whatever happens, with the exit code that this process will have."""
    code = 0
    try:
        yield
    except BaseException as error:
        code = getattr(error, "exit_code", 1)
        raise
    finally:
        if wandb_logger := wandb_logger_of(logger):
            wandb_logger.finish(code)


def wandb_logger_of(logger: Logger | None) -> "RunLogger | None":
    """`logger` if it is a W&B run; without importing wandb where it is not used, since it need not be installed."""
    if logger is None or "wandb" not in sys.modules:
        return None
    from lion_lightning.tracking.wandb import RunLogger

    return logger if isinstance(logger, RunLogger) else None
