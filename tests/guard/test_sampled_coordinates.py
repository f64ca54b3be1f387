"""Flip rate, cosine and dead share of the sampled coordinates, against the same worked out in float64 one by one."""

import math

import pytest
import torch
from torch import nn

from lion_lightning import Lion
from lion_lightning.guard.reading import UPDATE_SUMS
from lion_lightning.guard.rules import StuckMomentum, Thresholds
from lion_lightning.guard.sampled_coordinates import SLICE_ELEMENTS, SLICES, SampledCoordinates
from lion_lightning.optim.kernels import storage_formats

SHAPES = [(64, 96), (64,), (4096,), (300,)]


def measure(sample):
    """The sums by their names."""
    sums = sample.measure()
    return dict(zip(UPDATE_SUMS, sums, strict=True)) if len(sums) else {}


def share(measured):
    """Rate of flips, NaN where nothing could be compared."""
    return float(measured["flips"] / measured["signs"]) if measured["signs"] else math.nan


def parameters(seed=1, shapes=SHAPES, dtype=torch.float32):
    dice = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=dice).to(dtype)) for shape in shapes]


def give_gradients(params, number, zeros=0.2):
    """Gradients with a common direction and noise; a fifth of them exactly zero."""
    dice = torch.Generator().manual_seed(1000 + number)
    for param in params:
        grad = 0.3 + torch.randn(param.shape, generator=dice)
        param.grad = (grad * (torch.rand(param.shape, generator=dice) >= zeros)).to(param.dtype)


def exact_momentum(state):
    """float64 momentum, as stored."""
    exp_avg = state["exp_avg"].flatten()
    if "exp_avg_scale" not in state:
        return exp_avg.double()
    scale = state["exp_avg_scale"].double().repeat_interleave(storage_formats.BLOCK_ELEMENTS)[: exp_avg.numel()]
    return storage_formats.dequantize(exp_avg, state["exp_avg_scale"]).double() if scale.numel() else exp_avg.double()


class Oracle:
    """Every sampled coordinate one by one."""

    def __init__(self, sample):
        self.sample, self.signs = sample, None

    def measure(self):
        updates, grads = [], []
        for number, param, start, stop in self.sample.slices:
            group = self.sample.optimizer.param_groups[number]
            beta1 = group["betas"][0]
            momentum = exact_momentum(self.sample.optimizer.state[param])[start:stop]
            grad = param.grad.double().flatten()[start:stop] * (-1 if group["maximize"] else 1)
            updates += torch.sign(beta1 * momentum + (1 - beta1) * grad).tolist()
            grads += grad.tolist()
        old, self.signs = self.signs, updates
        dot = sum(update * grad for update, grad in zip(updates, grads, strict=True))
        return {
            "flips": sum(a * b < 0 for a, b in zip(old, updates, strict=True)) if old else 0,
            "signs": sum(a * b != 0 for a, b in zip(old, updates, strict=True)) if old else 0,
            "projection": dot,
            "update_squares": sum(update**2 for update in updates),
            "grad_squares": sum(grad**2 for grad in grads),
            "dead": sum(abs(update) for update, grad in zip(updates, grads, strict=True) if grad == 0),
        }


def compare(optimizer, params, steps=6):
    sample = SampledCoordinates(optimizer)
    oracle, rates = Oracle(sample), []
    for number in range(steps):
        give_gradients(params, number)
        if number:  # there is momentum
            measured, expected = measure(sample), oracle.measure()
            assert measured.keys() == expected.keys()
            for name, value in expected.items():
                assert float(measured[name]) == pytest.approx(value, rel=1e-4, abs=1.5), name
            if expected["signs"]:
                rates.append(expected["flips"] / expected["signs"])
        optimizer.step()
    assert min(rates) > 0.02, "signs flip"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"betas": (0.95, 0.98)},
        {"maximize": True},
        {"momentum_dtype": "int8"},
        {"momentum_dtype": "bfloat16"},
        {"cautious": True},
    ],
    ids=str,
)
def test_the_sums_are_those_of_the_coordinates_one_by_one(options):
    params = parameters()
    compare(Lion(params, lr=1e-3, **options), params)


def test_bf16_parameters_with_int8_momentum():
    params = parameters(dtype=torch.bfloat16)
    compare(Lion(params, lr=1e-3, weight_bits=24, momentum_dtype="int8"), params)


def test_each_group_has_its_own_beta_and_direction():
    params = parameters()
    groups = [
        {"params": params[:1], "betas": (0.5, 0.99)},
        {"params": params[1:3], "betas": (0.95, 0.98), "maximize": True},
        {"params": params[3:]},
    ]
    compare(Lion(groups, lr=1e-3), params)


def test_a_transposed_weight_is_sampled_at_the_same_coordinates_in_gradient_and_momentum():
    weight = nn.Parameter(torch.randn(64, 96).t())
    optimizer = Lion([weight], lr=1e-3)
    sample = SampledCoordinates(optimizer)
    ((_, _, start, stop),) = sample.slices
    weight.grad = torch.randn(96, 64)
    optimizer.step()
    weight.grad = torch.randn(96, 64)  # laid out otherwise than the weight
    measured = measure(sample)
    grad, momentum = (
        tensor.t().contiguous().view(-1)[start:stop].double()
        for tensor in (weight.grad, optimizer.state[weight]["exp_avg"])
    )
    update = torch.sign(0.9 * momentum + 0.1 * grad)
    assert float(measured["projection"]) == pytest.approx(float(update @ grad), rel=1e-4)


def test_the_update_foretold_is_the_one_that_is_made():
    params = parameters(shapes=[(32, 32)])
    optimizer = Lion(params, lr=1.0)
    sample = SampledCoordinates(optimizer)
    signs = []
    for number in range(5):
        give_gradients(params, number, zeros=0.0)
        before = params[0].detach().clone()
        measured = measure(sample)
        optimizer.step()
        signs.append(torch.sign(before - params[0].detach()).flatten())
        if number > 1:
            assert float(measured["flips"]) == float((signs[-1] != signs[-2]).sum())


def test_nothing_is_measured_without_momentum_or_gradients():
    params = parameters()
    optimizer = Lion(params, lr=1e-3)
    sample = SampledCoordinates(optimizer)
    give_gradients(params, 0)
    assert measure(sample) == {}
    optimizer.step()
    assert measure(sample)["signs"] == 0, "there is no step before to compare with"
    assert measure(sample)["signs"] > 0
    for param in params:
        param.grad = None
    assert measure(sample) == {}
    give_gradients(params, 1)
    assert measure(sample)["signs"] == 0, "the signs of before the gap are forgotten"


def test_a_gradient_that_is_not_finite_flips_nothing_and_is_not_counted():
    params = parameters(shapes=[(64, 64)])
    optimizer = Lion(params, lr=1e-3)
    sample, rates = SampledCoordinates(optimizer), []
    for number in range(6):
        give_gradients(params, number, zeros=0.0)
        if number == 3:
            params[0].grad.fill_(math.nan)
        measured = measure(sample)
        optimizer.step()
        if number > 1:
            rates.append(share(measured))
    assert math.isnan(rates[1]), "nothing could be compared"
    assert rates[0] > 0.02
    assert rates[3] > 0.02


def test_a_row_of_nan_steps_is_not_taken_for_a_stuck_momentum():
    params = parameters(shapes=[(64, 64)])
    optimizer, rule = Lion(params, lr=1e-3), StuckMomentum(Thresholds())
    sample = SampledCoordinates(optimizer)
    for number in range(60):
        give_gradients(params, number)
        if 50 <= number < 58:
            params[0].grad.fill_(math.nan)
        measured = measure(sample)
        optimizer.step()
        if measured:
            assert not rule.observe(share(measured)), f"step {number}"


def test_the_sample_is_spread_over_large_parameters_and_bounded():
    params = parameters(shapes=[(200,)] * 5 + [(128, 128)] * 40)
    sample = SampledCoordinates(Lion(params, lr=1e-3))
    assert len({id(param) for _, param, *_ in sample.slices}) == SLICES
    assert all(param.numel() > 200 for _, param, *_ in sample.slices)
    assert sum(stop - start for *_, start, stop in sample.slices) == SLICES * SLICE_ELEMENTS
    assert all(start % storage_formats.BLOCK_ELEMENTS == 0 for *_, start, _ in sample.slices)


def test_small_models_are_sampled_whole():
    sample = SampledCoordinates(Lion(parameters(shapes=[(5, 3), (3,)]), lr=1e-3))
    assert sum(stop - start for *_, start, stop in sample.slices) == 18


def test_the_same_model_is_sampled_at_the_same_places_on_every_rank():
    places = [
        [(start, stop) for *_, start, stop in SampledCoordinates(Lion(parameters(seed), lr=1e-3)).slices]
        for seed in (1, 2)
    ]
    assert places[0] == places[1]


def test_signs_survive_a_checkpoint_and_are_dropped_where_they_do_not_fit():
    params = parameters()
    optimizer = Lion(params, lr=1e-3)
    sample, again, other = SampledCoordinates(optimizer), SampledCoordinates(optimizer), SampledCoordinates(optimizer)
    for number in range(2):
        give_gradients(params, number)
        measure(sample)
        optimizer.step()
    measure(sample)
    again.load_state_dict(sample.state_dict())
    other.load_state_dict(torch.ones(3, dtype=torch.int8))
    give_gradients(params, 5)
    left, right = measure(sample), measure(again)
    assert {name: float(value) for name, value in left.items()} == {name: float(value) for name, value in right.items()}
    assert measure(other)["signs"] == 0
    sample.forget()
    assert sample.state_dict() is None


def test_a_parameter_without_a_gradient_does_not_hide_the_others():
    params = parameters()
    optimizer = Lion(params, lr=1e-3)
    sample = SampledCoordinates(optimizer)
    for number in range(5):
        give_gradients(params, number)
        params[2].grad = None  # never used
        measured = measure(sample)
        optimizer.step()
    sampled = sum(stop - start for _, _, start, stop in sample.slices)
    unused = sum(stop - start for _, param, start, stop in sample.slices if param is params[2])
    assert 0 < unused < sampled
    assert 0.5 * (sampled - unused) < float(measured["signs"]) <= sampled - unused
