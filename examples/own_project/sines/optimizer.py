"""An optimizer of one's own."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class SignMomentum(torch.optim.Optimizer):
    """The sign of the momentum, without decay."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    average.lerp_(p.grad, 1 - group["momentum"])
                    p.add_(average.sign(), alpha=-group["lr"])
        return loss
