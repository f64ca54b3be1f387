"""Two parameters and a Lion after some steps, for tests of what happens to them next."""

from typing import Any

import torch
from torch import Tensor, nn

from lion_lightning.optim import Lion

FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16
SHAPE = (250, 400)


def random(seed: int, dtype: torch.dtype, shape: tuple[int, ...] = SHAPE, scale: float = 0.05) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def trained(dtype: torch.dtype, seed: int = 0, steps: int = 2, **options: Any) -> tuple[list[nn.Parameter], Lion]:
    """Two parameters, a small and a large one, after some steps."""
    params = [nn.Parameter(random(seed, dtype, (7,))), nn.Parameter(random(seed + 1, dtype))]
    optimizer = Lion(params, lr=1e-3, weight_decay=0.1, **options)
    for step in range(steps):
        for param in params:
            param.grad = random(100 + step, dtype, tuple(param.shape))
        optimizer.step()
    return params, optimizer
