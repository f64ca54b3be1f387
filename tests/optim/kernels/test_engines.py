"""Every engine in every mode: within the storage format's rounding of float64, and alike bit for bit."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lion_lightning.optim import Lion
from lion_lightning.optim.kernels import cpu
from tests.reference.lion import Lion64
from tests.reference.storage import kept_momentum, kept_weight, momentum_spacing, weight_spacing

WEIGHTS = [(torch.float32, 32), (torch.float64, 32), (torch.bfloat16, 32), (torch.bfloat16, 24), (torch.bfloat16, 16)]
MOMENTA = [None, torch.float32, torch.bfloat16, torch.int8]
MODES = list(itertools.product(WEIGHTS, MOMENTA))
LAYOUTS = {
    "0-d": lambda: torch.empty(()),
    "empty": lambda: torch.empty(0, 3),
    "one": lambda: torch.empty(1),
    "odd": lambda: torch.empty(37, 131),
    "chunks": lambda: torch.empty(300_001),  # two of the cpu engine, four of the eager one
    "strided": lambda: torch.empty(90, 128)[::2, ::2],
    "channels_last": lambda: torch.empty(4, 16, 9, 9).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.empty(66, 71).t(),
    "permuted": lambda: torch.empty(17, 18, 19).permute(2, 0, 1),
}


def filled(layout: Tensor, seed: int, scale: float, dtype: torch.dtype) -> Tensor:
    """Random numbers in the strides of `layout`."""
    storage = torch.empty(layout.untyped_storage().nbytes() // layout.element_size(), dtype=dtype)
    values = storage.as_strided(layout.shape, layout.stride())
    generator = torch.Generator().manual_seed(seed)
    return values.copy_((torch.randn(layout.shape, generator=generator) * scale).to(dtype))


def optimizer_for(param: Tensor, weight_bits: int, momentum_dtype: torch.dtype | None, **options: Any) -> Lion:
    return Lion([param], weight_bits=weight_bits, momentum_dtype=momentum_dtype, **options)


def test_the_cpu_engine_was_built() -> None:
    assert cpu.load() is not None, "no C compiler on this machine: the cpu engine goes untested"


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("weight", "momentum_dtype"), MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_within_rounding_of_float64(
    layout: str, weight: tuple[torch.dtype, int], momentum_dtype: torch.dtype | None, fused: bool
) -> None:
    check_against_float64(layout, weight, momentum_dtype, fused, weight_decay=0.1, cautious_decay=False)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("weight", "momentum_dtype"), MODES)
def test_cautious_decay_is_within_rounding_of_float64(
    weight: tuple[torch.dtype, int], momentum_dtype: torch.dtype | None, fused: bool
) -> None:
    """The decay is as strong as the step, so that a weight that wrongly decays is far off."""
    check_against_float64("odd", weight, momentum_dtype, fused, weight_decay=30.0, cautious_decay=True)


def check_against_float64(
    layout: str,
    weight: tuple[torch.dtype, int],
    momentum_dtype: torch.dtype | None,
    fused: bool,
    weight_decay: float,
    cautious_decay: bool,
) -> None:
    """Two steps, each from the stored state."""
    dtype, weight_bits = weight
    param = nn.Parameter(filled(LAYOUTS[layout](), 0, 0.03, dtype))
    options: dict[str, Any] = dict(lr=1e-3, weight_decay=weight_decay, cautious_decay=cautious_decay)
    optimizer = optimizer_for(param, weight_bits, momentum_dtype, fused=fused, **options)
    if fused and dtype == torch.float64 and momentum_dtype is not None:
        param.grad = torch.zeros_like(param)
        with pytest.raises(ValueError, match="float64 parameters need gradients and momentum of float64"):
            optimizer.step()
        return
    for step in range(2):
        oracle = Lion64(param, 1e-3, 0.9, 0.99, weight_decay, cautious_decay)
        if step:
            state = optimizer.state[param]
            oracle.weight = kept_weight(param, state.get("weight_remainder"))
            oracle.momentum = kept_momentum(*in_param_order(state, param))
        param.grad = filled(LAYOUTS[layout](), step + 1, 1e-3, dtype)
        certain = oracle.step(param.grad).abs() > 1e-9
        optimizer.step()
        state = optimizer.state[param]
        error = (kept_weight(param, state.get("weight_remainder")) - oracle.weight).abs()
        half_or_whole = 0.5 if weight_bits == 32 else 1.0  # nearest, or to either neighbour
        change = 1e-3 * (1.0 + weight_decay * oracle.weight.abs())  # at most lr * (u + decay * p), in fp32
        arithmetic = 0.0 if dtype == torch.float64 else change * 2.0**-22
        allowed = weight_spacing(oracle.weight, dtype, weight_bits) * half_or_whole + arithmetic
        assert (error <= allowed + 1e-18)[certain].all()
        stored = kept_momentum(*in_param_order(state, param))
        allowed = momentum_spacing(in_memory_order(oracle.momentum, param), state["exp_avg"].dtype)
        allowed = allowed * 1.02 + oracle.momentum.abs().max() * 1e-7 if param.numel() else allowed
        assert (in_memory_order(stored - oracle.momentum, param).abs() <= allowed).all()


def in_memory_order(values: Tensor, param: Tensor) -> Tensor:
    """The values as a 1-D tensor in the order in which a dense parameter lies in memory."""
    order = sorted(range(param.ndim), key=lambda dim: (-param.stride(dim), dim))
    return values.permute(order).reshape(-1)


def in_param_order(state: dict[str, Tensor], param: Tensor) -> tuple[Tensor, Tensor | None]:
    """`exp_avg` and its scales; int8 levels are decoded in memory order and put back in the parameter's shape."""
    exp_avg, scale = state["exp_avg"], state.get("exp_avg_scale")
    if scale is None:
        return exp_avg, None
    order = sorted(range(param.ndim), key=lambda dim: (-exp_avg.stride(dim), dim))
    dense = exp_avg.permute(order)
    values = kept_momentum(dense, scale)
    return values.permute([order.index(dim) for dim in range(param.ndim)]), None


@pytest.mark.parametrize("caution", [{}, {"cautious": True}, {"cautious_decay": True}], ids=str)
@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize(("weight", "momentum_dtype"), MODES)
def test_engines_agree_bit_for_bit(
    weight: tuple[torch.dtype, int], momentum_dtype: torch.dtype | None, nonfinite: str, caution: dict[str, bool]
) -> None:
    dtype, weight_bits = weight
    sizes = (1, 255, 257, 5000, 70_001)
    twins = [[nn.Parameter(filled(torch.empty(n), n, 0.03, dtype)) for n in sizes] for _ in range(2)]
    options = dict(lr=1e-3, weight_decay=0.1, maximize=True, nonfinite=nonfinite, **caution)
    pair = [
        Lion(params, weight_bits=weight_bits, momentum_dtype=momentum_dtype, fused=fused, **options)
        for params, fused in zip(twins, (False, None), strict=True)
    ]
    for step in range(3):
        for optimizer, params in zip(pair, twins, strict=True):
            for param in params:
                param.grad = filled(torch.empty(param.shape), param.numel() + step + 1, 1e-3, dtype)
                if step == 1 and param.numel() > 300:
                    param.grad[300], param.grad[40] = float("inf"), float("nan")
            optimizer.grad_scale = torch.tensor(3.0)
            optimizer.step()
    for left, right in zip(*twins, strict=True):
        assert same(left, right)
        states = pair[0].state[left], pair[1].state[right]
        assert states[0].keys() == states[1].keys()
        assert all(same(states[0][key], states[1][key]) for key in states[0])
    assert pair[0].nonfinite_count == pair[1].nonfinite_count == 4


def same(left: Tensor, right: Tensor) -> bool:
    return bool(((left == right) | (left.isnan() & right.isnan())).all())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("weight_bits", [32, 24, 16])
def test_weights_at_the_edge_of_bf16_stay_what_they_are(weight_bits: int, fused: bool) -> None:
    largest = torch.finfo(torch.bfloat16).max
    tiny = 2.0**-133  # a subnormal bf16 number
    values = torch.tensor([largest, -largest, float("nan"), tiny, -tiny, 0.0, -0.0])
    param = nn.Parameter(values.bfloat16())
    optimizer = Lion([param], lr=0.0, weight_bits=weight_bits, fused=fused)
    for _ in range(3):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert same(param.float(), values)
    optimizer.param_groups[0].update(lr=1e36, maximize=True)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert param[0] == largest  # saturates rather than overflows


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("momentum_dtype", MOMENTA)
def test_momentum_beside_a_weight_that_needs_care_steps_once(momentum_dtype: torch.dtype | None, fused: bool) -> None:
    param = nn.Parameter(torch.full((300,), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16))
    optimizer = Lion([param], momentum_dtype=momentum_dtype, fused=fused)
    oracle = Lion64(param, 1e-4, 0.9, 0.99, 0.0)
    for _ in range(2):
        param.grad = torch.ones_like(param)
        optimizer.step()
        oracle.step(param.grad)
    state = optimizer.state[param]
    assert torch.allclose(kept_momentum(state["exp_avg"], state.get("exp_avg_scale")), oracle.momentum, rtol=0.1)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("weight_bits", [32, 24])
def test_a_weight_zeroed_from_outside_is_zero(weight_bits: int, fused: bool) -> None:
    param = nn.Parameter(filled(torch.empty(1000), 0, 0.03, torch.bfloat16))
    optimizer = Lion([param], lr=1e-5, weight_decay=0.1, weight_bits=weight_bits, fused=fused)
    for step in range(5):
        param.grad = filled(torch.empty(1000), step, 1e-3, torch.bfloat16)
        optimizer.step()
    with torch.no_grad():
        param.mul_(torch.arange(1000) % 2)
    optimizer.param_groups[0]["lr"] = 1e-4
    optimizer.step()
    assert param.isfinite().all()
    assert param[::2].abs().max() <= 1.01e-4


def test_insisting_on_a_fused_engine_where_there_is_none_is_an_error() -> None:
    param = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = Lion([param], fused=True, momentum_dtype=torch.float32)
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r"fused=True needs a fused engine \(cpu: float64 parameters.*allowed here"):
        optimizer.step()
