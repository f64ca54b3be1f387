"""A small regression, and a Trainer for it."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lion_lightning import Lion


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.lr = nn.Linear(4, 1), 1e-3

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)

    def train_dataloader(self):
        inputs = torch.randn(512, 4, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=64)

    test_dataloader = train_dataloader

    def configure_optimizers(self):
        return Lion(self.parameters(), lr=self.lr)


def trainer_with(guard, tmp_path, **options):
    torch.manual_seed(1)  # for the module that is made next
    return Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[guard], **{"max_epochs": 1, **options},
    )  # fmt: skip
