"""Lion under DeepSpeed's ZeRO stage 1; needs `pip install deepspeed`.

    torchrun --standalone --nproc-per-node=2 examples/deepspeed_zero1.py

DeepSpeed keeps fp32 copies of bf16 weights and gives those, flattened and cut into shards, to the optimizer.
"""

import deepspeed
import torch
from torch import nn

from lion_lightning import Lion, from_adamw

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4))
settings = {
    "train_micro_batch_size_per_gpu": 64,
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
    "bf16": {"enabled": True},
}
optimizer = Lion(model.parameters(), **from_adamw(lr=5e-3, weight_decay=0.02))
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

inputs = torch.randn(1024, 16, device=engine.device, dtype=torch.bfloat16)
for epoch in range(20):
    for x in inputs.split(64):
        loss = nn.functional.cross_entropy(engine(x), x[:, :4].argmax(1))
        engine.backward(loss)
        engine.step()
    if engine.global_rank == 0:
        print(f"epoch {epoch}: loss {loss.item():.3f}")
