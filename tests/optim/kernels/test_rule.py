"""Lion against the float64 oracle, in its exact modes."""

import pytest
import torch
from torch import Tensor, nn

from lion_lightning.optim import Lion, Signum
from tests.reference.lion import Lion64, Signum64


def dyadic(*shape: int, seed: int = 0) -> Tensor:
    """Random multiples of 1/16: exact in bf16, so that rounding of the inputs plays no part."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-32, 33, shape, generator=generator) / 16


def full_precision(optimizer: Lion, param: Tensor) -> Tensor:
    """The weight the optimizer keeps, in float64."""
    weight = param.detach().double()
    state = optimizer.state[param]
    if "weight_remainder" not in state:
        return weight
    words = (param.detach().view(torch.int16).int() << 16) + state["weight_remainder"].int()
    return words.view(torch.float32).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_twenty_steps_equal_the_float64_oracle(dtype: torch.dtype, weight_decay: float) -> None:
    param = nn.Parameter(dyadic(37, 29).to(dtype))
    optimizer = Lion([param], lr=1e-3, weight_decay=weight_decay, momentum_dtype=torch.float32)
    oracle = Lion64(param, 1e-3, 0.9, 0.99, weight_decay)
    certain = torch.ones_like(param, dtype=torch.bool)
    for step in range(20):
        param.grad = dyadic(37, 29, seed=step + 1).to(dtype)
        optimizer.step()
        certain &= oracle.step(param.grad).abs() > 1e-6  # nearer to 0, fp32 may see the other sign
    tolerance = 1e-12 if dtype == torch.float64 else 20 * 2.0**-24 * 2.1
    assert certain.float().mean() > 0.9
    assert (full_precision(optimizer, param) - oracle.weight)[certain].abs().max() <= tolerance
    assert (optimizer.state[param]["exp_avg"].double() - oracle.momentum).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_gradient_element_is_skipped_and_counted(dtype: torch.dtype) -> None:
    param, twin = (nn.Parameter(dyadic(50).to(dtype)) for _ in range(2))
    optimizer, other = Lion([param], lr=1e-2), Lion([twin], lr=1e-2)
    for step in range(4):
        param.grad = dyadic(50, seed=step).to(dtype)
        twin.grad = param.grad.clone()
        if step == 1:
            before = param[3].item(), optimizer.state[param]["exp_avg"][3].item()
            param.grad[3], param.grad[4] = float("nan"), float("inf")
        optimizer.step()
        other.step()
        if step == 1:
            assert before == (param[3].item(), optimizer.state[param]["exp_avg"][3].item())
    assert optimizer.nonfinite_count.item() == 2
    assert param.isfinite().all()
    assert torch.equal(param[5:], twin[5:])
    assert optimizer.state[param]["exp_avg"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_propagate_makes_a_nan_gradient_visible(dtype: torch.dtype) -> None:
    param = nn.Parameter(dyadic(50).to(dtype))
    optimizer = Lion([param], lr=1e-2, nonfinite="propagate")
    param.grad = dyadic(50, seed=1).to(dtype)
    param.grad[3] = float("nan")
    optimizer.step()
    assert param.isnan().nonzero().tolist() == [[3]]
    assert optimizer.state[param]["exp_avg"].isnan().nonzero().tolist() == [[3]]
    assert optimizer.nonfinite_count.item() == 1


def test_signum_is_momentum_first_signum() -> None:
    param = nn.Parameter(dyadic(37, 29))
    optimizer = Signum([param], lr=1e-3, momentum=0.9)
    oracle = Signum64(param, 1e-3, 0.9)
    for step in range(10):
        param.grad = dyadic(37, 29, seed=step + 1)
        optimizer.step()
        oracle.step(param.grad)
    agree = (param.double() - oracle.weight).abs() < 1e-5
    assert agree.float().mean() > 0.995  # a momentum within rounding of 0 may have either sign
