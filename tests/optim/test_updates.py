"""What a step leaves behind beside the weights."""

import pytest
import torch
from torch import nn

from lion_lightning.optim import Lion
from lion_lightning.optim.state import full_precision_state_dict, momentum_slice


@pytest.mark.parametrize("fused", [None, False])
def test_autograd_notices_that_a_step_changed_a_weight(fused: bool | None) -> None:
    weight, still = nn.Parameter(torch.ones(5000)), nn.Parameter(torch.ones(3))
    optimizer = Lion([weight, still], fused=fused)
    loss = (weight * weight).sum()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert still._version == 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_loaded_group_has_the_options_it_was_saved_with() -> None:
    weight = nn.Parameter(torch.ones(5))
    optimizer = Lion([weight])
    names = set(optimizer.param_groups[0])
    optimizer.load_state_dict(optimizer.state_dict())
    assert set(optimizer.param_groups[0]) == names
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(5))]})
    assert set(optimizer.param_groups[1]) == names


def test_full_precision_is_a_method_too() -> None:
    model = nn.Linear(9, 7).to(torch.bfloat16)
    optimizer = Lion(model.parameters(), lr=1e-5)
    model(torch.randn(4, 9).to(torch.bfloat16)).sum().backward()
    optimizer.step()
    exported = optimizer.full_precision_state_dict(model)
    expected = full_precision_state_dict(model, optimizer)
    assert exported.keys() == expected.keys()
    assert all(exported[name].dtype == torch.float32 for name in exported)
    assert all(torch.equal(exported[name], expected[name]) for name in expected)


@pytest.mark.parametrize("momentum_dtype", ["float32", "bfloat16", "int8"])
def test_a_slice_of_the_momentum_is_that_of_the_whole_in_float32(momentum_dtype: str) -> None:
    weight = nn.Parameter(torch.randn(3, 2000, generator=torch.Generator().manual_seed(0)))
    optimizer = Lion([weight], momentum_dtype=momentum_dtype)
    weight.grad = torch.randn(3, 2000, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    whole = momentum_slice(optimizer.state[weight], 0, 6000)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole, weight.grad.flatten() * 0.01, rtol=0.1, atol=1e-4)
    for start, stop in [(0, 256), (512, 700), (5888, 6000), (256, 256)]:
        assert torch.equal(momentum_slice(optimizer.state[weight], start, stop), whole[start:stop])


def test_parameters_stepped_one_by_one_end_as_after_one_step() -> None:
    results = []
    for ahead in ([], [2, 0], [0, 1, 2]):
        params = [nn.Parameter(torch.full((5000,), 0.5 + n, dtype=torch.bfloat16)) for n in range(3)]
        optimizer = Lion(params, lr=1e-3, weight_decay=0.1, weight_bits=16)
        for step in range(3):
            for n, param in enumerate(params):
                param.grad = torch.randn(5000, generator=torch.Generator().manual_seed(3 * step + n)).bfloat16()
            for n in ahead:
                optimizer.step_param(params[n])
                params[n].grad = None
            optimizer.step()
        assert optimizer.param_groups[0]["step"] == 3
        results.append(torch.cat([param.detach() for param in params]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
