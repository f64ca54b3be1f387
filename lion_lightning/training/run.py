"""One run, from its configuration to its summary: build, fit, report."""

import logging
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import transformers
from omegaconf import DictConfig
from rich.console import Console

from lion_lightning.training.build import (
    build_callbacks,
    build_checkpoint,
    build_data,
    build_logger,
    build_module,
    build_trainer,
    check,
    max_steps,
)
from lion_lightning.training.callbacks import Heartbeat, StepSeed, ValidateAtEnd, progress
from lion_lightning.training.checkpoint.policy import AUTO, resolve
from lion_lightning.training.distributed import ReplicaCheck, started_by_launcher
from lion_lightning.training.logging_setup import closing, log_config
from lion_lightning.training.performance import Costs, Throughput, keep_freed_memory
from lion_lightning.training.report import conclude, describe, duration, show
from lion_lightning.training.signals import StopFlag


def run(cfg: DictConfig) -> float:
    """Train what `cfg` describes and return the best value of the recipe's monitored metric.

    Raises:
        ConfigError: a setting that cannot work; nothing was trained.
        CheckpointFailed: a checkpoint could not be written; the ones before it are as they were.
        TrainingInterrupted: a signal asked the run to end, and it did, at a step boundary.
        TrainingStopped: the guard ended the run.
    """
    check(cfg)
    resumed = resolve(cfg.resume, Path(cfg.run_dir) / "checkpoints")
    Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
    _quiet_libraries()
    console = Console(soft_wrap=False)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    data = build_data(cfg)
    cfg.trainer.max_steps = max_steps(cfg, data)
    module = build_module(cfg, data)
    logger = build_logger(cfg, continues=cfg.resume == AUTO and resumed is not None)
    throughput = Throughput()
    with StopFlag(alone=not started_by_launcher()) as stop:
        checkpoint = build_checkpoint(cfg, stop)
        callbacks = [StepSeed(cfg.seed), *build_callbacks(cfg, "guard"), throughput, Costs(), ValidateAtEnd()]
        callbacks += [*build_callbacks(cfg, "callbacks"), checkpoint]
        callbacks += [Heartbeat(), ReplicaCheck(cfg.trainer.check_replicas_every)]
        callbacks += progress(console, ["train/loss", cfg.recipe.monitor])
        trainer = build_trainer(cfg, logger, callbacks, bar=console.is_terminal)
        about = describe(cfg, data, module, trainer, resumed)
        with closing(logger):
            if trainer.is_global_zero:
                show(console, cfg.run_name, about)
                log_config(logger, cfg)
            if cfg.trainer.keep_freed_memory and trainer.strategy.root_device.type == "cpu":
                keep_freed_memory()
            started = time.perf_counter()
            trainer.fit(module, datamodule=data, ckpt_path=resumed, weights_only=True)
            took = duration(time.perf_counter() - started, trainer.global_step, throughput.measured(trainer))
            return conclude(cfg, console, trainer, data, module, checkpoint, took, about)


def _quiet_libraries() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")  # Lightning 2.6 on a newer torch
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
