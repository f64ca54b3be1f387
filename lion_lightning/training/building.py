"""The parts of a run, each built from its part of the configuration, with a ConfigError for what cannot work."""

import math
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig
from torch import nn

from lion_lightning.data.stream import StreamDataModule
from lion_lightning.errors import ConfigError, configuring
from lion_lightning.hyperparams import Schedule
from lion_lightning.lightning import OptimizerFactory
from lion_lightning.training.bookkeeping import known_run_id
from lion_lightning.training.instantiate import instantiate


def build_data(cfg: DictConfig) -> StreamDataModule:
    with configuring("data"):
        data = instantiate(cfg.data)
    if not isinstance(data, StreamDataModule):
        raise ConfigError(f"data={cfg.data.name}: {type(data).__name__} is not a StreamDataModule")
    data.prepare_data()
    data.setup("fit")
    data.check_batch_fits(effective_batch_size(cfg))
    return data


def effective_batch_size(cfg: DictConfig) -> int:
    devices = cfg.trainer.devices if isinstance(cfg.trainer.devices, int) else 1
    return cfg.data.batch_size * cfg.trainer.accumulate_grad_batches * devices * cfg.trainer.num_nodes


def max_steps(cfg: DictConfig, data: StreamDataModule) -> int:
    if cfg.trainer.max_epochs is None:
        return cfg.trainer.max_steps
    return math.ceil(cfg.trainer.max_epochs * data.num_train_samples / effective_batch_size(cfg))


def build_module(cfg: DictConfig, data: StreamDataModule) -> Any:
    factory, schedule = _build_optimizer_factory(cfg), _build_schedule(cfg)
    with configuring("model.config"):
        config = instantiate(cfg.model.config)
    with configuring("recipe.module"):
        return instantiate(
            cfg.recipe.module, config=config, data=data, optimizer_factory=factory, schedule=schedule, seed=cfg.seed
        )


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


def build_guard(cfg: DictConfig) -> list[Callback]:
    with configuring("guard"):
        return [instantiate(cfg.guard)] if "_target_" in cfg.guard else []


def build_callbacks(cfg: DictConfig) -> list[Callback]:
    """Those that the command line adds: `callbacks=ema`."""
    with configuring("callbacks"):
        return [instantiate(node) for node in cfg.get("callbacks", {}).values()]


def build_logger(cfg: DictConfig, goes_on: bool = False) -> Logger | None:
    """The logger; one of W&B goes on with the run that this folder has had, if `goes_on`."""
    if "_target_" not in cfg.logger:
        return None
    try:
        if cfg.logger.name == "wandb":
            return instantiate(cfg.logger, run_id=known_run_id(cfg.run_dir) if goes_on else None)
        # A file logger's own `name` is the folder it writes to.
        return instantiate(cfg.logger, name=cfg.logger.name)
    except (ModuleNotFoundError, ValueError) as error:
        raise ConfigError(f"logger={cfg.logger.name}: {error}") from error
