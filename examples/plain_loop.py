"""Lion in a plain PyTorch loop: `python examples/plain_loop.py`. Weights in bf16, and no step is lost to rounding."""

import torch
from torch import nn

from lion_lightning import Lion, from_adamw

torch.manual_seed(0)
inputs = torch.randn(1024, 16, dtype=torch.bfloat16)
labels = inputs[:, :4].argmax(1)
model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4)).to(torch.bfloat16)
optimizer = Lion(model.parameters(), **from_adamw(lr=5e-3, weight_decay=0.02))

for epoch in range(20):
    for x, y in zip(inputs.split(64), labels.split(64), strict=True):
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch}: loss {loss.item():.3f}")
