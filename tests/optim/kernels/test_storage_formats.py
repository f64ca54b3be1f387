"""Random bits, splits and int8 levels: exactness, lack of bias, and what keys the randomness."""

import pytest
import torch
from torch import Tensor, nn

from lion_lightning.optim import Lion
from lion_lightning.optim.kernels import storage_formats
from tests.reference.storage import kept_weight

CPU = torch.device("cpu")


def draw(seed: int = 0, step: int = 0, index: int = 0, start: int = 0, count: int = 4096) -> Tensor:
    return storage_formats.random_bits(storage_formats.random_keys(seed, step, index), start, count, CPU)


def test_the_hash_is_the_documented_one() -> None:
    """Word by word in Python integers."""
    first, second = storage_formats.random_keys(3, 5, 7)
    for element, word in enumerate(draw(3, 5, 7, count=50).tolist()):
        value = element ^ first
        value ^= value >> 16
        value = value * 0x7FEB352D & 0xFFFFFFFF
        value ^= value >> 15
        value = (value + second & 0xFFFFFFFF) * 0x846CA68B & 0xFFFFFFFF
        value ^= value >> 16
        assert word & 0xFFFFFFFF == value


def test_random_bits_depend_on_seed_step_parameter_and_element_alone() -> None:
    base = draw()
    assert torch.equal(base, draw())
    assert torch.equal(base[100:200], draw(start=100, count=100))
    others = [draw(seed=1), draw(seed=2**40), draw(step=1), draw(index=1), draw(start=1)]
    for other in others:
        assert (other == base).float().mean() < 0.01


def test_a_step_counter_on_a_device_keys_the_same_bits() -> None:
    for step in (0, 1, 123_456):
        keys = storage_formats.random_keys(2**63 + 5, torch.tensor(step), 9)
        assert tuple(int(key) for key in keys) == storage_formats.random_keys(2**63 + 5, step, 9)


@pytest.mark.parametrize("half", [0, 16])
def test_random_bits_are_uniform_over_elements_and_steps(half: int) -> None:
    over_elements = (draw(count=200_000) >> half) & 0xFFFF
    over_steps = torch.cat([draw(step=step, count=4) for step in range(5000)])
    for words in (over_elements, (over_steps >> half) & 0xFFFF):
        counts = torch.bincount(words >> 10, minlength=64).double()
        expected = words.numel() / 64
        chi_squared = ((counts - expected) ** 2 / expected).sum()
        assert 20 < chi_squared < 130  # 63 degrees of freedom


def split(values: Tensor, weight_bits: int, random: Tensor) -> tuple[Tensor, Tensor | None]:
    """The bf16 part and the remainder of fp32 numbers."""
    high = torch.empty_like(values, dtype=torch.bfloat16)
    dtype = storage_formats.REMAINDER_DTYPES[weight_bits]
    remainder = None if dtype is None else torch.empty_like(values, dtype=dtype)
    words = storage_formats.ordinary(values).view(torch.int32)
    storage_formats.store_words(words, high, remainder, weight_bits, random)
    return high, remainder


@pytest.mark.parametrize("weight_bits", [32, 24])
def test_every_pattern_that_is_stored_comes_back(weight_bits: int) -> None:
    words = torch.randint(-(2**31), 2**31, (100_000,), dtype=torch.int64).to(torch.int32)
    words = words & -(1 << (32 - weight_bits))
    values = words.view(torch.float32)
    values = values[values.abs() <= storage_formats.BFLOAT16_MAX]
    random = torch.zeros_like(values, dtype=torch.int32)
    high, remainder = split(values, weight_bits, random)
    assert torch.equal(storage_formats.join_weight(high, remainder).view(torch.int32), values.view(torch.int32))
    assert torch.equal(kept_weight(high, remainder), values.double())
    assert ((high.double() - values.double()).abs() <= (values.double() * 2.0**-8).abs() + 1e-40).all()


@pytest.mark.parametrize("weight_bits", [24, 16])
@pytest.mark.parametrize("value", [0.0123456, -0.0987654])
def test_stochastic_rounding_has_no_bias(weight_bits: int, value: float) -> None:
    values = torch.full((1_000_000,), value)
    high, remainder = split(values, weight_bits, draw(count=values.numel()))
    stored = kept_weight(high, remainder)
    spacing = stored.max() - stored.min()
    assert 0 < spacing < abs(value) * 2.0 ** -(weight_bits - 10)
    assert (stored.mean() - values[0].double()).abs() < spacing * 0.0025  # five standard errors


def test_int8_levels_have_no_bias_and_a_momentum_decays() -> None:
    block = torch.linspace(-1, 1, 256).repeat(4000)
    levels, scale = storage_formats.quantize(block, draw(count=block.numel()))
    decoded = storage_formats.dequantize(levels, scale).double().view(4000, 256)
    error = decoded.mean(0) - block[:256].double()
    widest = 2**7 / 16 / 247  # a level is off by at most half of it, standard deviation
    assert (error.abs() <= 5 * widest / 2 / 4000**0.5).all()
    assert (error * block[:256].sign()).mean().abs() <= 5 * widest / 2 / block.numel() ** 0.5
    momentum = torch.rand(4096, generator=torch.Generator().manual_seed(0)) * 0.3
    momentum[::256] = 1.0  # small beside their block's largest: nearest rounding would freeze these
    start = momentum.clone()
    for step in range(200):
        momentum = storage_formats.dequantize(*storage_formats.quantize(momentum * 0.99, draw(step=step)))
    assert (momentum.sum() / start.sum()).item() == pytest.approx(0.99**200, rel=0.02)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1.0, 1e30])
def test_int8_scales_hold_small_and_large_momenta(magnitude: float) -> None:
    momentum = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * magnitude
    decoded = storage_formats.dequantize(*storage_formats.quantize(momentum, None))
    assert (decoded - momentum).abs().max() / momentum.abs().max() < 0.017  # half the widest step


def test_small_tensors_keep_fp32_momentum() -> None:
    small, large = nn.Parameter(torch.zeros(4095)), nn.Parameter(torch.zeros(4097))
    optimizer = Lion([small, large], momentum_dtype="int8")
    small.grad, large.grad = torch.ones(4095), torch.ones(4097)
    optimizer.step()
    assert optimizer.state[small]["exp_avg"].dtype == torch.float32
    assert optimizer.state[large]["exp_avg"].dtype == torch.int8
    assert optimizer.state[large]["exp_avg_scale"].shape == (17,)


def test_replicas_round_alike_and_seeds_do_not() -> None:
    def trained(seed: int) -> Tensor:
        param = nn.Parameter(torch.full((5000,), 0.03, dtype=torch.bfloat16))
        optimizer = Lion([param], lr=1e-5, weight_bits=16, momentum_dtype="int8", seed=seed)
        for step in range(3):
            param.grad = torch.full_like(param, 1.0 + step)
            optimizer.step()
        return param.detach()

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))
