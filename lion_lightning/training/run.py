"""One run, from its configuration to its summary: build, fit, report."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import rich
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from lion_lightning.training import build
from lion_lightning.training.callbacks import ReplicaCheck, SmoothedLoss, StepSeed, ValidateAtEnd, progress
from lion_lightning.training.checkpoint.files import has_reached
from lion_lightning.training.checkpoint.resume import AUTO, checkpoint_to_resume
from lion_lightning.training.checkpoint.sharded import ShardedStrategy
from lion_lightning.training.logging_setup import closing, keep_config, log_config, quiet_libraries
from lion_lightning.training.performance import Throughput
from lion_lightning.training.report import conclude, duration, show
from lion_lightning.training.signals import StopFlag


def run(cfg: DictConfig, more_callbacks: Sequence[pl.Callback] = ()) -> float:
    """Train what `cfg` describes and return the best value of the recipe's monitored metric.

    Args:
        cfg: the whole configuration.
        more_callbacks: beside those of the configuration.

    Raises:
        ConfigError: a setting that cannot work; nothing was trained.
        CheckpointFailed: a checkpoint could not be written; the ones before it are as they were.
        TrainingInterrupted: a signal asked the run to end, and it did, at a step boundary.
        TrainingStopped: the guard ended the run.
    """
    build.check(cfg)
    folder = Path(cfg.run_dir)
    resumed = checkpoint_to_resume(cfg.resume, folder / "checkpoints")
    folder.mkdir(parents=True, exist_ok=True)
    quiet_libraries()
    console = rich.get_console()  # Lightning's progress bar is on it too, so lines are printed above the bar
    precision = build.settle_precision(cfg)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    data = build.build_data(cfg)
    cfg.trainer.max_steps = build.max_steps(cfg, data)
    module = build.build_module(cfg, data)
    is_done = resumed is not None and has_reached(resumed, cfg.trainer.max_steps)  # nothing is left to be logged
    logger = None if is_done else build.build_logger(cfg, resumed if cfg.resume == AUTO else None)
    throughput = Throughput()
    with StopFlag(alone=not build.started_by_launcher()) as stop:
        checkpoint = build.build_checkpoint(cfg, stop)
        config = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
        # Not before what was resumed has been found to fit: a refused resume leaves the folder as it is.
        keep = LambdaCallback(on_train_start=rank_zero_only(lambda *_: keep_config(config, folder)))
        callbacks = [keep, StepSeed(cfg.seed), *build.build_callbacks(cfg, "guard"), throughput, ValidateAtEnd()]
        callbacks += [SmoothedLoss(), *build.build_callbacks(cfg, "callbacks")]
        callbacks += [checkpoint, ReplicaCheck(cfg.trainer.check_replicas_every)]
        callbacks += [*more_callbacks, *progress(console, ["train/loss", cfg.recipe.monitor])]
        # Callbacks of others may ask for a logger.
        trainer = build.build_trainer(cfg, DummyLogger() if is_done else logger, callbacks, bar=console.is_terminal)
        if resumed:
            checkpoint.refuse_misfit(resumed)
        about = build.describe(cfg, data, module, trainer, resumed, precision)
        with closing(logger):
            if trainer.is_global_zero:
                show(console, cfg.run_name, about)
                log_config(logger, config, folder)
            started = time.perf_counter()
            with checkpoint.resuming():
                trainer.fit(module, datamodule=data, ckpt_path=resumed, weights_only=True)
            checkpoint.settle(trainer)
            steps = trainer.global_step - checkpoint.first_step
            took = duration(time.perf_counter() - started, steps, throughput.measured(trainer))
            if trainer.is_global_zero:
                # Under FSDP2 this rank has only its shard of the module that was trained.
                whole = build.build_module(cfg, data) if isinstance(trainer.strategy, ShardedStrategy) else module
                export = folder / "export" if cfg.export else None
                conclude(console, cfg.run_name, trainer, checkpoint, whole, about, took, export)
    return math.nan if checkpoint.best_score is None else checkpoint.best_score
