"""Questions to a configuration before anything is built: each mistake is one line that says what is allowed."""

import os

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from lion_lightning.errors import ConfigError

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed", "64-true")
POSITIVE = ("max_steps", "val_check_interval", "accumulate_grad_batches", "num_nodes", "log_every_n_steps")


def check(cfg: DictConfig) -> None:
    """Raise ConfigError for the first setting that cannot work on this machine."""
    _check_numbers(cfg)
    _check_devices(cfg)
    _check_multirun(cfg)


def _check_numbers(cfg: DictConfig) -> None:
    for name in POSITIVE:
        value = cfg.trainer[name]
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"trainer.{name} must be a whole number of at least 1, got {value!r}")
    epochs = cfg.trainer.max_epochs
    if epochs is not None and not (isinstance(epochs, int | float) and epochs > 0):
        raise ConfigError(f"trainer.max_epochs must be a number above 0 or null, got {epochs!r}")
    if cfg.trainer.precision not in PRECISIONS:
        raise ConfigError(f"trainer.precision must be one of {', '.join(PRECISIONS)}, got {cfg.trainer.precision!r}")
    if not isinstance(cfg.seed, int) or not 0 <= cfg.seed < 2**32:
        raise ConfigError(f"seed must be a whole number in [0, 2**32), got {cfg.seed!r}")


def _check_devices(cfg: DictConfig) -> None:
    available = _devices(cfg.trainer.accelerator)
    if not available:
        raise ConfigError(f"trainer.accelerator={cfg.trainer.accelerator}: this machine has none; try auto or cpu")
    wanted = cfg.trainer.devices
    if isinstance(wanted, int) and not 1 <= wanted <= available:
        raise ConfigError(f"trainer.devices={wanted}: accelerator={cfg.trainer.accelerator} has 1 to {available} here")


def _devices(accelerator: str) -> int:
    counts = {
        "gpu": torch.cuda.device_count(),
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
        "cpu": os.cpu_count() or 1,
    }
    if accelerator == "auto":
        return counts["cuda"] or counts["mps"] or counts["cpu"]
    if accelerator not in counts:
        raise ConfigError(f"trainer.accelerator must be one of auto, {', '.join(counts)}, got {accelerator!r}")
    return counts[accelerator]


def _check_multirun(cfg: DictConfig) -> None:
    """A strategy that starts its own processes would start the whole sweep in each of them."""
    multirun = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    started_outside = "LOCAL_RANK" in os.environ or os.environ.get("SUBMITIT_EXECUTOR") == "slurm"
    if multirun and cfg.trainer.devices != 1 and not started_outside:
        raise ConfigError(
            f"-m with trainer.devices={cfg.trainer.devices}: every process would run the whole sweep; "
            "set trainer.devices=1, or start one job at a time under torchrun"
        )
