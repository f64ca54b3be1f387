"""AverageWeights: an exponential moving average of the weights, by Lightning's own callback."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from typing_extensions import override

from lion_lightning.errors import ConfigError
from lion_lightning.training.sharded import ShardedStrategy

WARMUP_UPDATES = 10  # of the decay: without it a short run's average is mostly its first weights


class AverageWeights(WeightAveraging):
    """Keeps an average of the weights, which validation, checkpoints' `state_dict` and the export take.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), as in TensorFlow's ExponentialMovingAverage. Buffers
    are averaged as the weights are, whole numbers taken over. Lightning's callback does the rest; this one also saves
    the right weights when a signal ends the run in the middle of a validation, where the two are exchanged. A rewind
    by the guard takes the weights back, but not their average.

    Args:
        decay: share of the average that stays at each optimizer step, in [0, 1).

    Raises:
        ValueError: a decay out of its range.
        ConfigError: at the start of a run whose weights are sharded.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay!r}")

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
