"""The LightningModule of the recipe."""

from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lion_lightning import LionMixin
from sines.data import Sines


@dataclass
class MLPConfig:
    """A network with one hidden layer."""

    hidden: int = 128


class FrequencyRegression(LionMixin, LightningModule):
    """Regresses the frequency of a wave.

    Args:
        config: of the model, built from the group `model`.
        data: built from the group `data`.
        optimizer_factory, schedule: built from the groups `optim` and `schedule`; `LionMixin` uses them.
        seed: of the run.
    """

    def __init__(self, config: MLPConfig, data: Sines, optimizer_factory: Any, schedule: Any, seed: int) -> None:
        super().__init__()
        self.optimizer_factory, self.schedule = optimizer_factory, schedule
        self.net = nn.Sequential(nn.Linear(data.length, config.hidden), nn.GELU(), nn.Linear(config.hidden, 1))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch["waves"])[:, 0], batch["frequencies"])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        guesses = self.net(batch["waves"])[:, 0]
        error = (guesses - batch["frequencies"]).abs().mean()
        self.log("val/error", error, batch_size=len(guesses))
