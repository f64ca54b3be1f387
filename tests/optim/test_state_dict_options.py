"""torch.distributed.checkpoint.state_dict with every option that one process can have, AdamW beside as the control."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import AdamW, Optimizer

from lion_lightning.optim import Lion

MODES: dict[str, tuple[torch.dtype, Callable[[list[dict[str, Any]]], Optimizer]]] = {
    "adamw": (torch.float32, lambda groups: AdamW(groups, lr=1e-3)),
    "fp32": (torch.float32, lambda groups: Lion(groups, lr=1e-3)),
    "fp32, bf16": (torch.float32, lambda groups: Lion(groups, lr=1e-3, momentum_dtype=torch.bfloat16)),
    "fp32, int8": (torch.float32, lambda groups: Lion(groups, lr=1e-3, momentum_dtype="int8")),
    "fp64": (torch.float64, lambda groups: Lion(groups, lr=1e-3)),
    "bf16/32": (torch.bfloat16, lambda groups: Lion(groups, lr=1e-3, seed=7)),
    "bf16/32, fp32": (torch.bfloat16, lambda groups: Lion(groups, lr=1e-3, momentum_dtype="float32")),
    "bf16/24, int8": (torch.bfloat16, lambda groups: Lion(groups, lr=1e-3, weight_bits=24, momentum_dtype="int8")),
    "bf16/16, eager": (torch.bfloat16, lambda groups: Lion(groups, lr=1e-3, weight_bits=16, fused=False)),
}
NAMES = ("full_state_dict", "cpu_offload", "ignore_frozen_params", "flatten_optimizer_state_dict")
OPTIONS = [
    StateDictOptions(**dict(zip(NAMES, values, strict=True)))
    for values in itertools.product((False, True), repeat=len(NAMES))
]


def run(mode: str, seed: int) -> tuple[nn.Module, Optimizer]:
    dtype, make = MODES[mode]
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(80, 70), nn.Tanh(), nn.Linear(70, 3)).to(dtype)
    model[2].bias.requires_grad_(False)
    params = list(model.parameters())
    return model, make([{"params": params[::2], "weight_decay": 0.1}, {"params": params[1::2], "weight_decay": 0.0}])


def advance(model: nn.Module, optimizer: Optimizer, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            if param.requires_grad:
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()
    optimizer.zero_grad()


def assert_alike(left: tuple[nn.Module, Optimizer], right: tuple[nn.Module, Optimizer]) -> None:
    for mine, theirs in zip(left[0].parameters(), right[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)
        states = left[1].state.get(mine, {}), right[1].state.get(theirs, {})
        assert states[0].keys() == states[1].keys()
        for key, value in states[0].items():
            other = states[1][key]
            assert not isinstance(value, Tensor) or (value.dtype == other.dtype and torch.equal(value, other)), key


def plain(state: Any) -> Iterator[Any]:
    """Every value of a nested state dict."""
    for value in state.values() if isinstance(state, dict) else state:
        if isinstance(value, (dict, list, tuple)):
            yield from plain(value)
        else:
            yield value


def is_broken_in_torch(options: StateDictOptions) -> bool:
    """Loading what is both whole and flat fails for AdamW too: KeyError 'param_groups.0.params.0'."""
    return options.full_state_dict and options.flatten_optimizer_state_dict


def test_what_torch_cannot_load_is_what_the_control_cannot_load() -> None:
    for options in OPTIONS:
        model, optimizer = run("adamw", 0)
        saved = get_optimizer_state_dict(model, optimizer, options=options)
        fails = pytest.raises(KeyError) if is_broken_in_torch(options) else contextlib.nullcontext()
        with fails:
            set_optimizer_state_dict(model, optimizer, saved, options=options)


@pytest.mark.parametrize("mode", MODES)
def test_every_option_brings_the_run_back_bit_for_bit(mode: str, tmp_path: Path) -> None:
    """Through torch.save with weights_only, into an optimizer without state and into one that has gone elsewhere."""
    for options in OPTIONS:
        original = run(mode, 0)
        advance(*original, 0, 3)
        weights, state = get_state_dict(*original, options=options)
        kinds = {type(value) for value in plain(state) if not isinstance(value, (Tensor, str))}
        assert kinds <= {int, float, bool, type(None)}
        torch.save((weights, state), tmp_path / "state.pt")
        if is_broken_in_torch(options):
            continue
        for steps in (0, 2):
            twin = run(mode, 1)
            advance(*twin, 5, steps)
            saved = torch.load(tmp_path / "state.pt", weights_only=True)
            if options.ignore_frozen_params:
                with torch.no_grad():
                    twin[0][2].bias.copy_(original[0][2].bias)
            loading = StateDictOptions(**{**vars(options), "strict": not options.ignore_frozen_params})
            set_state_dict(*twin, model_state_dict=saved[0], optim_state_dict=saved[1], options=loading)
            assert_alike(original, twin)
        advance(*original, 3, 2)
        advance(*twin, 3, 2)
        assert_alike(original, twin)


@pytest.mark.xfail(
    torch.__version__ < (2, 13), raises=KeyError, reason="torch 2.9 cannot unflatten a state that lacks a tensor"
)
def test_a_flattened_state_of_another_mode_loads_with_what_it_has() -> None:
    """torch leaves an empty dict where a tensor is missing."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    source = run("fp32", 0)
    advance(*source, 0, 2)
    saved = get_optimizer_state_dict(*source, options=options)
    target = run("fp32, int8", 0)
    set_optimizer_state_dict(*target, saved, options=options)
    weights = [nn.Module.state_dict(pair[0]) for pair in (source, target)]
    target[0].load_state_dict(weights[0])
    advance(*source, 2, 1)
    advance(*target, 2, 1)
    assert_alike(source, target)  # the group's momentum_dtype comes along


def test_a_checkpoint_with_dtypes_in_its_groups_still_loads() -> None:
    """As versions before wrote them."""
    model, optimizer = run("fp32, bf16", 0)
    advance(model, optimizer, 0, 2)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group["momentum_dtype"] = torch.bfloat16
        del group["fused"]
    twin = run("fp32", 0)
    twin[1].load_state_dict(saved)
    twin[0].load_state_dict(model.state_dict())
    assert_alike((model, optimizer), twin)


def test_the_engine_is_not_part_of_a_checkpoint() -> None:
    params = [nn.Parameter(torch.ones(3))]
    saved = Lion(params, fused=False).state_dict()
    assert saved["param_groups"][0]["fused"] is None
    other = Lion(params, fused=None)
    other.load_state_dict(saved)
    assert other.param_groups[0]["fused"] is None
    eager = Lion(params, fused=False)
    eager.load_state_dict(saved)
    assert eager.param_groups[0]["fused"] is False


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["adamw", "fp32", "fp32, bf16", "fp32, int8", "bf16/24, int8"])
def test_fsdp1_keeps_the_state_or_refuses(mode: str, one_rank: None) -> None:
    """FSDP1 gathers what is shaped as its flat parameters are, so that scales of blocks cannot pass."""

    def wrapped(seed: int) -> tuple[nn.Module, Optimizer]:
        dtype, make = MODES[mode]
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(80, 70), nn.Tanh(), nn.Linear(70, 3)).to(dtype)
        sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        return sharded, make([{"params": list(sharded.parameters()), "weight_decay": 0.1}])

    model, optimizer = wrapped(0)
    advance(model, optimizer, 0, 3)
    if "int8" in mode:
        with pytest.raises(ValueError, match=r"exp_avg_scale.*FSDP1.*momentum_dtype.*fully_shard"):
            FullyShardedDataParallel.optim_state_dict(model, optimizer)
        return
    saved = FullyShardedDataParallel.optim_state_dict(model, optimizer)
    twin, other = wrapped(1)
    loadable = FullyShardedDataParallel.optim_state_dict_to_load(twin, other, saved)
    other.load_state_dict(loadable)
    twin.load_state_dict(model.state_dict())
    assert_alike((model, optimizer), (twin, other))
