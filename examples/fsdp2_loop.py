"""Lion in a loop with FSDP2 (`fully_shard`), as torchtitan's: weights in bf16, no fp32 copy beside them.

torchrun --standalone --nproc-per-node=2 examples/fsdp2_loop.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from lion_lightning import Lion, from_adamw

dist.init_process_group()  # gloo on a CPU, NCCL on GPUs
device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4)).to(device, torch.bfloat16)
for layer in (model[0], model[2], model):
    fully_shard(layer)
optimizer = Lion(
    model.parameters(), **from_adamw(lr=5e-3, weight_decay=0.02)
)  # after sharding: its state is sharded too

torch.manual_seed(dist.get_rank())
inputs = torch.randn(1024, 16, device=device, dtype=torch.bfloat16)
for epoch in range(20):
    for x in inputs.split(64):
        loss = nn.functional.cross_entropy(model(x), x[:, :4].argmax(1))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"epoch {epoch}: loss {loss.item():.3f}")
dist.destroy_process_group()
