"""What a recipe's loop costs: our recipe, a raw PyTorch loop over its module, and the usual way, in one run.

    python scripts/bench/bench_recipe.py data=text_files data.path=FOLDER model=bert_mini optim=adamw
    python scripts/bench/bench_recipe.py recipe=image_classification data=cifar10 data.path=FOLDER model=resnet18 \\
        optim=adamw

All train the same configuration of model on the same data in the same batches, precision and with the same optimizer,
in turns, each in a process of its own; printed are medians over all steps but the first of each turn. The usual way is,
for text, the Trainer of Hugging Face with DataCollatorForLanguageModeling, and for images a torch loop whose batches
the image processor of transformers makes. Our recipe is `train.py` as it is, guard and logger included.
"""

import argparse
import contextlib
import io
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for the modules beside this one

from lion_lightning.__main__ import composed
from lion_lightning.training import run as training_run
from lion_lightning.training.build import build_data, build_module, settle_precision
from lion_lightning.training.performance import WARMUP_BATCHES, Throughput, peak_flops
from scripts.bench.bench_hardware import hardware
from scripts.bench.bench_usual import Clock, Turn, usual_way
from scripts.trained import trainer_stand_in


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    cfg = _configuration(options.overrides, 1)
    settle_precision(cfg)
    options.overrides.append(f"trainer.precision={cfg.trainer.precision}")
    turns: dict[str, Turn] = {"recipe": recipe, "raw loop": raw_loop}
    turns |= usual_way(cfg)
    times: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(options.rounds):
        for name, turn in turns.items():
            cfg = _configuration(options.overrides, WARMUP_BATCHES + options.steps)
            times[name] += alone(turn, cfg, WARMUP_BATCHES + options.steps)
            print(f"round {number + 1}/{options.rounds}: {name}", file=sys.stderr)
    cfg = _configuration(options.overrides, 1)
    text = report(options, times, per_step(cfg), least_seconds(cfg))
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n", encoding="utf-8")


def alone(turn: Turn, cfg: DictConfig, steps: int) -> list[float]:
    """A turn in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(turn, cfg, steps).result()


def recipe(cfg: DictConfig, steps: int) -> list[float]:
    """`train.py` as it is; what it takes to validate and to save is not part of a step."""
    throughput = Throughput()
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(training_run, "Throughput", return_value=throughput),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        cfg.run_dir = folder
        training_run.run(cfg)
    return list(throughput.durations)


def raw_loop(cfg: DictConfig, steps: int) -> list[float]:
    """The recipe's data, `training_step`, optimizer and schedule, and nothing else; in fp32 or mixed precision."""
    torch.manual_seed(cfg.seed)
    data = build_data(cfg)
    module = build_module(cfg, data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data.trainer = module.trainer = trainer_stand_in(steps, device)
    module.log = lambda *_, **__: None
    made = module.to(device).configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    clock = Clock()
    for number, batch in enumerate(data.train_dataloader()):
        batch = {name: values.to(device, non_blocking=True) for name, values in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.trainer.precision == "bf16-mixed"):
            loss = module.training_step(batch, number)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        clock.tick()
    return clock.durations


def per_step(cfg: DictConfig) -> tuple[int, str]:
    """What a step takes in, and its unit."""
    if "sequence_length" in cfg.data:
        return cfg.data.batch_size * cfg.data.sequence_length, "tokens/s"
    return cfg.data.batch_size, "images/s"


def least_seconds(cfg: DictConfig) -> float | None:
    """Seconds of a step of the recipe at the peak of the device; None where that is unknown."""
    module = build_module(cfg, build_data(cfg))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = peak_flops(device, cfg.trainer.precision)
    flops = getattr(module, "flops_per_sample", None)
    return cfg.data.batch_size * flops() / peak if flops is not None and peak else None


def report(
    options: argparse.Namespace, times: dict[str, list[float]], step: tuple[int, str], least: float | None = None
) -> str:
    """Markdown.

    Args:
        options: of the command line.
        times: seconds of each step, by what took it.
        step: what a step takes in, and its unit.
        least: seconds of a step at the peak of the device, for the model FLOPs utilisation of the recipe's work.
    """
    amount, unit = step
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = [
        f"`python scripts/bench/bench_recipe.py {' '.join(options.overrides)}`",
        f"{time.strftime('%Y-%m-%d')}, {hardware(device)}, torch {torch.__version__}, "
        f"{options.rounds} rounds of {options.steps} steps after {WARMUP_BATCHES} in each",
        "",
        f"| | ms a step | {unit} | the recipe is faster by |" + (" MFU |" if least else ""),
        "| --- | ---: | ---: | ---: |" + (" ---: |" if least else ""),
    ]
    for name, seconds in medians.items():
        ratio = f"{seconds / medians['recipe']:.2f}x" if name != "recipe" else ""
        lines.append(
            f"| {name} | {1000 * seconds:.1f} | {amount / seconds:,.0f} | {ratio} |"
            + (f" {least / seconds:.1%} |" if least else "")
        )
    return "\n".join(lines)


def _configuration(overrides: Sequence[str], steps: int) -> DictConfig:
    ours = [f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}", "export=false", "run_dir=none"]
    return composed([*overrides, *ours])


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as for train.py")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a turn (default %(default)s)")
    parser.add_argument("--output", type=Path, help="a Markdown file for the table")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    main()
