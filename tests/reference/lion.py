"""Lion and SIGNUM in float64, element by element as the papers state them."""

import torch
from torch import Tensor


class Lion64:
    """Lion of arXiv:2302.06675 on one float64 weight tensor."""

    def __init__(
        self, weight: Tensor, lr: float, beta1: float, beta2: float, weight_decay: float, cautious_decay: bool = False
    ) -> None:
        self.weight = weight.detach().double().clone()
        self.momentum = torch.zeros_like(self.weight)
        self.lr, self.beta1, self.beta2, self.weight_decay = lr, beta1, beta2, weight_decay
        self.cautious_decay = cautious_decay

    def step(self, grad: Tensor) -> Tensor:
        """Takes a step; returns c, whose sign is the direction."""
        grad = grad.detach().double()
        mixed = self.beta1 * self.momentum + (1.0 - self.beta1) * grad
        direction = (mixed > 0).double() - (mixed < 0).double()
        decay = self.weight_decay * self.weight
        if self.cautious_decay:  # arXiv:2510.12402, equation 2: only where u * x >= 0
            decay = decay * (direction * self.weight >= 0)
        self.weight = self.weight - self.lr * (direction + decay)
        self.momentum = self.beta2 * self.momentum + (1.0 - self.beta2) * grad
        return mixed


class Signum64:
    """SIGNUM of arXiv:1802.04434: momentum first, then a step along its sign."""

    def __init__(self, weight: Tensor, lr: float, momentum: float) -> None:
        self.weight = weight.detach().double().clone()
        self.average = torch.zeros_like(self.weight)
        self.lr, self.momentum = lr, momentum

    def step(self, grad: Tensor) -> None:
        """Takes a step."""
        self.average = self.momentum * self.average + (1.0 - self.momentum) * grad.detach().double()
        self.weight = self.weight - self.lr * ((self.average > 0).double() - (self.average < 0).double())
