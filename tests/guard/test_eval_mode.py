"""A module that is left in evaluation mode is told once; one in training mode never."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lion_lightning import Lion, LionGuard


class Module(LightningModule):
    def __init__(self, forgets: bool) -> None:
        super().__init__()
        self.net, self.forgets = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 1)), forgets

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        if self.forgets:
            self.eval()
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Lion:
        return Lion(self.parameters(), lr=1e-3, weight_decay=1.0)


@pytest.mark.parametrize("forgets", [True, False])
def test_eval_inside_a_training_step_is_told_once(tmp_path, forgets: bool) -> None:
    guard = LionGuard()
    trainer = Trainer(
        max_steps=6, callbacks=[guard], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        accelerator="cpu", default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Module(forgets), DataLoader(TensorDataset(torch.randn(64, 4)), batch_size=8))
    told = [event for event in guard.events if event.kind == "eval_mode"]
    assert len(told) == forgets
    assert all("call train()" in event.message for event in told)
