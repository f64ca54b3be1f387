"""What a run prints before and after training, the weights it exports, and the value it returns."""

import math
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from lion_lightning.data.stream import StreamDataModule
from lion_lightning.training.build import build_module, effective_batch_size
from lion_lightning.training.checkpoint.files import load, with_names_of
from lion_lightning.training.checkpoint.policy import RunCheckpoint
from lion_lightning.training.checkpoint.sharded import load_whole
from lion_lightning.training.logging_setup import redacted_argument, wandb_logger_of

NOT_SHARED = ("optim", "run_dir", "hydra.run.dir", "resume")
"""Arguments that the control run does not share; each run has a folder of its own."""


def describe(
    cfg: DictConfig, data: StreamDataModule, module: Any, trainer: pl.Trainer, resumed: Path | None
) -> dict[str, str]:
    """Lines for the panel at the start of a run.

    Args:
        cfg: the whole configuration.
        data, module, trainer: what was built from it.
        resumed: the checkpoint it goes on from.
    """
    where = f"{cfg.data.name} from {cfg.data.path}" if cfg.data.get("path") else cfg.data.name
    settings = ", ".join(f"{key} {value}" for key, value in cfg.optim.items() if key in ("lr", "betas", "weight_decay"))
    micro = (
        f"{cfg.data.batch_size} x {cfg.trainer.accumulate_grad_batches} micro-batches x {trainer.world_size} devices"
    )
    return {
        "data": where,
        **data.describe(),  # type: ignore[attr-defined]  # of the recipes' data modules
        **module.describe(),
        "effective batch": f"{effective_batch_size(cfg)} samples ({micro})",
        "optimizer": f"{cfg.optim.name}: {settings}; {cfg.schedule.name} schedule over {trainer.max_steps} steps",
        "precision": f"{cfg.trainer.precision} on {trainer.strategy.root_device.type}",
        "goes on from": _near(resumed) if resumed else "nothing: it starts afresh",
        "kept in": _near(cfg.run_dir),
    }


def show(console: Console, title: str, lines: Mapping[str, str]) -> None:
    """Print a panel: names on the left, values wrapped on the right, at whatever width there is.

    Args:
        console: where to.
        title: of the panel.
        lines: value by name.
    """
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in lines.items():
        table.add_row(name, value)
    console.print(Panel(table, title=title, title_align="left", expand=False), highlight=False)


def conclude(
    cfg: DictConfig,
    console: Console,
    trainer: pl.Trainer,
    data: StreamDataModule,
    module: Any,
    checkpoint: RunCheckpoint,
    took: str,
    about: dict[str, str],
) -> float:
    """Export the best weights, print the outcome, and return the best value of the monitored metric.

    Args:
        cfg: the whole configuration.
        console: where to print.
        trainer, data, module, checkpoint: of the run, after training.
        took: duration and speed of the training.
        about: what `describe` returned, for the model card.
    """
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
        "training took": took,
    }
    module.eval()
    for number, line in enumerate(module.showcase(), 1):
        outcome[f"example {number}"] = line
    outcome["checkpoint"] = _near(kept)
    if cfg.export:
        folder = Path(cfg.run_dir) / "export"
        module.export(folder, _model_card(cfg.run_name, {**about, **outcome}))
        outcome["export"] = f"{_near(folder)} (a Hugging Face folder)"
    show(console, f"{cfg.run_name} is done", outcome)
    # Commands stand outside the panel, on one line each, so that they can be copied.
    commands = [_next_command(cfg.optim.name)]
    wandb_logger = wandb_logger_of(trainer.logger)
    if wandb_logger is not None:
        wandb_logger.log_predictions(module)
        commands.insert(0, wandb_logger.describe(_near))
    for line in commands:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    return best


def _model_card(title: str, lines: Mapping[str, str]) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in lines.items())
    head = f"---\nlibrary_name: transformers\n---\n\n# {title}\n\nTrained with lion_lightning.\n\n"
    return f"{head}| | |\n| --- | --- |\n{rows}\n"


def duration(seconds: float, steps: int, speed: Mapping[str, float]) -> str:
    """How long training took, in words.

    Args:
        seconds: of the training.
        steps: optimizer steps.
        speed: what `Throughput.measured` returned; may be empty.
    """
    parts = [f"{seconds:.0f} s, {steps} steps"]
    if speed:
        unit = "tokens" if "perf/tokens_per_second" in speed else "samples"
        parts += [f"{speed[f'perf/{unit}_per_second']:,.0f} {unit}/s", f"{speed['perf/step_ms']:.0f} ms a step"]
        parts += [f"MFU {speed['perf/mfu']:.0%}"] if "perf/mfu" in speed else []
        parts += [f"{speed['perf/data_wait']:.1%} of it waiting for data"]
        parts += [f"{speed['perf/peak_memory_gib']:.1f} GiB at most"]
    return ", ".join(parts)


def _near(path: str | Path) -> str:
    """`path` as short as it can be written from here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _next_command(optim: str) -> str:
    """One line: the control run, which is the same command line with the other optimizer."""
    other = "adamw" if optim != "adamw" else "lion"
    in_sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    given = HydraConfig.get().overrides.task if in_sweep else sys.argv[1:]  # a launcher's process has other arguments
    kept = [redacted_argument(argument) for argument in given if not argument.startswith(NOT_SHARED)]
    return f"Next, the control: python train.py {shlex.join([*kept, f'optim={other}'])}"
