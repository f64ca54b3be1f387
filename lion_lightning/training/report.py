"""What a run prints before and after training, and the weights it exports."""

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lion_lightning.command_line import command_name, typed
from lion_lightning.training.checkpoint.files import weights_of, with_names_of
from lion_lightning.training.checkpoint.policy import RunCheckpoint
from lion_lightning.training.logging_setup import redacted_argument, wandb_logger_of

BORDERS = 6  # of a panel and between its columns
NOT_SHARED = ("optim", "run_dir", "hydra.run.dir", "resume")
"""Arguments that the control run does not share; each run has a folder of its own."""


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
    width = console.width - max(map(len, lines)) - BORDERS
    for name, value in lines.items():
        table.add_row(Text(name), Text(" ".join(_in_pieces(word, width) for word in value.split(" "))))
    console.print(Panel(table, title=escape(title), title_align="left", expand=False), highlight=False)


def _in_pieces(word: str, width: int) -> str:
    """A path that is too long for a line, broken after slashes."""
    pieces = [""]
    for part in re.findall(r"[^/]*/|[^/]+", word) if len(word) > width else [word]:
        if pieces[-1] and len(pieces[-1]) + len(part) > width:
            pieces.append("")
        pieces[-1] += part
    return "\n".join(pieces)


def conclude(
    console: Console,
    title: str,
    trainer: pl.Trainer,
    checkpoint: RunCheckpoint,
    module: Any,
    about: Mapping[str, str],
    took: str,
    export: Path | None,
) -> None:
    """Load and export the best weights of a run and print its outcome; on rank 0.

    Args:
        console: where to print.
        title: the name of the run.
        trainer: after training.
        checkpoint: that of the run.
        module: of the architecture that was trained, in one piece. `showcase()`, which returns lines, and
            `export(folder, card)` are used if it has them.
        about: value by name, for the model card.
        took: duration and speed of the training.
        export: folder for the exported model; None to export nothing.
    """
    kept = checkpoint.last_path if checkpoint.best_step is None else checkpoint.best_path
    if kept.exists():
        module.load_state_dict(with_names_of(weights_of(kept), module.state_dict()))
    last = trainer.callback_metrics.get(checkpoint.monitor or "")
    best = "none" if checkpoint.best_score is None else f"{checkpoint.best_score:.4f}"
    outcome = {
        f"best {checkpoint.monitor}": best + (f" (last {float(last):.4f})" if last is not None else ""),
        "training took": took,
    }
    module.eval()
    for number, line in enumerate(getattr(module, "showcase", list)(), 1):
        outcome[f"example {number}"] = line
    outcome["checkpoint"] = near(kept)
    if export is not None and hasattr(module, "export"):
        rows = "".join(f"| {name} | {value} |\n" for name, value in {**about, **outcome}.items())
        head = f"---\nlibrary_name: transformers\n---\n\n# {title}\n\nTrained with lion_lightning.\n\n"
        module.export(export, f"{head}| | |\n| --- | --- |\n{rows}")
        outcome["export"] = f"{near(export)} (a Hugging Face folder)"
    show(console, f"{title} is done", outcome)
    # Commands stand outside the panel, on one line each, so that they can be copied.
    commands = [_next_command(about["optimizer"].partition(":")[0])]
    wandb_logger = wandb_logger_of(trainer.logger)
    if wandb_logger is not None:
        wandb_logger.log_predictions(module)
        commands.insert(0, wandb_logger.describe(near))
    print_commands(console, commands)


def print_commands(console: Console, lines: Sequence[str]) -> None:
    """Print each line as it is, whatever the width of the console."""
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False, emoji=False)


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
        if (peak := speed.get("perf/peak_memory_gib")) is not None:
            parts += [f"{peak:.1f} GiB at most"]
    return ", ".join(parts)


def near(path: str | Path) -> str:
    """`path` as short as it can be written from here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _next_command(optim: str) -> str:
    """One line: the control run, which is the same command line with the other optimizer."""
    other = "adamw" if optim != "adamw" else "lion"
    given: Sequence[str] = typed or sys.argv[1:]
    if HydraConfig.initialized() and (hydra := HydraConfig.get()).mode == RunMode.MULTIRUN:
        # Those of one job; a launcher's process has other arguments.
        folders = [near(source.path) for source in hydra.runtime.config_sources if source.provider == "command-line"]
        flags = [word for folder in folders for word in ("--config-dir", folder)]
        given = [*flags, *(word for word in typed if word.startswith("trust=")), *hydra.overrides.task]
    kept = [redacted_argument(argument) for argument in given if not argument.startswith(NOT_SHARED)]
    return f"Next, the control: {command_name()} {shlex.join([*kept, f'optim={other}'])}"
