"""What others may hand to a coming step: a scale, a flag to skip it, a function that looks first, a GradScaler."""

import pytest
import torch

from lion_lightning.optim import Lion
from tests.optim.test_citizen import random_param


@pytest.mark.parametrize("fused", [None, False])
def test_grad_scale_and_found_inf_act_inside_the_step(fused: bool | None) -> None:
    param, twin = random_param(), random_param()
    optimizer, other = Lion([param], fused=fused), Lion([twin], fused=fused)
    param.grad, twin.grad = torch.full_like(param, 64.0), torch.full_like(twin, 0.5)
    optimizer.grad_scale = torch.tensor(128.0)
    optimizer.step()
    other.step()
    assert torch.equal(optimizer.state[param]["exp_avg"], other.state[twin]["exp_avg"])
    before = param.detach().clone()
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(param, before)
    assert optimizer.param_groups[0]["step"] == 1
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert not torch.equal(param, before)
    assert not hasattr(optimizer, "_step_supports_amp_scaling")


def test_grad_scaler_skips_and_unscales() -> None:
    param = random_param()
    optimizer, scaler = Lion([param], lr=1e-2), torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(param.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    before = param.detach().clone()
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], torch.full_like(param, 0.01))
    param.grad = torch.full_like(param, float("inf"))
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert torch.equal(param, before)
