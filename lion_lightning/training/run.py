"""One run, from its configuration to its summary: build, fit, export, say what came of it."""

import logging
import math
import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
import transformers
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from lion_lightning.mixin import OptimizerFactory
from lion_lightning.schedules import Schedule
from lion_lightning.training.checks import check
from lion_lightning.training.data import StreamDataModule
from lion_lightning.training.errors import ConfigError, configuring
from lion_lightning.training.instantiate import instantiate
from lion_lightning.training.progress import progress
from lion_lightning.training.summary import model_card, show
from lion_lightning.training.throughput import Throughput

if TYPE_CHECKING:
    from lion_lightning.tracking.wandb import RunLogger

TRAINER_KEYS_OF_OURS = ("name", "max_steps", "max_epochs", "val_check_interval")


def run(cfg: DictConfig) -> float:
    """Train what `cfg` describes and return the best value of the recipe's monitored metric.

    Raises:
        ConfigError: a setting that cannot work; nothing was trained.
        TrainingStopped: the guard ended the run.
    """
    check(cfg)
    Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
    _quiet_libraries()
    console = Console(soft_wrap=False)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    data = _build_data(cfg)
    cfg.trainer.max_steps = _max_steps(cfg, data)
    module = _build_module(cfg, data)
    logger = _build_logger(cfg)
    throughput = Throughput(module.tokens_per_sample())
    checkpoint = ModelCheckpoint(
        dirpath=Path(cfg.run_dir) / "checkpoints",
        filename="best",
        monitor=cfg.recipe.monitor,
        mode=cfg.recipe.mode,
        save_last=True,
        enable_version_counter=False,
    )
    metrics = ["train/loss", cfg.recipe.monitor]
    callbacks = [*_build_guard(cfg), throughput, ValidateAtEnd(), checkpoint, *progress(console, metrics)]
    trainer = _build_trainer(cfg, console, logger, callbacks)
    about = _about(cfg, data, module, trainer)
    with _closing(logger):
        if trainer.is_global_zero:
            show(console, cfg.run_name, about)
        _log_config(logger, cfg)
        started = time.perf_counter()
        trainer.fit(module, datamodule=data, ckpt_path=cfg.resume, weights_only=True)
        seconds = time.perf_counter() - started
        return _conclude(cfg, console, trainer, module, checkpoint, throughput.measured(trainer), seconds, about)


class ValidateAtEnd(Callback):
    """Makes the last optimizer step end with a validation, whether or not the interval divides the run."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True


def _build_data(cfg: DictConfig) -> StreamDataModule:
    with configuring("data"):
        data = instantiate(cfg.data)
    if not isinstance(data, StreamDataModule):
        raise ConfigError(f"data={cfg.data.name}: {type(data).__name__} is not a StreamDataModule")
    data.prepare_data()
    data.setup("fit")
    data.check_batch_fits(_effective_batch_size(cfg))
    return data


def _effective_batch_size(cfg: DictConfig) -> int:
    devices = cfg.trainer.devices if isinstance(cfg.trainer.devices, int) else 1
    return cfg.data.batch_size * cfg.trainer.accumulate_grad_batches * devices * cfg.trainer.num_nodes


def _max_steps(cfg: DictConfig, data: StreamDataModule) -> int:
    if cfg.trainer.max_epochs is None:
        return cfg.trainer.max_steps
    return math.ceil(cfg.trainer.max_epochs * data.num_train_samples / _effective_batch_size(cfg))


def _build_module(cfg: DictConfig, data: StreamDataModule) -> Any:
    factory, schedule = _build_optimizer_factory(cfg), _build_schedule(cfg)
    with configuring("model.config"):
        config = instantiate(cfg.model.config)
    with configuring("recipe.module"):
        return instantiate(
            cfg.recipe.module, config=config, data=data, optimizer_factory=factory, schedule=schedule, seed=cfg.seed
        )


def _build_trainer(cfg: DictConfig, console: Console, logger: Logger | None, callbacks: list[Callback]) -> pl.Trainer:
    max_steps = cfg.trainer.max_steps
    try:
        return pl.Trainer(
            **{key: value for key, value in cfg.trainer.items() if key not in TRAINER_KEYS_OF_OURS},
            max_steps=max_steps,
            val_check_interval=min(cfg.trainer.val_check_interval, max_steps) * cfg.trainer.accumulate_grad_batches,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_progress_bar=console.is_terminal,
            default_root_dir=cfg.run_dir,
            logger=logger or False,
            callbacks=callbacks,
        )
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise ConfigError(f"trainer: {error}") from error


def _build_optimizer_factory(cfg: DictConfig) -> OptimizerFactory:
    """The factory, tried on one weight: a bad option is told now, not when training is about to start."""
    with configuring("optim"):
        factory = instantiate(cfg.optim)
        factory([{"name": "decay", "params": [("weight", nn.Parameter(torch.ones(2, 2)))]}])
    return factory


def _build_schedule(cfg: DictConfig) -> Schedule:
    with configuring("schedule"):
        schedule = instantiate(cfg.schedule)
        schedule(cfg.trainer.max_steps)
    return schedule


def _build_guard(cfg: DictConfig) -> list[Callback]:
    with configuring("guard"):
        return [instantiate(cfg.guard)] if "_target_" in cfg.guard else []


def _build_logger(cfg: DictConfig) -> Logger | None:
    if "_target_" not in cfg.logger:
        return None
    try:
        # A file logger's own `name` is the folder it writes to.
        return instantiate(cfg.logger) if cfg.logger.name == "wandb" else instantiate(cfg.logger, name=cfg.logger.name)
    except (ModuleNotFoundError, ValueError) as error:
        raise ConfigError(f"logger={cfg.logger.name}: {error}") from error


def _log_config(logger: Logger | None, cfg: DictConfig) -> None:
    plain = OmegaConf.to_container(cfg, resolve=True)
    OmegaConf.save(OmegaConf.create(plain), Path(cfg.run_dir) / "config.yaml")
    if logger is None:
        return
    logger.log_hyperparams(plain)  # type: ignore[arg-type]
    if wandb_logger := _wandb_logger(logger):
        wandb_logger.define_summaries({**SUMMARIES, cfg.recipe.monitor: cfg.recipe.mode})


# What stands for the run in W&B's table, by exact name.
SUMMARIES: dict[str, Any] = {
    "train/loss": "last",
    "val/loss": "min",
    "val/perplexity": "min",
    "val/accuracy": "max",
    "val/top1": "max",
    "perf/samples_per_second": "last",
    "perf/tokens_per_second": "last",
    "perf/step_ms": "last",
    "perf/peak_memory_gib": "max",
}


@contextmanager
def _closing(logger: Logger | None) -> Iterator[None]:
    """Finish a W&B run whatever happens, with the exit code that this process will have."""
    code = 0
    try:
        yield
    except BaseException as error:
        code = getattr(error, "exit_code", 1)
        raise
    finally:
        if wandb_logger := _wandb_logger(logger):
            wandb_logger.finish(code)


def _wandb_logger(logger: Logger | None) -> "RunLogger | None":
    """`logger` if it is a W&B run; without importing wandb where it is not used, since it need not be installed."""
    if logger is None or "wandb" not in sys.modules:
        return None
    from lion_lightning.tracking.wandb import RunLogger

    return logger if isinstance(logger, RunLogger) else None


def _about(cfg: DictConfig, data: Any, module: Any, trainer: pl.Trainer) -> dict[str, str]:
    where = f"{cfg.data.name} from {cfg.data.path}" if cfg.data.get("path") else cfg.data.name
    settings = ", ".join(f"{key} {value}" for key, value in cfg.optim.items() if key in ("lr", "betas", "weight_decay"))
    micro = (
        f"{cfg.data.batch_size} x {cfg.trainer.accumulate_grad_batches} micro-batches x {trainer.world_size} devices"
    )
    return {
        "data": where,
        **data.describe(),
        **module.describe(),
        "effective batch": f"{_effective_batch_size(cfg)} samples ({micro})",
        "optimizer": f"{cfg.optim.name}: {settings}; {cfg.schedule.name} schedule over {trainer.max_steps} steps",
        "precision": f"{cfg.trainer.precision} on {trainer.strategy.root_device.type}",
        "kept in": _near(cfg.run_dir),
    }


def _conclude(
    cfg: DictConfig,
    console: Console,
    trainer: pl.Trainer,
    module: Any,
    checkpoint: ModelCheckpoint,
    speed: dict[str, float],
    seconds: float,
    about: dict[str, str],
) -> float:
    """Export the best weights, show the end of the story, and return the best metric."""
    best = float(checkpoint.best_model_score) if checkpoint.best_model_score is not None else math.nan
    last = trainer.callback_metrics.get(cfg.recipe.monitor)
    if not trainer.is_global_zero:
        return best
    if checkpoint.best_model_path:
        weights = torch.load(checkpoint.best_model_path, map_location="cpu", weights_only=True)["state_dict"]
        module.load_state_dict(weights)
    outcome = {
        f"best {cfg.recipe.monitor}": f"{best:.4f}" + (f" (last {float(last):.4f})" if last is not None else ""),
        "training took": f"{seconds:.0f} s, {trainer.global_step} steps" + _speed(speed),
    }
    module.eval()
    for number, line in enumerate(module.showcase(), 1):
        outcome[f"example {number}"] = line
    outcome["checkpoint"] = _near(checkpoint.best_model_path)
    if cfg.export:
        folder = Path(cfg.run_dir) / "export"
        module.export(folder, model_card(cfg.run_name, {**about, **outcome}))
        outcome["export"] = f"{_near(folder)} (a Hugging Face folder)"
    show(console, f"{cfg.run_name} is done", outcome)
    # Commands stand outside the panel, on one line each, so that they can be copied.
    wandb_logger = _wandb_logger(trainer.logger)
    for line in ([wandb_logger.describe(_near)] if wandb_logger else []) + [_next_command(cfg)]:
        console.print(line, soft_wrap=True, highlight=False)
    return best


def _speed(speed: dict[str, float]) -> str:
    unit = "tokens" if "perf/tokens_per_second" in speed else "samples"
    return f", {speed[f'perf/{unit}_per_second']:,.0f} {unit}/s, {speed['perf/step_ms']:.0f} ms a step" if speed else ""


def _near(path: str | Path) -> str:
    """`path` as short as it can be written from here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _next_command(cfg: DictConfig) -> str:
    """One line: the control run, which is the same command line with the other optimizer."""
    other = "adamw" if cfg.optim.name != "adamw" else "lion"
    kept = [argument for argument in sys.argv[1:] if not argument.startswith("optim")]
    return f"Next, the control: python train.py {shlex.join([*kept, f'optim={other}'])}"


def _quiet_libraries() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")  # Lightning 2.6 on a newer torch
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
