"""Parameters that are frozen, lazy or released in backward, numpy numbers as options, and a user without a home."""

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.optim import lr_scheduler
from torch.testing._internal.two_tensor import TwoTensor

from lion_lightning.optim import Lion
from lion_lightning.optim.gradient_release import release_gradients
from lion_lightning.optim.kernels import cpu
from tests.forks import in_a_fork
from tests.optim.exactness import assert_refused, assert_step_is_exact
from tests.optim.trained import BF16, FP32, random, trained

# Frozen, lazy and odd parameters.
from tests.processes import run_python


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.uint8, torch.bool, torch.int64, torch.complex64, torch.float8_e4m3fn]
)
def test_frozen_parameters_of_any_dtype_are_accepted(dtype: torch.dtype) -> None:
    frozen = nn.Parameter(torch.ones(4).to(dtype), requires_grad=False)
    free = nn.Parameter(torch.ones(4))
    optimizer = Lion([frozen, free], lr=1e-3)
    assert_step_is_exact(optimizer, free, torch.ones(4))
    assert bool((frozen.to(torch.float32) == 1).all())
    fresh = Lion([frozen, free], lr=1e-3)
    fresh.load_state_dict(optimizer.state_dict())
    if dtype == torch.float16:
        frozen.requires_grad_(True)
        frozen.grad = torch.ones_like(frozen)
        assert_refused(optimizer.step, optimizer, "parameter 0", str(dtype))


def test_lazy_modules_are_accepted_and_step_once_they_have_a_shape() -> None:
    model = nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(2))
    optimizer = Lion(model.parameters(), lr=1e-3, weight_decay=0.1)
    optimizer.step()
    assert optimizer.state_dict()["state"] == {}
    model(torch.ones(3, 4))
    grad = random(0, FP32, (5, 4))
    assert_step_is_exact(optimizer, model[0].weight, grad)
    assert optimizer.param_groups[0]["step"] >= 1


def test_tensors_without_memory_of_their_own_are_stepped_by_the_eager_engine() -> None:
    pair = nn.Parameter(TwoTensor(torch.ones(300), torch.ones(300)))
    optimizer = Lion([pair], lr=1e-3)
    (pair * 2).sum().backward()
    optimizer.step()
    assert torch.equal(pair.detach().a, torch.ones(300) - 1e-3)
    assert torch.equal(pair.detach().b, torch.ones(300) - 1e-3)
    plain = nn.Parameter(torch.ones(300))
    plain.grad = torch._efficientzerotensor((300,))
    Lion([plain], lr=1e-3).step()
    assert torch.equal(plain.detach(), torch.ones(300))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_step_on_fake_tensors_as_memory_estimators_take_it() -> None:
    with FakeTensorMode():
        model = nn.Linear(300, 300)
        optimizer = Lion(model.parameters(), lr=1e-3)
        model(torch.ones(2, 300)).sum().backward()
        optimizer.step()
        assert optimizer.state[model.weight]["exp_avg"].shape == (300, 300)


def test_keys_of_the_users_own_may_hold_the_name_of_an_option() -> None:
    weight = nn.Parameter(torch.ones(4))
    Lion([{"params": [weight], "weight_decay_mult": 0.5, "base_weight_decay": 1.0, "no_weight_decay": True}], lr=1e-3)
    for typo in ("weight_decays", "weightdecay", "weight_decai", "beta"):
        with pytest.raises(ValueError, match=f"{typo!r} is unknown: did you mean"):
            Lion([{"params": [nn.Parameter(torch.ones(4))], typo: 0.5}], lr=1e-3)


def test_a_schedule_may_end_a_rounding_error_below_zero() -> None:
    weight = nn.Parameter(torch.ones(4))
    optimizer = Lion([weight], lr=1e-3)
    schedule = lr_scheduler.LinearLR(optimizer, start_factor=1 / 3, end_factor=0.0, total_iters=10)
    for _ in range(13):
        weight.grad = torch.ones(4)
        optimizer.step()
        schedule.step()
    assert -1e-18 < optimizer.param_groups[0]["lr"] < 0
    Lion([weight], lr=1e-3).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="lr=-1e-06 is not allowed"):
        Lion([weight], lr=-1e-6)


NUMBERS: dict[str, dict[str, Any]] = {
    "float64": {"lr": np.float64(1e-3), "weight_decay": np.float64(0.1), "betas": (np.float64(0.9), np.float64(0.99))},
    "float32": {
        "lr": np.float32(0.0009765625),
        "weight_decay": np.float32(0.125),
        "betas": (np.float32(0.875), np.float32(0.96875)),
    },
    "arrays": {"lr": np.array(1e-3), "weight_decay": np.array(0.1)},
    "integers": {"seed": np.int64(3), "weight_bits": np.int64(16), "weight_decay": np.int32(0)},
    "booleans": {"cautious": np.bool_(False), "maximize": np.bool_(False)},
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numpy_numbers_are_numbers(name: str) -> None:
    params = [nn.Parameter(random(0, BF16, (7,))), nn.Parameter(random(1, BF16))]
    optimizer = Lion(params, **{"lr": 1e-3, **NUMBERS[name]})
    assert_step_is_exact(optimizer, params[1], random(3, BF16), others=(params[0],))
    saved = copy.deepcopy(optimizer.state_dict())
    fresh = Lion(params)
    fresh.load_state_dict(saved)
    fresh.param_groups[0].update(NUMBERS[name])  # as a schedule or a callback sets them
    assert_step_is_exact(fresh, params[1], random(4, BF16), others=(params[0],))
    with pytest.raises(ValueError, match="lr="):
        Lion(params, lr=np.float64(-1.0))


def test_a_schedule_may_give_numpy_numbers() -> None:
    params, optimizer = trained(FP32)
    schedule = lr_scheduler.LambdaLR(optimizer, lambda step: np.cos(step / 10))
    for step in range(3):
        optimizer.step()
        schedule.step()
        assert isinstance(optimizer.param_groups[0]["lr"], (float, np.floating))
        assert_step_is_exact(optimizer, params[1], random(step, FP32), others=(params[0],))
    loaded = torch.load  # a checkpoint holds plain numbers, so that it can be read with weights_only=True
    path = Path(os.environ["XDG_CACHE_HOME"]) / "numpy-numbers.pt"
    torch.save(optimizer.state_dict(), path)
    optimizer.load_state_dict(loaded(path, weights_only=True))


def test_without_a_home_the_eager_engine_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id without an entry and without HOME, as containers have it, and no compiled file beside the source."""

    def check() -> None:
        def missing(*_: Any) -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", missing)
        monkeypatch.setattr(cpu, "installed", missing)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        cpu.load.cache_clear()
        assert cpu.load() is None
        params, optimizer = trained(FP32)
        assert_step_is_exact(optimizer, params[1], random(3, FP32), others=(params[0],))

    in_a_fork(check)


# Gradient release.


def layers(dtype: torch.dtype = FP32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).to(dtype)


def test_a_parameter_unfrozen_later_is_released_too() -> None:
    results = []
    for release in (False, True):
        model = layers()
        model[2].weight.requires_grad_(False)
        optimizer = Lion(model.parameters(), lr=1e-3, weight_decay=0.1)
        if release:
            release_gradients(model, optimizer)
        for step in range(4):
            if step == 2:
                model[2].weight.requires_grad_(True)
            optimizer.zero_grad()
            model(random(step, FP32, (4, 8), 1.0)).square().sum().backward()
            assert not release or all(param.grad is None for param in model.parameters())
            optimizer.step()
        results.append(model)
    assert all(torch.equal(*pair) for pair in zip(*(model.parameters() for model in results), strict=True))


def test_an_interrupted_iteration_can_be_begun_again() -> None:
    model = layers()
    optimizer = Lion(model.parameters(), lr=1e-3)
    release_gradients(model, optimizer)
    calls: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))

    def interrupt(grad: Tensor) -> None:
        raise KeyboardInterrupt

    handle = model[0].weight.register_hook(interrupt)
    start = model[4].weight.detach().clone()
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(2, 8)).sum().backward()
    handle.remove()
    assert not torch.equal(model[4].weight, start)
    model(torch.ones(2, 8)).sum().backward()
    assert all(param.grad is None for param in model.parameters())
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1
    assert len(calls) == 1
    model(torch.ones(2, 8)).sum().backward()
    with pytest.raises(RuntimeError, match="second gradient"):  # a whole backward is not an interrupted one
        model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 2


STRIDED = """
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore
from lion_lightning.optim import Lion

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
placed = {"shape": torch.Size((128, 64)), "stride": (64, 1), "run_check": False}
made = lambda: DTensor.from_local(torch.randn(32, 64), mesh, (_StridedShard(0, split_factor=2), Shard(0)), **placed)
weight = nn.Parameter(made())
weight.grad = made()
optimizer = Lion([weight], momentum_dtype="int8")
optimizer.step()
scale = optimizer.state[weight]["exp_avg_scale"]
print(tuple(scale.to_local().shape), tuple(scale.full_tensor().shape))
"""


def test_scales_under_fsdp_over_tensor_parallelism_are_those_of_the_shard(tmp_path: Path) -> None:
    """32 x 64 elements are 8 blocks on each of 4 ranks."""
    (tmp_path / "strided.py").write_text(STRIDED)
    answer = run_python(["strided.py"], tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split("\n")[0] == "(8,) (32,)"
