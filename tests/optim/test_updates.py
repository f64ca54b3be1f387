"""What a step leaves behind beside the weights, and parts of an update."""

import pytest
import torch
from torch import nn

from lion_lightning.optim import Lion
from lion_lightning.optim.kernels.rule import Settings, TensorUpdate
from lion_lightning.optim.state import full_precision_state_dict

SETTINGS = Settings(1e-3, 0.9, 0.99, 0.1, 32, False, False, True, 0, 0)


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


@pytest.mark.parametrize("stride", [1, 7, 257, 2049])
def test_a_part_of_a_part_samples_the_same_signs(stride: int) -> None:
    count, cuts = 4000, [(0, 4000), (512, 3840), (256, 2560), (512, 1024)]
    numbers = torch.arange(count, dtype=torch.float32)
    signs = torch.arange(-(-count // stride))
    part = TensorUpdate(numbers, numbers, numbers, None, None, 0, 0, SETTINGS, signs=signs, sign_stride=stride)
    for start, stop in cuts:
        part = part.part(start, stop)
        assert part.signs is not None
        assert part.param[part.sign_start :: part.sign_stride].tolist() == (part.signs * stride).tolist()
