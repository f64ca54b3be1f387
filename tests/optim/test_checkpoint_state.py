"""state_dict and load_state_dict: every dtype as it was saved, bit for bit."""

import copy

import pytest
import torch
from torch import nn

from lion_lightning.optim import Lion


def trained(dtype: torch.dtype, momentum_dtype: torch.dtype | None) -> tuple[nn.Parameter, Lion]:
    param = nn.Parameter(torch.randn(300, generator=torch.Generator().manual_seed(0)).to(dtype))
    optimizer = Lion([param], lr=1e-3, weight_decay=0.1, momentum_dtype=momentum_dtype)
    advance(param, optimizer, 3)
    return param, optimizer


def advance(param: nn.Parameter, optimizer: Lion, steps: int) -> None:
    for step in range(steps):
        param.grad = torch.randn(300, generator=torch.Generator().manual_seed(step)).to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize("momentum_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_resumed_run_repeats_itself(dtype: torch.dtype, momentum_dtype: torch.dtype | None) -> None:
    param, optimizer = trained(dtype, momentum_dtype)
    twin = nn.Parameter(param.detach().clone())
    resumed = Lion([twin], lr=5.0)
    saved = copy.deepcopy(optimizer.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for key, value in saved["state"][0].items():
        assert resumed.state[twin][key].dtype == value.dtype
    advance(param, optimizer, 3)
    advance(twin, resumed, 3)
    assert torch.equal(param, twin)
    for key, value in optimizer.state[param].items():
        assert torch.equal(resumed.state[twin][key], value)
    assert resumed.param_groups[0]["step"] == 6


def test_loading_shares_no_memory_with_the_saved_state() -> None:
    param, optimizer = trained(torch.bfloat16, None)
    saved = optimizer.state_dict()
    twin = nn.Parameter(param.detach().clone())
    resumed = Lion([twin])
    kept = copy.deepcopy(saved)
    resumed.load_state_dict(saved)
    advance(twin, resumed, 1)
    for key, value in kept["state"][0].items():
        assert torch.equal(saved["state"][0][key], value)
