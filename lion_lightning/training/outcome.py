"""What a person is told of a run, before and after it, and the weights it leaves."""

import math
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from lion_lightning.data.stream import StreamDataModule
from lion_lightning.training.bookkeeping import wandb_logger_of
from lion_lightning.training.building import build_module, effective_batch_size
from lion_lightning.training.checkpoint import RunCheckpoint
from lion_lightning.training.checkpoint_io import load
from lion_lightning.training.plain import with_names_of
from lion_lightning.training.redaction import redacted_argument
from lion_lightning.training.sharded import load_whole
from lion_lightning.training.summary import model_card, show


def about(cfg: DictConfig, data: Any, module: Any, trainer: pl.Trainer, resumed: Path | None) -> dict[str, str]:
    """Lines for the summary at the start of a run."""
    where = f"{cfg.data.name} from {cfg.data.path}" if cfg.data.get("path") else cfg.data.name
    settings = ", ".join(f"{key} {value}" for key, value in cfg.optim.items() if key in ("lr", "betas", "weight_decay"))
    micro = (
        f"{cfg.data.batch_size} x {cfg.trainer.accumulate_grad_batches} micro-batches x {trainer.world_size} devices"
    )
    return {
        "data": where,
        **data.describe(),
        **module.describe(),
        "effective batch": f"{effective_batch_size(cfg)} samples ({micro})",
        "optimizer": f"{cfg.optim.name}: {settings}; {cfg.schedule.name} schedule over {trainer.max_steps} steps",
        "precision": f"{cfg.trainer.precision} on {trainer.strategy.root_device.type}",
        "goes on from": _near(resumed) if resumed else "nothing: it starts afresh",
        "kept in": _near(cfg.run_dir),
    }


def conclude(
    cfg: DictConfig,
    console: Console,
    trainer: pl.Trainer,
    data: StreamDataModule,
    module: Any,
    checkpoint: RunCheckpoint,
    speed: dict[str, float],
    seconds: float,
    about: dict[str, str],
) -> float:
    """Export the best weights, show the end of the story, and return the best metric."""
    best = math.nan if checkpoint.best_score is None else checkpoint.best_score
    last = trainer.callback_metrics.get(cfg.recipe.monitor)
    if not trainer.is_global_zero:
        return best
    kept = checkpoint.best_path if checkpoint.best_step is not None else checkpoint.last_path
    if kept.is_dir():
        module = build_module(cfg, data)  # this rank has only its shard of the one that was trained
        load_whole(module, kept)
    elif kept.is_file():
        module.load_state_dict(with_names_of(load(kept)["state_dict"], module.state_dict()))
    outcome = {
        f"best {cfg.recipe.monitor}": f"{best:.4f}" + (f" (last {float(last):.4f})" if last is not None else ""),
        "training took": f"{seconds:.0f} s, {trainer.global_step} steps" + _speed(speed),
    }
    module.eval()
    for number, line in enumerate(module.showcase(), 1):
        outcome[f"example {number}"] = line
    outcome["checkpoint"] = _near(kept)
    if cfg.export:
        folder = Path(cfg.run_dir) / "export"
        module.export(folder, model_card(cfg.run_name, {**about, **outcome}))
        outcome["export"] = f"{_near(folder)} (a Hugging Face folder)"
    show(console, f"{cfg.run_name} is done", outcome)
    # Commands stand outside the panel, on one line each, so that they can be copied.
    wandb_logger = wandb_logger_of(trainer.logger)
    if wandb_logger is not None:
        wandb_logger.log_predictions(module)
    for line in ([wandb_logger.describe(_near)] if wandb_logger else []) + [_next_command(cfg)]:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    return best


def _speed(speed: dict[str, float]) -> str:
    if not speed:
        return ""
    unit = "tokens" if "perf/tokens_per_second" in speed else "samples"
    parts = [f"{speed[f'perf/{unit}_per_second']:,.0f} {unit}/s", f"{speed['perf/step_ms']:.0f} ms a step"]
    if "perf/mfu" in speed:
        parts.append(f"MFU {speed['perf/mfu']:.0%}")
    parts.append(f"{speed['perf/data_wait']:.1%} of it waiting for data")
    return ", ".join(["", *parts, f"{speed['perf/peak_memory_gib']:.1f} GiB at most"])


def _near(path: str | Path) -> str:
    """`path` as short as it can be written from here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


OF_THIS_RUN = ("optim", "run_dir", "hydra.run.dir", "resume")
"""Arguments that the control run does not share; two runs have no folder in common."""


def _next_command(cfg: DictConfig) -> str:
    """One line: the control run, which is the same command line with the other optimizer."""
    other = "adamw" if cfg.optim.name != "adamw" else "lion"
    in_sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    given = HydraConfig.get().overrides.task if in_sweep else sys.argv[1:]  # a launcher's process has other arguments
    kept = [redacted_argument(argument) for argument in given if not argument.startswith(OF_THIS_RUN)]
    return f"Next, the control: python train.py {shlex.join([*kept, f'optim={other}'])}"
