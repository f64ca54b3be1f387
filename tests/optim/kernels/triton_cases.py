"""The triton engine in every mode against float64 and against the eager engine on the CPU, bit for bit.

Run by test_triton.py in a process of its own: on the CPU with TRITON_INTERPRET=1, which must be set before triton is
imported, or on a CUDA or ROCm device without.
"""

import itertools
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lion_lightning.optim import Lion, state
from lion_lightning.optim.kernels import select as engines
from lion_lightning.optim.kernels import storage_formats, triton_kernels
from lion_lightning.optim.kernels.eager import engine as eager
from lion_lightning.optim.kernels.rule import Settings, TensorUpdate
from lion_lightning.optim.kernels.triton import engine as triton
from tests.reference.lion import Lion64
from tests.reference.storage import kept_momentum, kept_weight, momentum_spacing, weight_spacing

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
WEIGHTS = [(torch.float32, 32), (torch.float64, 32), (torch.bfloat16, 32), (torch.bfloat16, 24), (torch.bfloat16, 16)]
MOMENTA = [None, torch.float32, torch.bfloat16, torch.int8]
MODES = list(itertools.product(WEIGHTS, MOMENTA))
RANDOM_MODES = [((torch.bfloat16, 24), None), ((torch.bfloat16, 16), torch.int8), ((torch.float32, 32), torch.int8)]
SIZES = (1, 1300)  # within a block, and over two tiles
SETTINGS = Settings(
    lr=1e-3,
    beta1=0.9,
    beta2=0.99,
    weight_decay=0.1,
    weight_bits=32,
    cautious=False,
    maximize=False,
    skip_nonfinite=True,
    seed=0x1234_5678_9ABC_DEF0,
    step=7,
)


@pytest.fixture(autouse=True)
def only_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engines.ENGINES, "cpu", ("triton",))
    monkeypatch.setattr(state, "SMALL_ELEMENTS", 256)  # a tile takes the interpreter a tenth of a second
    torch.set_num_threads(1)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The grid of each launch of the Lion kernel."""
    grids: list[int] = []

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid[0])

            def launch(*arguments: Any, **options: Any) -> None:
                assert options["enable_fp_fusion"] is False
                kernel[grid](*arguments, **options)

            return launch

    kernel = triton_kernels.lion_kernel
    monkeypatch.setattr(triton_kernels, "lion_kernel", Counted())
    return grids


def noise(n: int, seed: int, scale: float, dtype: torch.dtype) -> Tensor:
    return (torch.randn(n, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def same(left: Tensor, right: Tensor) -> bool:
    """Equal bits but for those of a NaN."""
    left, right = left.detach().cpu(), right.detach().cpu()
    kept = left.isnan() & right.isnan()
    return bool(((left == right) & (left.signbit() == right.signbit()) | kept).all())


def update_of(n: int, weight: tuple[torch.dtype, int], momentum: torch.dtype | None, **changes: Any) -> TensorUpdate:
    """An update on the CPU with random contents."""
    dtype, weight_bits = weight
    exp_avg, scale, remainder = noise(n, 2, 1e-3, torch.float32), None, None
    if momentum == torch.int8:
        exp_avg, scale = storage_formats.quantize(exp_avg, None)
    if dtype == torch.bfloat16 and weight_bits != 32:
        remainder = None if weight_bits == 16 else (torch.arange(n) % 256 - 128).to(torch.int8)
    elif dtype == torch.bfloat16:
        remainder = (torch.arange(n) * 31 % 65536 - 32768).to(torch.int16)
    return TensorUpdate(
        param=noise(n, 0, 0.03, dtype),
        grad=noise(n, 1, 1e-3, dtype),
        exp_avg=exp_avg if momentum == torch.int8 else exp_avg.to(momentum or dtype),
        exp_avg_scale=scale,
        weight_remainder=remainder,
        index=3,
        offset=0,
        settings=replace(SETTINGS, weight_bits=weight_bits, **changes),
    )


STORED = ("param", "exp_avg", "exp_avg_scale", "weight_remainder")


def copied(update: TensorUpdate, device: str) -> TensorUpdate:
    arrays = {name: getattr(update, name) for name in (*STORED, "grad")}
    return replace(update, **{name: a if a is None else a.to(device, copy=True) for name, a in arrays.items()})


def assert_like_eager(update: TensorUpdate, **on_device: Tensor) -> TensorUpdate:
    """Runs an update here with triton, settings replaced as said, and on the CPU eagerly; returns the former."""
    reference, tested = copied(update, "cpu"), copied(update, DEVICE)
    tested.settings = replace(tested.settings, **{name: value.to(DEVICE) for name, value in on_device.items()})
    counts = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64, device=DEVICE)
    eager.step([reference], counts[0])
    triton.step([tested], counts[1])
    for name in ("param", "exp_avg", "exp_avg_scale", "weight_remainder", "grad"):
        expected = getattr(reference, name)
        assert expected is None or same(expected, getattr(tested, name)), name
    assert counts[0] == counts[1]
    return tested


def params_of(dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    return [nn.Parameter(noise(n, n, 0.03, dtype).to(device)) for n in SIZES]


@pytest.mark.parametrize(("weight", "momentum_dtype"), MODES)
def test_a_step_is_within_rounding_of_float64(
    weight: tuple[torch.dtype, int], momentum_dtype: torch.dtype | None
) -> None:
    dtype, weight_bits = weight
    params = params_of(dtype, DEVICE)
    optimizer = Lion(
        params, lr=1e-3, weight_decay=0.1, weight_bits=weight_bits, momentum_dtype=momentum_dtype, fused=True
    )
    for step in range(2):
        oracles, certain = [], []
        for param in params:
            oracles.append(Lion64(param.cpu(), 1e-3, 0.9, 0.99, 0.1))
            if step:
                oracles[-1].weight, oracles[-1].momentum = stored(optimizer, param)
            param.grad = noise(param.numel(), step + 9, 1e-3, dtype).to(DEVICE)
            certain.append(oracles[-1].step(param.grad.cpu()).abs() > 1e-9)
        optimizer.step()
        for param, oracle, sure in zip(params, oracles, certain, strict=True):
            weight_now, momentum_now = stored(optimizer, param)
            half_or_whole = 0.5 if weight_bits == 32 else 1.0  # nearest, or to either neighbour
            arithmetic = 0.0 if dtype == torch.float64 else 1e-3 * 2.0**-22
            allowed = weight_spacing(oracle.weight, dtype, weight_bits) * half_or_whole + arithmetic
            assert ((weight_now - oracle.weight).abs() <= allowed + 1e-18)[sure].all()
            allowed = momentum_spacing(oracle.momentum, optimizer.state[param]["exp_avg"].dtype) * 1.02
            assert ((momentum_now - oracle.momentum).abs() <= allowed + oracle.momentum.abs().max() * 1e-7).all()


def stored(optimizer: Lion, param: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and momentum as kept, float64 on the CPU."""
    entry = {key: value.cpu() for key, value in optimizer.state[param].items()}
    weight = kept_weight(param.detach().cpu(), entry.get("weight_remainder"))
    return weight, kept_momentum(entry["exp_avg"], entry.get("exp_avg_scale"))


CAUTIOUS = {"cautious": True, "maximize": True}
PROPAGATE = {"nonfinite": "propagate", "cautious_decay": True}


@pytest.mark.parametrize(
    ("weight", "momentum_dtype", "options"),
    [(*mode, CAUTIOUS) for mode in MODES] + [(*mode, PROPAGATE) for mode in MODES[::3]],  # each dtype at least once
)
def test_engines_agree_bit_for_bit(
    weight: tuple[torch.dtype, int], momentum_dtype: torch.dtype | None, options: dict[str, Any]
) -> None:
    dtype, weight_bits = weight
    twins = params_of(dtype, "cpu"), params_of(dtype, DEVICE)
    options = dict(lr=1e-3, weight_decay=0.1, weight_bits=weight_bits, momentum_dtype=momentum_dtype, **options)
    pair = Lion(twins[0], fused=False, **options), Lion(twins[1], fused=True, **options)
    for step in range(2):
        for optimizer, params in zip(pair, twins, strict=True):
            for param in params:
                param.grad = noise(param.numel(), param.numel() + step, 1e-3, dtype).to(param.device)
                if step == 1 and param.numel() > 300:
                    param.grad[300], param.grad[40] = float("inf"), float("nan")
            optimizer.grad_scale = torch.tensor(3.0, device=params[0].device)
            optimizer.step()
    for left, right in zip(*twins, strict=True):
        assert same(left, right)
        states = pair[0].state[left], pair[1].state[right]
        assert states[0].keys() == states[1].keys()
        assert all(same(states[0][key], states[1][key]) for key in states[0])
    assert pair[0].nonfinite_count == pair[1].nonfinite_count == 2


def test_layouts_are_respected() -> None:
    def made(device: str) -> list[nn.Parameter]:
        layouts = [
            torch.empty(()),
            torch.empty(0, 3),
            torch.empty(90, 28)[::2, ::2],
            torch.empty(2, 8, 5, 5).to(memory_format=torch.channels_last),
            torch.empty(31, 33).t(),
            torch.empty(1301)[1:],  # not at a multiple of 16 bytes
        ]
        filled = [
            t.to(device).copy_(noise(t.numel(), i, 0.03, torch.float32).view(t.shape)) for i, t in enumerate(layouts)
        ]
        storage = torch.zeros(1301, device=device)
        filled[-1] = storage[1:].copy_(filled[-1])
        return [nn.Parameter(t) for t in filled]

    twins = made("cpu"), made(DEVICE)
    pair = Lion(twins[0], lr=1e-2, fused=False), Lion(twins[1], lr=1e-2, fused=True)
    for step in range(2):
        for optimizer, params in zip(pair, twins, strict=True):
            for param in params:  # gradients in the default order of dimensions
                param.grad = noise(param.numel(), step, 1.0, torch.float32).view(param.shape).to(param.device)
            optimizer.step()
    assert all(same(left, right) for left, right in zip(*twins, strict=True))


def test_one_launch_for_all_tensors_and_groups_of_a_dtype(launches: list[int]) -> None:
    params = params_of(torch.float32, DEVICE) + params_of(torch.bfloat16, DEVICE)
    groups = [{"params": params[::2], "weight_decay": 0.0}, {"params": params[1::2], "lr": 1e-2, "betas": (0.5, 0.6)}]
    optimizer = Lion(groups, lr=1e-3, weight_decay=0.1, fused=True)
    twins = params_of(torch.float32, "cpu") + params_of(torch.bfloat16, "cpu")
    groups = [{**groups[0], "params": twins[::2]}, {**groups[1], "params": twins[1::2]}]
    reference = Lion(groups, lr=1e-3, weight_decay=0.1, fused=False)
    for param in (*params, *twins):
        param.grad = noise(param.numel(), 5, 1e-3, param.dtype).to(param.device)
    optimizer.step()
    reference.step()
    assert launches == [1 + 2] * 2
    assert all(same(left, right) for left, right in zip(params, twins, strict=True))


def test_another_default_device_does_not_matter() -> None:
    """The tables are made on the host, where tensors without data cannot be."""
    twins = params_of(torch.float32, "cpu"), params_of(torch.float32, DEVICE)
    pair = Lion(twins[0], lr=1e-2, fused=False), Lion(twins[1], lr=1e-2, fused=True)
    for optimizer, params in zip(pair, twins, strict=True):
        for param in params:
            param.grad = noise(param.numel(), 5, 1e-3, param.dtype).to(param.device)
        with torch.device("meta"):
            optimizer.step()
    assert all(same(left, right) for left, right in zip(*twins, strict=True))


@pytest.mark.parametrize(("weight", "momentum_dtype"), RANDOM_MODES)
def test_random_bits_belong_to_elements(weight: tuple[torch.dtype, int], momentum_dtype: torch.dtype | None) -> None:
    """A shard rounds as the whole does, wherever it begins, and so with a step number kept on the device."""
    whole = update_of(2600, weight, momentum_dtype)
    tested = assert_like_eager(whole, step=torch.tensor(7))
    shard = replace(copied(whole.part(1280, 2600), DEVICE))
    triton.step([shard], torch.zeros((), dtype=torch.int64, device=DEVICE))
    assert same(shard.param, tested.param[1280:])
    assert same(shard.exp_avg, tested.exp_avg[1280:])
    other = copied(replace(whole, settings=replace(whole.settings, step=2**33 + 8)), DEVICE)
    triton.step([other], torch.zeros((), dtype=torch.int64, device=DEVICE))
    assert not same(other.param, tested.param) or not same(other.exp_avg, tested.exp_avg)
    assert_like_eager(replace(whole, offset=2**32 - 700, index=70_000, settings=other.settings))


@pytest.mark.parametrize("scalar_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_lr_grad_scale_and_found_inf_are_read_on_the_device(dtype: torch.dtype, scalar_dtype: torch.dtype) -> None:
    scalars = dict(lr=torch.tensor(1e-2), grad_scale=torch.tensor(7.0), found_inf=torch.tensor(0.0))
    scalars = {name: value.to(scalar_dtype) for name, value in scalars.items()}
    update = update_of(1300, (dtype, 32), torch.float32, grad_scale=7.0, lr=float(scalars["lr"]), maximize=True)
    tested = assert_like_eager(update, **scalars)
    assert not same(tested.param, update.param)


@pytest.mark.parametrize(("weight", "momentum_dtype"), [((torch.float32, 32), None), *RANDOM_MODES])
def test_found_inf_changes_nothing(weight: tuple[torch.dtype, int], momentum_dtype: torch.dtype | None) -> None:
    before = update_of(1300, weight, momentum_dtype, skip_nonfinite=False)
    before.grad[7] = float("inf")
    if before.exp_avg_scale is not None:
        before.exp_avg.clamp_(-90, 90)  # stored anew, the largest level of a block would be 127
    after = copied(before, DEVICE)
    after.settings = replace(after.settings, found_inf=torch.ones((), device=DEVICE))
    count = torch.zeros((), dtype=torch.int64, device=DEVICE)
    triton.step([after], count)
    for name in STORED:
        assert getattr(before, name) is None or same(getattr(before, name), getattr(after, name)), name
    assert count == 1


@pytest.mark.parametrize("agreeing", [0, 3, 200])
def test_cautious_steps_stop_at_their_limit(agreeing: int) -> None:
    update = update_of(300, (torch.float32, 32), torch.float32, cautious=True)
    update.exp_avg.copy_(update.grad * -100)
    update.exp_avg[:agreeing] *= -1
    tested = assert_like_eager(update)
    moved = (tested.param.cpu() - update.param).abs().max()
    assert moved < 2.01 * 1e-3
    assert (moved > 1.9e-3) == (agreeing == 3)


@pytest.mark.parametrize("grad_dtype", [torch.float16, torch.float32, torch.float64])
def test_gradients_of_another_dtype(grad_dtype: torch.dtype) -> None:
    update = update_of(300, (torch.bfloat16, 32), None)
    assert_like_eager(replace(update, grad=update.grad.to(grad_dtype)))


@pytest.mark.parametrize("weight_bits", [32, 24, 16])
def test_weights_at_the_edge_of_bf16(weight_bits: int) -> None:
    largest = torch.finfo(torch.bfloat16).max
    update = update_of(7, (torch.bfloat16, weight_bits), torch.float32, skip_nonfinite=False)
    edge = torch.tensor([largest, -largest, float("nan"), 2.0**-133, float("inf"), 0.0, -0.0]).bfloat16()
    for lr in (0.0, 1e36):
        changed = replace(update, settings=replace(update.settings, lr=lr))
        changed.param, changed.weight_remainder = edge.clone(), update.weight_remainder
        assert_like_eager(changed)


def test_int8_momentum_at_its_edges() -> None:
    """Blocks of zeros, of one outlier, of subnormal numbers and of an infinity."""
    update = update_of(1024, (torch.float32, 32), torch.int8, skip_nonfinite=False)
    update.exp_avg.zero_()
    update.grad.zero_()
    update.grad[300] = 1.0
    update.grad[512:768] = 1e-38
    update.grad[800] = float("inf")
    assert_like_eager(update)
