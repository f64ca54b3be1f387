"""How flat the place is where training ended: `python scripts/weight_noise.py outputs/experiments/optimizers-bert_mlm`.

Gaussian noise is added to every weight matrix of the best checkpoint of each run, as a share of the matrix' own root
mean square (so that larger weights do not look more robust), and the validation loss is measured again. The same
draws for every run. Lion is said to end in flatter regions than AdamW (Chen et al., 2023, arXiv:2302.06675, section 4).
"""

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the modules beside this one

from lion_lightning.tracking.compare import variants_of
from lion_lightning.tracking.plots import picture, styles_of
from lion_lightning.tracking.report import relative
from lion_lightning.tracking.runs import Run
from scripts.trained import load_run, run_folders

SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3)
DRAWS = 3
METRIC = "val/loss"
Losses = dict[float, list[float]]


@contextmanager
def noisy(model: nn.Module, share: float, seed: int) -> Iterator[None]:
    """`model` with normal noise on its matrices, of `share` of each one's root mean square; undone at the end."""
    kept: list[tuple[Tensor, Tensor]] = []
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:
                kept.append((weight, weight.detach().clone()))
                noise = torch.randn(weight.shape, generator=generator).to(weight)
                weight.add_(noise * share * weight.square().mean().sqrt())
    try:
        yield
    finally:
        with torch.no_grad():
            for noised, before in kept:
                noised.copy_(before)


def labels_of(folders: Sequence[Path]) -> dict[Path, str]:
    """What each run is called in a comparison: its optimizer, and what tells it from others of the same."""
    runs = [
        Run(str(folder), folder.name, folder.name, "", "finished", 0, _plain_config(folder), []) for folder in folders
    ]
    return {folder: variant.label for folder, variant in zip(folders, variants_of(runs), strict=True)}


def measure(folder: Path, shares: Sequence[float], draws: int) -> Losses:
    """The validation losses of a run under each share of noise."""
    cfg, module, data = load_run(folder)
    trainer = pl.Trainer(
        accelerator=cfg.trainer.accelerator, devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip

    def loss(share: float, seed: int) -> float:
        with noisy(module.model, share, seed):
            return float(trainer.validate(module, datamodule=data, verbose=False)[0][METRIC])

    return {share: [loss(share, seed) for seed in range(draws if share else 1)] for share in shares}


def rises(losses: Losses) -> dict[float, float]:
    """By how much the loss of each share lies above that without noise, on average over the draws."""
    return {share: statistics.fmean(values) - losses[0.0][0] for share, values in losses.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    options = _options(arguments)
    folders = run_folders(options.folders)
    if not folders:
        print(f"error: no run with a best checkpoint in {', '.join(map(str, options.folders))}", file=sys.stderr)
        return 2
    shares = sorted({0.0, *options.shares})
    by_optimizer: dict[str, list[dict[float, float]]] = {}
    for folder, label in labels_of(folders).items():
        losses = measure(folder, shares, options.draws)
        by_optimizer.setdefault(label, []).append(rises(losses))
        print(f"{relative(str(folder))}: {METRIC} {losses[0.0][0]:.4f}", flush=True)
    _tell(by_optimizer, shares)
    _write(by_optimizer, shares, options.output)
    return 0


def _plain_config(folder: Path) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))  # type: ignore[return-value]


def _tell(by_optimizer: dict[str, list[dict[float, float]]], shares: Sequence[float]) -> None:
    print(f"\nrise of {METRIC}, mean ± standard deviation over runs")
    width = max(map(len, by_optimizer)) + 1
    print("noise".ljust(width) + "".join(f"{share:>18.2f}" for share in shares))
    for optim, runs in by_optimizer.items():
        print(optim.ljust(width) + "".join(f"{_cell([run[share] for run in runs]):>18}" for share in shares))


def _cell(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else math.nan:.4f}"


def _write(by_optimizer: dict[str, list[dict[float, float]]], shares: Sequence[float], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.with_suffix(".csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["optimizer", "run", "noise", "rise"])
        writer.writerows(
            [optim, number, share, run[share]]
            for optim, runs in by_optimizer.items()
            for number, run in enumerate(runs)
            for share in shares
        )
    seeds = max(map(len, by_optimizer.values()))
    title = f"{METRIC} under noise on the weights{f', mean of {seeds} runs' if seeds > 1 else ''}"
    x_title = "noise, as a share of a matrix' root mean square"
    with picture(output.with_suffix(".png"), title, x_title, f"rise of {METRIC} (nats)") as axes:
        styles = styles_of(list(by_optimizer))
        for (optim, runs), (color, dash) in zip(by_optimizer.items(), styles, strict=True):
            means = [statistics.fmean(run[share] for run in runs) for share in shares]
            axes.plot(shares, means, color=color, linestyle=dash, marker="o", markersize=3, label=optim)
            for run in runs:
                axes.plot(shares, [run[share] for share in shares], color=color, linewidth=0.7, alpha=0.5)
    print(f"{relative(str(output.with_suffix('.png')))}, {output.with_suffix('.csv').name}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="folders with finished runs")
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES), help="noise (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=DRAWS, help="draws of noise for each (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/weight_noise"), help="without a suffix")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
