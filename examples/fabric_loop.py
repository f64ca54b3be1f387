"""Lion in a loop of Lightning Fabric: `python examples/fabric_loop.py`."""

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lion_lightning import Lion, from_adamw

fabric = Fabric(accelerator="auto", devices=1, precision="bf16-true")
fabric.seed_everything(0)
inputs = torch.randn(1024, 16)
loader = fabric.setup_dataloaders(DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(1)), batch_size=64))
model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4))
model = fabric.setup_module(model)  # first: it turns the weights into bf16
optimizer = fabric.setup_optimizers(Lion(model.parameters(), **from_adamw(lr=5e-3, weight_decay=0.02)))

for epoch in range(20):
    for x, y in loader:
        loss = nn.functional.cross_entropy(model(x).float(), y)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    fabric.print(f"epoch {epoch}: loss {loss.item():.3f}")
