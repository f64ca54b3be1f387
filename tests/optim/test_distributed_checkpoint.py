"""torch.distributed.checkpoint: the state of every mode comes back bit for bit, by names instead of positions."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from lion_lightning.optim import Lion

MODES: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {}),
    (torch.float32, {"momentum_dtype": "int8"}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"momentum_dtype": "float32"}),
    (torch.bfloat16, {"weight_bits": 24, "momentum_dtype": "int8"}),
    (torch.bfloat16, {"weight_bits": 16}),
]


def run(dtype: torch.dtype, seed: int, **options: Any) -> tuple[nn.Module, Lion]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(80, 70), nn.Tanh(), nn.Linear(70, 3)).to(dtype)
    decayed = [param for param in model.parameters() if param.ndim > 1]
    others = [param for param in model.parameters() if param.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return model, Lion(groups, lr=1e-3, **options)


def advance(model: nn.Module, optimizer: Lion, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(("dtype", "options"), MODES)
def test_a_run_saved_by_dcp_goes_on_bit_for_bit(dtype: torch.dtype, options: dict[str, Any], tmp_path: Path) -> None:
    model, optimizer = run(dtype, 0, **options)
    advance(model, optimizer, 0, 3)
    saved_model, saved_optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": saved_model, "optimizer": saved_optimizer}, checkpoint_id=str(tmp_path), no_dist=True)

    twin, resumed = run(dtype, 1, **options)
    model_state, optimizer_state = get_state_dict(twin, resumed)
    dcp.load(
        {"model": model_state, "optimizer": optimizer_state},
        checkpoint_id=str(tmp_path),
        no_dist=True,
    )
    set_state_dict(twin, resumed, model_state_dict=model_state, optim_state_dict=optimizer_state)
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(param, other)
        assert set(optimizer.state[param]) == set(resumed.state[other])
        for key, value in optimizer.state[param].items():
            assert resumed.state[other][key].dtype == value.dtype
            assert torch.equal(resumed.state[other][key], value)
    assert [group["step"] for group in resumed.param_groups] == [3, 3]

    advance(model, optimizer, 3, 3)
    advance(twin, resumed, 3, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
