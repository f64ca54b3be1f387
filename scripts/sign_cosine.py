"""How much AdamW's first updates are sign updates: `python scripts/sign_cosine.py recipe=bert_mlm`.

Trains with AdamW at its tuned rate, without decay, schedule and clipping, and takes for each step the cosine between
its update and the sign of the step's gradient, the sign of the update itself, and the update that Lion would make of
the same gradients. Adam's first step is the sign of the gradient exactly; the claim is that it stays close at first
(Su, 2023, kexue.fm/archives/9473). A vector of independent normal numbers has a
cosine of sqrt(2/pi) = 0.798 with its own sign.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.optim import Optimizer

from lion_lightning.__main__ import composed
from lion_lightning.tracking.plots import picture, style_of
from lion_lightning.tracking.report import relative
from lion_lightning.training.build import build_callbacks, build_data, build_module

STEPS = 300
TOLD = (1, 2, 3, 5, 10, 20, 50, 100, 200, 300, 500, 1000)
LION_BETAS = (0.9, 0.99)
WITH = {"gradient": "the sign of the gradient", "itself": "its own sign", "lion": "Lion's update"}


class SignCosines(Callback):
    """Keeps `rows`: for each optimizer step the cosines of the update that was made, over all weights together.

    The optimizer must not decay: then what a step takes off the weights is its update times the learning rate.
    """

    def __init__(self, betas: tuple[float, float] = LION_BETAS) -> None:
        self.betas = betas
        self.rows: list[dict[str, float]] = []
        self._momentum: Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        optimizer.register_step_post_hook(self._after)

    # Not a step pre-hook: that is called before the closure, so it sees the gradients of the step before.
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        weights = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._gradient = _flat([weight.grad for weight in weights])
        self._weights, self._start = weights, _flat(weights)

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        update = self._start - _flat(self._weights)
        momentum = torch.zeros_like(update) if self._momentum is None else self._momentum
        beta1, beta2 = self.betas
        lion = torch.sign(beta1 * momentum + (1 - beta1) * self._gradient)
        self._momentum = beta2 * momentum + (1 - beta2) * self._gradient
        others = {"gradient": torch.sign(self._gradient), "itself": torch.sign(update), "lion": lion}
        cosines = {name: float(cosine_similarity(update, other, dim=0)) for name, other in others.items()}
        self.rows.append({"step": len(self.rows) + 1, **cosines})


def measure(overrides: Sequence[str], steps: int) -> list[dict[str, float]]:
    """Train `steps` optimizer steps of AdamW, and return the cosines at each."""
    # A constant rate: what is left of an update when the rate nears 0 is rounding.
    fixed = ["optim=adamw", "optim.weight_decay=0", "schedule=constant", "guard.gate=false", "guard.trace=null"]
    cfg = composed([*overrides, *fixed, "logger=none", "run_dir=outputs/sign_cosine"])
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    data = build_data(cfg)
    module = build_module(cfg, data)
    cosines = SignCosines()
    trainer = pl.Trainer(
        max_steps=steps, accelerator=cfg.trainer.accelerator, devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, use_distributed_sampler=False,
        callbacks=[*build_callbacks(cfg, "guard"), cosines],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return cosines.rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    options = _options(arguments)
    rows = measure(options.overrides, options.steps)
    print("cosine of AdamW's update with\nstep  " + "".join(f"{title:>27}" for title in WITH.values()))
    for row in rows:
        if row["step"] in TOLD or row is rows[-1]:
            print(f"{row['step']:<6.0f}" + "".join(f"{row[name]:>27.3f}" for name in WITH))
    _write(rows, options.output)
    return 0


def _flat(tensors: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors if tensor is not None])


def _write(rows: list[dict[str, float]], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.with_suffix(".csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["step", *WITH])
        writer.writeheader()
        writer.writerows(rows)
    title = f"{output.stem.removeprefix('sign_cosine-')}: AdamW's update beside sign vectors"
    with picture(output.with_suffix(".png"), title, "optimizer steps", "cosine with AdamW's update") as axes:
        steps = [row["step"] for row in rows]
        for number, (name, label) in enumerate(WITH.items()):
            axes.plot(steps, [row[name] for row in rows], color=style_of(number)[0], label=label)
        expected = (2 / torch.pi) ** 0.5
        axes.axhline(expected, color="grey", linestyle="--", linewidth=1, label="normal numbers and their sign")
        axes.set(xscale="log", ylim=(-0.5, 1.02))
    print(f"{relative(str(output.with_suffix('.png')))}, {output.with_suffix('.csv').name}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, such as recipe=image_classification")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/sign_cosine"), help="without a suffix")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
