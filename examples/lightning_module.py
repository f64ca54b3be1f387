"""Lion and the guard in a LightningModule of one's own: `python examples/lightning_module.py`."""

from functools import partial

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lion_lightning import Lion, LionGuard, LionMixin, from_adamw


class Classifier(LionMixin, LightningModule):
    optimizer_factory = partial(Lion, **from_adamw(lr=5e-3, weight_decay=0.02))

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss


if __name__ == "__main__":
    torch.manual_seed(0)
    inputs = torch.randn(1024, 16)
    data = TensorDataset(inputs, inputs[:, :4].argmax(1))
    trainer = Trainer(max_epochs=20, callbacks=[LionGuard(warmup_steps=0.05)], logger=False, enable_checkpointing=False)
    trainer.fit(Classifier(), DataLoader(data, batch_size=64))
    print(f"loss {float(trainer.callback_metrics['loss']):.3f}")
