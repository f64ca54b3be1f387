"""B_simple against a problem whose gradient noise is known."""

import math

import pytest
import torch

from lion_lightning.guard.preflight import NoiseScale

SIZE, SMALL, LARGE = 100, 16, 64


def estimate(true_scale, steps, seed=1, small=SMALL, large=LARGE):
    """The estimate after `steps` steps whose gradients are signal plus noise that falls with the batch."""
    dice, noise = torch.Generator().manual_seed(seed), NoiseScale()
    signal = torch.full((SIZE,), 1 / SIZE**0.5, dtype=torch.float64)  # |gradient|^2 = 1
    deviation = (true_scale / SIZE) ** 0.5  # trace of a sample's covariance = true_scale
    for _ in range(steps):
        samples = signal + deviation * torch.randn(large, SIZE, generator=dice, dtype=torch.float64)
        first, whole = samples[:small].mean(0), samples.mean(0)
        noise.observe(float(first.square().sum()), small, float(whole.square().sum()), large)
    return noise


@pytest.mark.parametrize("true_scale", [3.0, 40.0, 200.0])
def test_the_estimate_is_right_within_a_few_percent(true_scale):
    assert estimate(true_scale, steps=400).value == pytest.approx(true_scale, rel=0.06)


def test_it_does_not_depend_on_how_the_batch_is_split():
    for small, large in ((1, 32), (8, 32), (8, 256)):
        assert estimate(40.0, 400, small=small, large=large).value == pytest.approx(40.0, rel=0.08)


def test_nothing_is_known_before_two_sizes_were_seen():
    noise = NoiseScale()
    assert math.isnan(noise.value)
    noise.observe(1.0, 64, 1.0, 64)
    noise.observe(math.nan, 16, 1.0, 64)
    noise.observe(1.0, 16, math.inf, 64)
    assert math.isnan(noise.value)


def test_a_gradient_without_noise_needs_no_batch_and_one_without_signal_any():
    pure, drowned = NoiseScale(), NoiseScale()
    pure.observe(1.0, 16, 1.0, 64)
    drowned.observe(1.0, 16, 0.25, 64)
    assert pure.value == 0
    assert drowned.value == math.inf


def test_a_restored_estimate_goes_on_as_before():
    noise, again = estimate(40.0, 30), NoiseScale()
    again.load_state_dict(noise.state_dict())
    for scale in (noise, again):
        scale.observe(3.0, SMALL, 1.5, LARGE)
    assert again.value == noise.value
