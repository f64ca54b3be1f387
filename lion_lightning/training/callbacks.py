"""The small Lightning callbacks of a run: progress, random numbers per step, equal replicas, averaged weights."""

from collections.abc import Sequence
from typing import Any

import rich
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, WeightAveraging
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from rich.console import Console
from torch import Tensor
from typing_extensions import override

from lion_lightning.errors import ConfigError, check_number
from lion_lightning.training.checkpoint.sharded import ShardedStrategy

METRICS_FORMAT = ".3f"
WIDE_ENOUGH_FOR_RATE = 100  # columns of the terminal
LOSS_HALF_LIFE_STEPS = 20
WARMUP_UPDATES = 10  # of the decay: without it a short run's average is mostly its first weights
SEED_STRIDE, BATCH_STRIDE, RANK_STRIDE = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # odd, 64 bits
MASK64 = 2**64 - 1
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
HASH_MULTIPLIER = 0x100000001B3  # of the FNV hash: odd, so that the order of tensors counts


def progress(console: Console, metrics: Sequence[str]) -> list[Callback]:
    """The callbacks that show progress: a bar in a terminal, and a line per validation everywhere.

    Args:
        console: where to; the bar is drawn on rich's own, `rich.get_console()`.
        metrics: names to print, those that exist at the time; the first is shown beside the bar.
    """
    lines = ValidationLines(metrics, console)
    return [StepBar(metrics[0]), lines] if console.is_terminal else [lines]


class StepBar(RichProgressBar):
    """Lightning's bar over the steps of the whole run, also after a resume; a run here is one stream of steps.

    Args:
        metric: name of the loss that is shown; the learning rate is shown too where there is room.
    """

    def __init__(self, metric: str) -> None:
        super().__init__(theme=RichProgressBarTheme(metrics_format=METRICS_FORMAT), leave=False)
        self.metric = metric

    @property
    @override
    def total_train_batches(self) -> int:
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.fit_loop.total_batch_idx)

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        loss = trainer.callback_metrics.get(self.metric)
        shown: dict[str, Any] = {} if loss is None else {"loss": float(loss)}
        if rich.get_console().width >= WIDE_ENOUGH_FOR_RATE:
            shown["lr"] = f"{float(trainer.optimizers[0].param_groups[0]['lr']):.2g}"
        return shown

    @override  # private in Lightning, which has no setting for the text
    def _get_train_description(self, current_epoch: int) -> str:
        return "Training".ljust(len(self.validation_description))  # as wide, so that the bars do not jump


class ValidationLines(Callback):
    """Prints `step 200/1000  train/loss 5.912  val/loss 5.870` after each validation, for logs and pipes.

    Args:
        metrics: names to print, those that exist at the time.
        console: where to.
    """

    def __init__(self, metrics: Sequence[str], console: Console) -> None:
        self.metrics, self.console = metrics, console

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.is_global_zero:
            values = trainer.callback_metrics
            shown = [f"{name} {float(values[name]):{METRICS_FORMAT}}" for name in self.metrics if name in values]
            self.console.print(f"step {trainer.global_step}/{trainer.max_steps}  {'  '.join(shown)}", highlight=False)


class ValidateAtEnd(Callback):
    """Makes the last optimizer step end with a validation, whether or not the interval divides the run."""

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True


class StepSeed(Callback):
    """Seeds torch (CPU and accelerator) from (seed, number of the micro-batch in the run, rank) before each forward.

    Dropout and whatever else draws from torch's generators in `training_step` is then a function of the step alone:
    Lightning's checkpoints hold no generator state, so a resumed run would draw other numbers. Python's and numpy's
    generators are left alone; the recipes do not use them after the start.

    Args:
        seed: that of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        micro_batch, rank = trainer.fit_loop.total_batch_idx, trainer.global_rank
        # 63 bits, mixed as in SplitMix64 (Steele, 2014).
        state = (self.seed * SEED_STRIDE + micro_batch * BATCH_STRIDE + rank * RANK_STRIDE) & MASK64
        state = ((state ^ (state >> 30)) * BATCH_STRIDE) & MASK64
        state = ((state ^ (state >> 27)) * RANK_STRIDE) & MASK64
        torch.manual_seed((state ^ (state >> 31)) >> 1)


class ReplicasDiffer(RuntimeError):
    """Ranks that should hold the same weights do not. The message names them."""


class ReplicaCheck(Callback):
    """Compares the replicas of data-parallel ranks by a hash, at intervals; skips sharded tensors.

    Reads all weights and optimizer state once and sends 8 bytes a rank.

    Args:
        every_n_steps: optimizer steps between checks; 0 for none.

    Raises:
        ReplicasDiffer: during training, on all ranks.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self._step = 0

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step, before = trainer.global_step, self._step
        self._step = step
        if trainer.world_size == 1 or not self.every_n_steps or step == before or step % self.every_n_steps:
            return
        mine = replica_hash(trainer).view(1)
        gathered = [torch.empty_like(mine) for _ in range(trainer.world_size)]
        dist.all_gather(gathered, mine)  # Lightning's own warns of a function of torch that is going away
        hashes = torch.cat(gathered).tolist()
        if len(set(hashes)) > 1:
            usual = max(hashes, key=hashes.count)
            odd = ", ".join(str(rank) for rank, value in enumerate(hashes) if value != usual)
            raise ReplicasDiffer(
                f"after step {step} the weights or the optimizer state of rank {odd} differ from those "
                "of the other ranks; the checkpoints from before the last check are alike on all ranks"
            )


def replica_hash(trainer: Trainer) -> Tensor:
    """A hash of every bit of weights and optimizer state that is not sharded; int64 of shape ()."""
    total = torch.zeros((), dtype=torch.int64, device=trainer.strategy.root_device)
    for optimizer in trainer.optimizers:
        for param in (param for group in optimizer.param_groups for param in group["params"]):
            for tensor in (param, *(value for _, value in sorted(optimizer.state.get(param, {}).items()))):
                if isinstance(tensor, Tensor) and not hasattr(tensor, "to_local"):
                    bits = tensor.detach().contiguous().view(INTEGERS[tensor.element_size()])
                    total = total * HASH_MULTIPLIER + bits.sum(dtype=torch.int64).to(total.device)
    return total


class SmoothedLoss(Callback):
    """Logs `train/loss_smoothed`: the exponential moving average of the training loss, with a half-life of 20 steps.

    The average has no bias towards its start, leaves out losses that are not finite, and is restored exactly. It is of
    the micro-batches of one process, as `train/loss` is, and is kept on the device without synchronising.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # of the losses and of their weights: float32 (2,)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        micro_batches = trainer.accumulate_grad_batches
        loss = outputs["loss"].detach().float() * micro_batches  # Lightning has divided it
        sums = loss.new_zeros(2) if self._sums is None else self._sums.to(loss.device)
        new = torch.stack([loss, torch.ones_like(loss)])
        averaged = sums.lerp(new, 1 - 0.5 ** (1 / (LOSS_HALF_LIFE_STEPS * micro_batches)))
        self._sums = torch.where(loss.isfinite(), averaged, sums)
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log("train/loss_smoothed", self._sums[0] / self._sums[1])

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"sums": None if self._sums is None else self._sums.tolist()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sums = None if state_dict["sums"] is None else torch.tensor(state_dict["sums"])


class AverageWeights(WeightAveraging):
    """Keeps an exponential moving average of the weights, used by validation, checkpoints' `state_dict` and the export.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), as in TensorFlow's ExponentialMovingAverage. Buffers
    are averaged like the weights; integer ones are copied. Unlike Lightning's callback, this one also saves the right
    weights when a signal ends the run during a validation, while weights and average are swapped. A rewind by the
    guard restores the weights, but not their average.

    Args:
        decay: share of the average that stays at each optimizer step, in [0, 1).

    Raises:
        ValueError: a decay out of its range.
        ConfigError: at the start of a run whose weights are sharded.
    """

    def __init__(self, decay: float = 0.999) -> None:
        check_number("decay", decay, "[0, 1)")

        def average(kept: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
            if not torch.is_floating_point(kept):
                return current
            count = torch.as_tensor(updates, dtype=torch.float32, device=kept.device)
            share = ((1 + count) / (WARMUP_UPDATES + count)).clamp(max=decay)
            return torch.lerp(current, kept, share.to(kept.dtype))

        super().__init__(avg_fn=average)
        self._exchanged = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, ShardedStrategy):
            raise ConfigError("callbacks=ema: the weights of trainer.strategy=fsdp2 are sharded; use trainer=ddp")
        data = {name: kept for name, kept in vars(pl_module).items() if isinstance(kept, LightningDataModule)}
        vars(pl_module).update(dict.fromkeys(data))  # the average is a copy of the module; it needs no copy of the data
        super().setup(trainer, pl_module, stage)
        vars(pl_module).update(data)

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_start(trainer, pl_module)
        self._exchanged = True

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_end(trainer, pl_module)
        self._exchanged = False

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._exchanged:
            current, average = checkpoint["state_dict"], checkpoint["current_model_state"]
            checkpoint.update(state_dict=average, current_model_state=current)
