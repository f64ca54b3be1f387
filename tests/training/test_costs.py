"""Bytes of weights and optimizer state, counted by hand."""

import pytest
import torch
from torch import nn

from lion_lightning import Lion
from lion_lightning.training.performance import bytes_per_parameter


def stepped(optimizer_of, dtype=torch.float32):
    weight = nn.Parameter(torch.ones(512, 512, dtype=dtype))
    optimizer = optimizer_of([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("optimizer_of", "dtype", "expected"),
    [
        (Lion, torch.float32, 8),
        (Lion, torch.bfloat16, 6),
        (lambda p: Lion(p, weight_bits=16, momentum_dtype=torch.int8), torch.bfloat16, 3),
        (torch.optim.AdamW, torch.float32, 12),
        (torch.optim.SGD, torch.float32, 4),
    ],
)
def test_bytes_kept_are_those_of_the_design(optimizer_of, dtype, expected):
    assert bytes_per_parameter([stepped(optimizer_of, dtype)]) == pytest.approx(expected, abs=0.03)
