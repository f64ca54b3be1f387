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


@pytest.mark.parametrize("fused", [None, False])
def test_int8_scales_are_fp32_whatever_the_default_dtype(fused: bool | None) -> None:
    def trained(default: torch.dtype) -> torch.Tensor:
        before = torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            param = torch.nn.Parameter(torch.linspace(-1, 1, 8192, dtype=torch.bfloat16))
            optimizer = Lion([param], lr=1e-3, momentum_dtype="int8", fused=fused)
            for _ in range(3):
                param.grad = torch.linspace(-1, 2, 8192, dtype=torch.bfloat16)
                optimizer.step()
            assert optimizer.state[param]["exp_avg_scale"].dtype == torch.float32
            return param.detach().clone()
        finally:
            torch.set_default_dtype(before)

    assert torch.equal(trained(torch.bfloat16), trained(torch.float32))
