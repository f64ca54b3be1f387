"""Lion in a loop of Hugging Face Accelerate: `accelerate launch examples/accelerate_loop.py`, or with `python`.

Needs `pip install accelerate`.
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lion_lightning import Lion, from_adamw

accelerator = Accelerator(gradient_accumulation_steps=2)
torch.manual_seed(0)
inputs = torch.randn(1024, 16)
loader = DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(1)), batch_size=64)
model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4))
optimizer = Lion(model.parameters(), **from_adamw(lr=5e-3, weight_decay=0.02))
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

for epoch in range(20):
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}")
