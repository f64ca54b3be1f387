"""`torch.set_default_device`: what Lion makes lies beside its parameters, wherever new tensors go by default."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lion_lightning.optim import Lion

SHAPES = ((70, 9), (5,))
STEPS = 6


def trained(device: str | None, dtype: torch.dtype, options: dict[str, Any]) -> tuple[list[Tensor], dict[str, float]]:
    """Parameters and telemetry after some steps, with a state dict loaded in between, under a default device."""
    draw = torch.Generator("cpu").manual_seed(0)
    values = [torch.randn(shape, generator=draw, device="cpu").to(dtype) for shape in SHAPES]
    grads = [[torch.randn(shape, generator=draw, device="cpu").to(dtype) for shape in SHAPES] for _ in range(STEPS)]
    parameters = [nn.Parameter(value) for value in values]
    with nullcontext() if device is None else torch.device(device):
        optimizer = Lion(parameters, lr=1e-3, weight_decay=0.5, **options)
        for step in range(STEPS):
            optimizer.telemetry_every = 2
            for parameter, grad in zip(parameters, grads[step], strict=True):
                parameter.grad = grad.clone()
            optimizer.step()
            if step == STEPS // 2:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = Lion(parameters, lr=1e-3, weight_decay=0.5, **options)
                optimizer.load_state_dict(state)
        told = {name: float(value) for name, value in optimizer.telemetry().items()}
    return [parameter.detach() for parameter in parameters], told


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"weight_bits": 16, "momentum_dtype": "int8"}, {"weight_bits": 24, "cautious": True, "cautious_decay": True}],
    ids=str,
)
def test_a_default_device_changes_nothing(fused: bool, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """A tensor made on the default device, which is `meta` here, would have no numbers."""
    options = {**options, "fused": fused}
    theirs, told_there = trained("meta", dtype, options)  # first: what an engine keeps is made here
    ours, told = trained(None, dtype, options)
    assert all(torch.equal(left, right) for left, right in zip(ours, theirs, strict=True))
    assert told == told_there
