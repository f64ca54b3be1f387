"""bf16 weights at low learning rates: `python scripts/low_rates.py RUN` goes on from a finished run of bert_mlm.

Every variant starts from the same weights, rounded to bf16, and sees the same batches and masks. Only the storage of
the weights and the optimizer differ: forward and backward pass are computed in fp32 from the stored weights, and bf16
weights get bf16 gradients, so that what is measured is the optimizer's rounding alone. Lion's variants share rate and
decay; AdamW has three times the rate and a third of the decay. A finished cell is not repeated: two processes with
different `--seeds` may write to the same file. A file is for one first run, known by its validation loss.
"""

import argparse
import csv
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.optim import Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the modules beside this one

from lion_lightning import Lion
from lion_lightning.tracking.plots import style_of
from lion_lightning.tracking.report import relative
from scripts.trained import load_run, trainer_stand_in

EXIT_USAGE = 2
ADAMW_FACTOR = 3.0
DECAY = 1.0
BETAS = (0.9, 0.95)
SAME_START = 1e-3  # nats between one first run's validation losses on different processors
NEAREST = ("lion-pytorch bf16", "adamw bf16")
COLORS = {
    "fp32 weights": "#999999",
    "bf16 weights, this Lion": style_of(0)[0],
    "bf16 weights, rounded to nearest": style_of(1)[0],
}
Groups = list[dict[str, Any]]
Make = Callable[[Groups, float], Optimizer]
"""(parameter groups, learning rate) -> optimizer."""


@dataclass(frozen=True)
class Rate:
    """A learning rate over the run: constant, or the tail of a cosine that ends at zero."""

    peak: float
    shape: str

    def at(self, progress: float) -> float:
        """The rate after `progress`, a share of the run between 0 and 1."""
        return self.peak * (1.0 if self.shape == "constant" else 0.5 * (1.0 + math.cos(math.pi * progress)))

    def __str__(self) -> str:
        return f"{self.peak:g} {self.shape}"


RATES = (Rate(1e-5, "constant"), Rate(3e-5, "constant"), Rate(1e-4, "cosine"))


@dataclass(frozen=True)
class Cell:
    """The result of one training.

    Attributes:
        loss: Validation loss at the end.
        start: Validation loss of the weights that training started from.
        travelled: Euclidean distance between the matrices at the end and at the start.
        norm: Norm of the matrices at the end, as a share of that at the start.
    """

    variant: str
    rate: str
    seed: int
    steps: int
    batch_size: int
    start: float
    loss: float
    travelled: float
    norm: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    options = _options(arguments)
    chosen = {name: make for name, make in variants().items() if not options.variants or name in options.variants}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    table = options.output.with_suffix(".csv")
    if table.is_file() and "batch_size" not in table.read_text(encoding="utf-8").partition("\n")[0]:
        print(f"error: {table} is of an earlier version, without the batch size: use another --output", file=sys.stderr)
        return EXIT_USAGE
    if (reason := _of_another_run(read(table), options)) is not None:
        print(f"error: {reason}", file=sys.stderr)
        return EXIT_USAGE
    budget = options.steps, options.batch_size
    for seed in options.seeds:
        for rate in RATES:
            for name, (dtype, make) in chosen.items():
                key = name, str(rate), seed, *budget
                if all(
                    (cell.variant, cell.rate, cell.seed, cell.steps, cell.batch_size) != key for cell in read(table)
                ):
                    cell = Cell(*key, *train(options.run, dtype, make, rate, seed, *budget))
                    append(table, cell)
                    print(f"{name:>16}  {rate}  seed {seed}: {cell.start:.4f} -> {cell.loss:.4f}", flush=True)
    cells = [cell for cell in read(table) if (cell.steps, cell.batch_size) == budget]
    print(markdown(cells))
    draw(cells, options.output.with_suffix(".png"))
    print(f"{relative(str(table))}, {options.output.with_suffix('.png').name}")
    return 0


def train(
    run: Path, dtype: torch.dtype, make: Make, rate: Rate, seed: int, steps: int, batch_size: int
) -> tuple[float, float, float, float]:
    """Go on from `run` in a plain loop.

    Args:
        run: Folder of a finished run with a best checkpoint.
        dtype: How the weights are stored.
        make: Makes the optimizer.
        rate: The learning rate over the run.
        seed: Keys the order of the data and the masks.
        steps: Optimizer steps.
        batch_size: Blocks of a step.

    Returns:
        Validation loss at the start and at the end, distance travelled, and norm as a share of the start's.
    """
    module, data = _loaded(run, seed, steps, batch_size)
    used = list(module.parameters())
    stored = [nn.Parameter(weight.detach().bfloat16().to(dtype)) for weight in used]
    matrices = [weight for weight in stored if weight.ndim >= 2]
    groups = [
        {"params": matrices, "weight_decay": DECAY},
        {"params": [weight for weight in stored if weight.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = make(groups, rate.peak)
    peaks = [group["lr"] for group in optimizer.param_groups]
    _copy(stored, used)
    start, before = _loss(module, data), _flat(matrices)
    for step, batch in enumerate(data.train_dataloader()):
        _copy(stored, used)
        loss = module.train().training_step(batch, step)
        gradients = torch.autograd.grad(loss, used)
        for weight, gradient in zip(stored, gradients, strict=True):
            weight.grad = gradient.to(dtype)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate.at(step / steps) / rate.peak
        optimizer.step()
    _copy(stored, used)
    after = _flat(matrices)
    return start, _loss(module, data), float((after - before).norm()), float(after.norm() / before.norm())


def _loaded(run: Path, seed: int, steps: int, batch_size: int) -> tuple[Any, Any]:
    """Module and data of a run, for a loop without a Trainer."""
    _, module, data = load_run(run, [f"seed={seed}", f"data.seed={seed}", f"data.batch_size={batch_size}"])
    data.trainer = module.trainer = trainer_stand_in(steps, torch.device("cpu"))
    module.log = lambda *_, **__: None
    return module, data


def _of_another_run(cells: Sequence[Cell], options: argparse.Namespace) -> str | None:
    """Why a table's cells cannot be continued from the run; None if they can, or there are none."""
    if not cells:
        return None
    module, data = _loaded(options.run, cells[0].seed, options.steps, options.batch_size)
    weights = list(module.parameters())
    _copy([weight.bfloat16() for weight in weights], weights)
    start = _loss(module, data)
    others = [cell.start for cell in cells if abs(cell.start - start) > SAME_START]
    if not others:
        return None
    table = options.output.with_suffix(".csv")
    return (
        f"{table} began from val/loss {others[0]:.4f}, and {options.run} has {start:.4f}; "
        "choose another file with --output"
    )


def read(table: Path) -> list[Cell]:
    """The cells of a table; none if the file is missing."""
    if not table.is_file():
        return []
    with table.open(newline="", encoding="utf-8") as stream:
        return [
            Cell(row["variant"], row["rate"], *(int(row[key]) for key in ("seed", "steps", "batch_size")),
                 *(float(row[key]) for key in ("start", "loss", "travelled", "norm")))
            for row in csv.DictReader(stream)
        ]  # fmt: skip


def append(table: Path, cell: Cell) -> None:
    """Write a cell at the end of a table."""
    with FileLock(f"{table}.lock"), table.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(asdict(cell)))
        if not stream.tell():
            writer.writeheader()
        writer.writerow(asdict(cell))


def markdown(cells: Sequence[Cell]) -> str:
    """A table: per variant and rate the fall of the loss, and that of the weights' norm as a share of fp32's."""
    rates = list(dict.fromkeys(cell.rate for cell in cells))
    lines = ["| variant | " + " | ".join(f"{rate}: loss falls by | norm" for rate in rates) + " |"]
    lines.append("| --- |" + " ---: |" * (2 * len(rates)))
    for variant in dict.fromkeys(cell.variant for cell in cells):
        words = []
        for rate in rates:
            fall, reach = interval(_falls(cells, variant, rate)), interval(_norms(cells, variant, rate))
            words += [
                f"{fall[0]:.4f} ± {fall[1]:.4f}",
                "-" if math.isnan(reach[0]) else f"{round(100 * reach[0]) + 0}%",
            ]
        lines.append(f"| {variant} | " + " | ".join(words) + " |")
    return "\n".join(lines)


def _falls(cells: Sequence[Cell], variant: str, rate: str) -> list[float]:
    """The fall of the loss, per seed."""
    return [cell.start - cell.loss for cell in cells if (cell.variant, cell.rate) == (variant, rate)]


def _norms(cells: Sequence[Cell], variant: str, rate: str) -> list[float]:
    """The fall of the norm as a share of the same optimizer's in fp32, per seed that both have."""
    control = "adamw fp32" if variant.startswith("adamw") else "lion fp32"
    of = {(cell.variant, cell.seed): 1 - cell.norm for cell in cells if cell.rate == rate}
    return [fall / of[control, seed] for (name, seed), fall in of.items() if name == variant and (control, seed) in of]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval by Student's t; NaN for the half of a single value, and both for none."""
    from scipy import stats

    if not values:
        return math.nan, math.nan
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return mean, float(stats.t.ppf(0.975, len(values) - 1)) * spread / math.sqrt(len(values))


def draw(cells: Sequence[Cell], file: Path) -> None:
    """A panel per rate: how far the loss falls, a bar per variant with its 95 % interval."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rates = list(dict.fromkeys(cell.rate for cell in cells))
    names = list(dict.fromkeys(cell.variant for cell in cells))[::-1]
    figure = Figure(figsize=(9, 3.2), dpi=150)
    panels = figure.subplots(1, len(rates), sharey=True, squeeze=False)
    for axes, rate in zip(panels[0], rates, strict=True):
        falls = [interval(_falls(cells, name, rate)) for name in names]
        colors = [COLORS[_storage(name)] for name in names]
        axes.barh(names, [mean for mean, _ in falls], xerr=[half for _, half in falls], color=colors, ecolor="black")
        peak, shape = rate.split()
        axes.set(
            title=f"{'' if shape == 'constant' else shape + ' from '}lr {float(peak):.0e}", xlabel="fall of val/loss"
        )
        axes.axvline(0, color="black", linewidth=0.6)
        axes.grid(axis="x", alpha=0.3)
    patches = [Patch(color=color, label=label) for label, color in COLORS.items()]
    figure.legend(handles=patches, loc="lower center", ncols=len(patches), frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(file)


def _storage(variant: str) -> str:
    """The key of a variant in `COLORS`."""
    fp32, ours, nearest = COLORS
    return fp32 if variant.endswith("fp32") else nearest if variant in NEAREST else ours


def variants() -> dict[str, tuple[torch.dtype, Make]]:
    """By name: the dtype of the weights, and what makes the optimizer."""
    half, full = torch.bfloat16, torch.float32

    def lion(**options: Any) -> Make:
        return lambda groups, lr: Lion(groups, lr, betas=BETAS, **options)

    def adamw(groups: Groups, lr: float) -> Optimizer:
        for group in groups:
            group["weight_decay"] /= ADAMW_FACTOR
        return torch.optim.AdamW(groups, lr=lr * ADAMW_FACTOR, betas=(0.9, 0.98))

    def nearest(groups: Groups, lr: float) -> Optimizer:
        from lion_pytorch import Lion as Peer

        return Peer(groups, lr=lr, betas=BETAS)

    return {
        "lion fp32": (full, lion()),
        "lion bf16/32": (half, lion()),
        "lion bf16/24": (half, lion(weight_bits=24)),
        "lion bf16/16": (half, lion(weight_bits=16)),
        "lion bf16/16 int8": (half, lion(weight_bits=16, momentum_dtype="int8")),
        "lion-pytorch bf16": (half, nearest),
        "adamw fp32": (full, adamw),
        "adamw bf16": (half, adamw),
    }


@torch.no_grad()
def _loss(module: Any, data: Any) -> float:
    module.eval()
    for number, batch in enumerate(data.val_dataloader()):
        module.validation_step(batch, number)
    loss = float(module.val_loss.compute())
    module.val_loss.reset()
    module.val_accuracy.reset()
    return loss


@torch.no_grad()
def _copy(stored: Sequence[Tensor], used: Sequence[Tensor]) -> None:
    for weight, copy in zip(stored, used, strict=True):
        copy.copy_(weight)


def _flat(weights: Sequence[Tensor]) -> Tensor:
    return torch.cat([weight.detach().double().flatten() for weight in weights])


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run of bert_mlm")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="blocks of a step (default: %(default)s)")
    seeds: dict[str, Any] = {"type": lambda text: [int(seed) for seed in text.split(",")], "default": [1, 2, 3]}
    parser.add_argument("--seeds", **seeds, help="orders of the data (default: 1,2,3)")
    parser.add_argument("--variants", nargs="+", choices=tuple(variants()), help="default: all")
    parser.add_argument("--output", type=Path, default=Path("outputs/low_rates"), help="without a suffix")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
