"""One run, from its configuration to its summary: build, fit, export, say what came of it."""

import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import transformers
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lion_lightning.errors import ConfigError, configuring
from lion_lightning.training.bookkeeping import closing, log_config
from lion_lightning.training.building import (
    build_callbacks,
    build_data,
    build_guard,
    build_logger,
    build_module,
    effective_batch_size,
    max_steps,
)
from lion_lightning.training.checkpoint import RunCheckpoint
from lion_lightning.training.checkpoint_io import DurableCheckpointIO
from lion_lightning.training.checks import check
from lion_lightning.training.costs import Costs
from lion_lightning.training.heartbeat import Heartbeat
from lion_lightning.training.host_memory import keep_freed_memory
from lion_lightning.training.outcome import about, conclude
from lion_lightning.training.progress import progress
from lion_lightning.training.replicas import ReplicaCheck
from lion_lightning.training.restoring import restoring
from lion_lightning.training.resume import AUTO, resolve
from lion_lightning.training.signals import StopFlag
from lion_lightning.training.step_seed import StepSeed
from lion_lightning.training.strategies import build_strategy, started_by_launcher
from lion_lightning.training.summary import show
from lion_lightning.training.throughput import Throughput

TRAINER_KEYS_OF_OURS = (
    "name", "max_steps", "max_epochs", "val_check_interval", "strategy", "timeout_minutes", "check_replicas_every",
    "keep_freed_memory",
)  # fmt: skip


def run(cfg: DictConfig) -> float:
    """Train what `cfg` describes and return the best value of the recipe's monitored metric.

    Raises:
        ConfigError: a setting that cannot work; nothing was trained.
        CheckpointFailed: a checkpoint could not be written; the ones before it are as they were.
        TrainingInterrupted: a signal asked the run to end, and it did, at a step boundary.
        TrainingStopped: the guard ended the run.
    """
    check(cfg)
    folder = Path(cfg.run_dir) / "checkpoints"
    resumed = resolve(cfg.resume, folder)
    Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
    _quiet_libraries()
    console = Console(soft_wrap=False)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    data = build_data(cfg)
    cfg.trainer.max_steps = max_steps(cfg, data)
    module = build_module(cfg, data)
    logger = build_logger(cfg, goes_on=cfg.resume == AUTO and resumed is not None)
    throughput = Throughput()
    with StopFlag(alone=not started_by_launcher()) as stop:
        checkpoint = _build_checkpoint(cfg, folder, stop)
        shown = progress(console, ["train/loss", cfg.recipe.monitor])
        several = [Heartbeat(), ReplicaCheck(cfg.trainer.check_replicas_every)]
        watching = [*build_guard(cfg), throughput, Costs(), ValidateAtEnd()]
        callbacks = [StepSeed(cfg.seed), *watching, *build_callbacks(cfg), checkpoint, *several, *shown]
        trainer = _build_trainer(cfg, console, logger, callbacks)
        story = about(cfg, data, module, trainer, resumed)
        with closing(logger):
            if trainer.is_global_zero:
                show(console, cfg.run_name, story)
            log_config(logger, cfg)
            if cfg.trainer.keep_freed_memory and trainer.strategy.root_device.type == "cpu":
                keep_freed_memory()
            started = time.perf_counter()
            with restoring(resumed):
                trainer.fit(module, datamodule=data, ckpt_path=resumed, weights_only=True)
            seconds = time.perf_counter() - started
            return conclude(
                cfg, console, trainer, data, module, checkpoint, throughput.measured(trainer), seconds, story
            )


class ValidateAtEnd(Callback):
    """Makes the last optimizer step end with a validation, whether or not the interval divides the run."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True


def _build_checkpoint(cfg: DictConfig, folder: Path, stop: StopFlag) -> RunCheckpoint:
    facts = {
        "recipe": cfg.recipe.name,
        "model": cfg.model.name,
        "data": cfg.data.name,
        "seed": cfg.seed,
        "optim": OmegaConf.to_container(cfg.optim, resolve=True),
        "effective batch size": effective_batch_size(cfg),
    }
    options = {key: value for key, value in cfg.checkpoint.items() if key != "background"}
    with configuring("checkpoint"):
        return RunCheckpoint(folder, cfg.recipe.monitor, cfg.recipe.mode, stop=stop, facts=facts, **options)


def _build_trainer(cfg: DictConfig, console: Console, logger: Logger | None, callbacks: list[Callback]) -> pl.Trainer:
    steps = cfg.trainer.max_steps
    try:
        return pl.Trainer(
            **{key: value for key, value in cfg.trainer.items() if key not in TRAINER_KEYS_OF_OURS},
            strategy=build_strategy(cfg),
            max_steps=steps,
            val_check_interval=min(cfg.trainer.val_check_interval, steps) * cfg.trainer.accumulate_grad_batches,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_progress_bar=console.is_terminal,
            default_root_dir=cfg.run_dir,
            logger=logger or False,
            callbacks=callbacks,
            plugins=[DurableCheckpointIO(cfg.checkpoint.background)],
        )
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise ConfigError(f"trainer: {error}") from error


def _quiet_libraries() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")  # Lightning 2.6 on a newer torch
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
