"""Checks of a run's settings before the first step, and of the batch that its steps really use."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.optim import Optimizer

from lion_lightning.guard.rules import Average, Stateful, Symptom
from lion_lightning.optim import Lion, layout

MIN_BATCH_SIZE = 64
"""Lion's advantage over AdamW was measured at 64 and more (Chen et al., 2023, arXiv:2302.06675, section 5)."""
OnSmallBatch = Literal["warn", "accumulate", "error"]
NOISE_HALF_LIFE_STEPS = 50.0

TURNOVER_LIMIT = 200.0
"""Of `turnover`. In our runs of 300 to 8,000 steps the best rates were at 10 to 55 (docs/guard.md); the published best
of a GPT with 124 M parameters is near 170 (Semenov et al., 2025, arXiv:2509.01440)."""
CONVOLUTION_TURNOVER_LIMIT = 2000.0
"""The same for convolutions, whose size is free where a norm follows: the best rate of a search was at 86
(docs/experiments.md#cifar10)."""
LONGEST_MEMORY = 100.0
"""Steps; what a longer memory of the momentum tolerates is not known."""
FAR_TOO_HIGH, ADVISED = 4.0, 0.25  # times the limit; the best rates of our runs are at a quarter of it and below
ADAMW_LR, ADAMW_DECAY = 1e-3, 0.1
"""A Lion with at least this rate and at most this decay has AdamW's numbers."""
LEAST_DECAY = 0.005
"""Share of itself that a weight should lose to decay over a run, if decay is asked for at all."""
SHORT_RUN_STEPS = 1000
"""Runs of up to this many steps are trials: their decay is judged as if they were this long."""
BETA1_RANGE, BETA2_RANGE = (0.8, 0.99), (0.9, 0.9999)
NO_WARMUP_STEPS = 10
"""A shorter run has no step to warm up in."""
HALF_SPACING_BF16 = 2.0**-9
"""Half the distance of neighbouring bf16 numbers, relative to their size (at its largest)."""
# Messages about what shows only in training.
NO_GRADIENTS = (
    "there are no gradients when the optimizer steps (are they released in backward?): the guard sees the loss alone, "
    "and cannot gate steps"
)
EVAL_MODE = (
    "the module is in evaluation mode in a training step: dropout is off and batch norm learns no statistics; "
    "call train() if an eval() was left behind"
)
LATE_GRADIENTS = (
    "the gradients were not finite step after step, and the module has hooks before the optimizer's step: from "
    "now on they are judged after these"
)
UNSEEN_STEPS = (
    "the optimizer steps without Lightning's hook on_before_optimizer_step (a raw optimizer, as of "
    "self.optimizers(use_pl_optimizer=False)?): the guard does not see these steps; warm-up applies to them"
)


@dataclass(frozen=True)
class RunSettings:
    """Settings that preflight checks beside the optimizer.

    Attributes:
        total_steps: optimizer steps of the whole run; infinite if it is not known.
        warmup_steps: of the guard.
        batch_size: samples of an optimizer step; None if it is known only in training.
        gradient_clip_val: the Trainer's.
        gate: whether the guard clips outliers.
        min_batch_size: of the guard.
    """

    total_steps: float
    warmup_steps: int
    batch_size: int | None = None
    gradient_clip_val: float | None = None
    gate: bool = True
    min_batch_size: int = MIN_BATCH_SIZE


def inspect(optimizer: Optimizer, run: RunSettings) -> list[Symptom]:
    """What is probably wrong with one optimizer's settings; checks that are special to Lion are left out for others.

    Args:
        optimizer: with the rates, decays and weights that training starts from.
        run: the other settings.

    Returns:
        Of the kinds lr, decay, warmup, bf16, betas, batch_size and clipping.
    """
    batch = EffectiveBatch(run.min_batch_size)
    batch.last = run.batch_size or 0
    messages = {"bf16": _bf16(optimizer), "batch_size": batch.advice() if batch.is_small else None}
    if isinstance(optimizer, Lion):
        messages |= {
            "lr": _lr(optimizer),
            "decay": _decay(optimizer, run),
            "warmup": _warmup(optimizer, run),
            "betas": _betas(optimizer),
            "clipping": _clipping(run),
        }
    return [Symptom(kind, message) for kind, message in messages.items() if message is not None]


@torch.no_grad()
def turnover(optimizer: Optimizer, of_convolutions: bool = False) -> float:
    """Mean of lr * sqrt(fan_in) / RMS(p) / (1 - beta2) over the elements of all matrices; 0 if there are none.

    A sign step along an input changes a layer's output by lr * fan_in * RMS(x), and the output itself is about
    sqrt(fan_in) * RMS(p) * RMS(x): so lr * sqrt(fan_in) / RMS(p) is the largest relative change that one step can make.
    It takes the width into account, where lr / RMS(p) (the alpha_0 of Amos, arXiv:2210.11693) does not. The steps go
    in one direction for as long as the momentum remembers, 1 / (1 - beta2) of them.

    Args:
        optimizer: with the weights that training starts from.
        of_convolutions: whether the mean is over parameters with more than two dimensions instead.
    """
    parts, elements = 0.0, 0
    for group, param in _matrices(optimizer):
        scale = _rms(param)
        if scale > 0 and (param.ndim > 2) == of_convolutions:  # a layer that starts at zero has no scale yet
            memory = 1 / max(1 - group["betas"][1], 1 / LONGEST_MEMORY)
            parts += param.numel() * _peak(group) * math.sqrt(param.shape[1:].numel()) / scale * memory
            elements += param.numel()
    return parts / elements if elements else 0.0


def _lr(optimizer: Optimizer) -> str | None:
    if not any(_peak(group) for group in optimizer.param_groups):
        return "lr=0: no weight will move; set a rate above 0"
    value, limit = turnover(optimizer), TURNOVER_LIMIT
    if value <= limit:
        value, limit = turnover(optimizer, of_convolutions=True), CONVOLUTION_TURNOVER_LIMIT
    if value <= limit:
        return next((found for group in optimizer.param_groups if (found := _adamw_numbers(group))), None)
    lr = max(_peak(group) for group in optimizer.param_groups)
    advice = (
        "this looks like an AdamW rate: set a tenth to a third of it (hyperparams.from_adamw)"
        if value <= FAR_TOO_HIGH * limit
        else f"far too high: the loss will be flat, not explode; try {lr * ADVISED * limit / value:.1g}"
    )
    return (
        f"lr={lr:g} moves the matrices {value:.0f} times their own effect while the momentum remembers a gradient "
        f"(limit {limit:.0f}); {advice}"
    )


def _adamw_numbers(group: dict[str, Any]) -> str | None:
    """A rate that is high beside a decay that is small, for Lion. SIGNUM, whose betas are equal, takes such numbers."""
    lr, decay = _peak(group), group["weight_decay"]
    if lr < ADAMW_LR or not 0 < decay <= ADAMW_DECAY or group["betas"][0] == group["betas"][1]:
        return None
    return (
        f"lr={lr:g} with weight_decay={decay:g} are numbers for AdamW: Lion(**from_adamw({lr:g}, {decay:g})) takes a "
        "rate 3 to 10 times smaller and a decay as much larger"
    )


def _decay(optimizer: Optimizer, run: RunSettings) -> str | None:
    pairs = [(_peak(group), group["weight_decay"]) for group in optimizer.param_groups if group["weight_decay"] > 0]
    if not pairs or not max(pairs)[0]:
        return None
    lr, decay = max(pairs)
    if lr * decay > 0.1:
        return f"lr * weight_decay = {lr * decay:.2g} takes over 10 % of a weight a step; lower it"
    if len({_peak(group) for group in optimizer.param_groups}) > 1:  # set group by group, not taken over from AdamW
        return None
    steps = max(run.total_steps, SHORT_RUN_STEPS) if math.isfinite(run.total_steps) else math.inf
    lost = lr * decay * steps / 2  # a schedule's mean is about half its peak
    if lost >= LEAST_DECAY:
        return None
    return (
        f"weight_decay={decay:g} with lr={lr:g} takes {lost:.1e} of a weight over the whole run: as good as none; "
        "with a rate 3 to 10 times lower than AdamW's, Lion needs a decay 3 to 10 times higher"
    )


def _warmup(optimizer: Optimizer, run: RunSettings) -> str | None:
    starts_high = any(float(group["lr"]) > 0.5 * _peak(group) for group in optimizer.param_groups)
    if run.warmup_steps > 0 or not starts_high or run.total_steps < NO_WARMUP_STEPS:
        return None
    return (
        "there is no warm-up: Lion's first steps are full-size steps in a noisy direction; set warmup_steps, such as "
        "0.05 for 5 % of the run"
    )


def _bf16(optimizer: Optimizer) -> str | None:
    """Our Lion does not round to nearest; whoever does loses steps below half the spacing of bf16."""
    if isinstance(optimizer, Lion):
        return None
    pairs = [(_peak(group), _rms(param)) for group, param in _matrices(optimizer) if param.dtype == torch.bfloat16]
    lost = [lr for lr, scale in pairs if 0 < lr < HALF_SPACING_BF16 * scale]
    if len(lost) * 2 <= len(pairs):
        return None
    return (
        f"lr={max(lost):g} is below half the spacing of bf16 numbers of the weights' size: most steps of "
        f"{type(optimizer).__name__} will be rounded away; train in fp32 or bf16-mixed, or use lion_lightning.Lion"
    )


def _betas(optimizer: Optimizer) -> str | None:
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"]
        if not (BETA1_RANGE[0] <= beta1 <= BETA1_RANGE[1] and BETA2_RANGE[0] <= beta2 <= BETA2_RANGE[1]):
            return f"betas=({beta1:g}, {beta2:g}) are unusual; try (0.9, 0.99), or (0.95, 0.98) for text"
    return None


def _clipping(run: RunSettings) -> str | None:
    if not run.gradient_clip_val or not run.gate:
        return None
    return (
        f"gradient_clip_val={run.gradient_clip_val:g} and the guard's own clipping are both on: a fixed limit has no "
        "effect on Lion unless it changes from step to step; leave clipping to the guard"
    )


def _matrices(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Each matrix with its group."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.ndim >= 2 and param.numel():
                yield group, param


def _peak(group: dict[str, Any]) -> float:
    """The rate before any schedule; 0 for a group that has none."""
    return float(group.get("initial_lr", group.get("lr")) or 0.0)


def _rms(param: Tensor) -> float:
    local = layout.local(param.detach())
    return float(local.float().square().mean().sqrt()) if local.numel() else 0.0


def batch_size(trainer: Trainer) -> int | None:
    """Samples of an optimizer step by the settings; None if neither data module nor loader has a batch size."""
    given = getattr(trainer.fit_loop, "_data_source", None)  # before the loaders are set up
    sources = (getattr(trainer, "datamodule", None), trainer.train_dataloader, getattr(given, "instance", None))
    size = next((size for source in sources if (size := getattr(source, "batch_size", None))), None)
    return size * trainer.accumulate_grad_batches * trainer.world_size if isinstance(size, int) else None


def raise_accumulation(trainer: Trainer, on_small_batch: OnSmallBatch, least: int) -> str | None:
    """Raises the accumulation so that a step has `least` samples, before optimizers and loaders are made.

    Args:
        trainer: changed in place.
        on_small_batch: "accumulate" or "error".
        least: samples of an optimizer step.

    Returns:
        A line that says so, or None where nothing had to be done.

    Raises:
        ValueError: with "error", if the batch is too small; if its size is not known; or under manual optimization.
    """
    size, before = batch_size(trainer), trainer.accumulate_grad_batches
    if size is None:
        raise ValueError(
            f"on_small_batch={on_small_batch!r} needs the batch size before training: give the data module a "
            "batch_size, or use on_small_batch='warn'"
        )
    if size >= least:
        return None
    if on_small_batch == "error":
        raise ValueError(
            f"the effective batch is {size} samples, below min_batch_size={least} (on_small_batch='error')"
        )
    if not trainer.lightning_module.automatic_optimization:
        raise ValueError("on_small_batch='accumulate' cannot act under manual optimization: use 'warn' or 'error'")
    kinds = [kind.__name__ for callback in trainer.callbacks for kind in type(callback).__mro__]  # type: ignore[attr-defined]
    if "GradientAccumulationScheduler" in kinds:
        raise ValueError("on_small_batch='accumulate' cannot act beside a GradientAccumulationScheduler: use 'warn'")
    micro_batch = size // before
    trainer.accumulate_grad_batches = max(before, -(-least // micro_batch))
    # Of micro-batches over the whole run, as in our recipes; within an epoch, which has no more of them, it stays.
    if isinstance(trainer.val_check_interval, int) and trainer.check_val_every_n_epoch is None:
        trainer.val_check_interval = trainer.val_check_interval * trainer.accumulate_grad_batches // before
    return f"accumulate_grad_batches is {trainer.accumulate_grad_batches}, not {before}, for {least} samples a step"


def samples_in(batch: Any) -> int:
    """Samples of a micro-batch; 0 where its structure does not determine them.

    Tensors of unequal first dimensions (time-major or ragged data), lists of images, and lists of batches, as several
    data loaders give, are ambiguous.
    """
    try:
        graphs = getattr(batch, "num_graphs", None)
    except Exception:  # dicts whose items are attributes raise KeyError
        graphs = None
    if isinstance(graphs, int):
        return graphs
    if isinstance(batch, PackedSequence):
        return int(batch.batch_sizes[0])
    if isinstance(batch, (list, tuple)) and batch and all(isinstance(it, Tensor) and it.ndim == 3 for it in batch):
        return 0  # images
    if isinstance(batch, Mapping):
        entries: Sequence[Any] = [batch[key] for key in batch]  # `batch.values` may be an item
    else:
        entries = batch if isinstance(batch, (list, tuple)) else (batch,)
    sizes = [entry.size(0) for entry in entries if isinstance(entry, Tensor) and entry.ndim]
    if not sizes and isinstance(batch, (list, tuple, Mapping)):
        lists = [entry for entry in entries if isinstance(entry, (list, tuple))]
        sizes = [0 if _is_batch(entry) else len(entry) for entry in lists]
    return sizes[0] if sizes and sizes.count(sizes[0]) == len(sizes) else 0


def _is_batch(entry: Sequence[Any]) -> bool:
    """Whether a list holds the tensors of a batch, such as inputs and targets, and not the samples themselves."""
    shapes = [it.shape for it in entry if isinstance(it, Tensor) and it.ndim]
    are_images = all(len(shape) == 3 for shape in shapes)
    return 1 < len(shapes) == len(entry) and len({shape[0] for shape in shapes}) == 1 and not are_images


class EffectiveBatch(Stateful):
    """Counts the samples that go into each optimizer step: every micro-batch, every rank, short tails as they are.

    Attributes:
        min_batch_size: below it `is_small` is true.
        last: samples of the last finished optimizer step; 0 before the first.
        pending: samples of the current step so far.
    """

    STATE = ("last", "pending")

    def __init__(self, min_batch_size: int = MIN_BATCH_SIZE) -> None:
        self.min_batch_size = min_batch_size
        self.last = self.pending = 0

    def close(self) -> None:
        """The optimizer steps on what was added to `pending` since the last time."""
        self.last, self.pending = self.pending, 0

    @property
    def is_small(self) -> bool:
        return 0 < self.last < self.min_batch_size

    def advice(self) -> str:
        """One line: what was seen, why it matters, what to do."""
        accumulate = -(-self.min_batch_size // max(1, self.last))
        return (
            f"the effective batch is {self.last} samples, below {self.min_batch_size}: Lion's sign makes small batches "
            f"noisier, and its published advantage over AdamW was measured at {MIN_BATCH_SIZE} and more; accumulate "
            f"{accumulate} times as many batches or raise the batch size"
        )


class NoiseScale(Stateful):
    """The gradient noise scale: the batch size at which noise and signal of a gradient are equal.

    B_simple = tr(covariance of one sample's gradient) / |gradient|^2, estimated from the norms of gradients over two
    batch sizes. Both parts are averaged over steps before they are divided: the estimate of one step is far too noisy.
    Source: McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, arXiv:1812.06162, appendix A.1.
    """

    STATE = ("noise", "signal")

    def __init__(self) -> None:
        self.noise, self.signal = Average(NOISE_HALF_LIFE_STEPS), Average(NOISE_HALF_LIFE_STEPS)

    def observe(self, small_square: float, small_batch: int, large_square: float, large_batch: int) -> None:
        """Takes in a step; values that are not finite, or equal sizes, are left out.

        Args:
            small_square, large_square: squared norms of the mean gradients over the two batches.
            small_batch, large_batch: their samples.
        """
        if not 0 < small_batch < large_batch or not math.isfinite(small_square + large_square):
            return
        self.noise.add((small_square - large_square) / (1 / small_batch - 1 / large_batch))
        self.signal.add((large_batch * large_square - small_batch * small_square) / (large_batch - small_batch))

    @property
    def value(self) -> float:
        """B_simple in samples; NaN before it is known, infinite where the signal is lost in the noise."""
        if not self.noise.count:
            return math.nan
        return max(0.0, self.noise.value) / self.signal.value if self.signal.value > 0 else math.inf
