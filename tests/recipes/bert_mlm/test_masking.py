"""Masking: exact counts, BERT's shares, and the same tokens for the same (seed, sample) every time."""

import math

import pytest
import torch
from torch import Tensor

from lion_lightning.recipes.bert_mlm.masking import IGNORED, Masking, uniform
from tests.recipes.hidden_text import FIRST, MASK, SIGMAS, Vocabulary, hidden_map

VOCABULARY = Vocabulary(105)
BATCH, LENGTH = 500, 100
mask = VOCABULARY.mask


def text(batch: int = BATCH, length: int = LENGTH) -> Tensor:
    return VOCABULARY.text(batch, length)


@pytest.mark.parametrize(("rate", "count"), [(0.15, 15), (0.3, 30), (0.404, 40), (0.001, 1)])
def test_the_count_is_exact_and_no_position_comes_twice(rate: float, count: int) -> None:
    batch = mask(text(), rate=rate)
    assert batch.positions.shape == batch.targets.shape == (BATCH, count)
    assert (hidden_map(batch).sum(1) == count).all()


def test_targets_are_the_tokens_that_stood_there_and_the_rest_is_untouched() -> None:
    before = text()
    kept = before.clone()
    batch = mask(before)
    assert torch.equal(before, kept), "the input was changed in place"
    assert torch.equal(batch.targets, before.gather(1, batch.positions))
    assert torch.equal(batch.input_ids[~hidden_map(batch)], before[~hidden_map(batch)])


@pytest.mark.parametrize("shares", [(0.8, 0.1), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.5, 0.3)])
def test_shares_are_what_was_asked_for(shares: tuple[float, float]) -> None:
    before = text()
    batch = mask(before, mask_share=shares[0], random_share=shares[1])
    after = batch.input_ids.gather(1, batch.positions)
    count = after.numel()
    same_by_chance = shares[1] / (VOCABULARY.size - FIRST)
    for seen, expected in (
        ((after == MASK).float().mean(), shares[0]),
        ((after == batch.targets).float().mean(), 1 - sum(shares) + same_by_chance),
    ):
        deviation = math.sqrt(expected * (1 - expected) / count)
        assert abs(float(seen) - expected) <= SIGMAS * deviation + 1e-9


def test_random_tokens_are_drawn_evenly_from_the_whole_vocabulary() -> None:
    batch = mask(text(2000), mask_share=0.0, random_share=1.0, rate=0.5)
    drawn = batch.input_ids.gather(1, batch.positions)
    counts = torch.bincount(drawn.flatten(), minlength=VOCABULARY.size).double()
    assert counts[:FIRST].sum() == 0
    assert len(counts) == VOCABULARY.size
    assert abs(standardised_chi_square(counts[FIRST:])) < SIGMAS


def test_every_position_is_hidden_equally_often() -> None:
    counts = hidden_map(mask(text(4000))).double().sum(0)
    expected = 4000 * 0.15
    # Exactly 15 of 100 are drawn without replacement, which makes counts a little steadier than independent ones.
    assert ((counts - expected).abs() < SIGMAS * math.sqrt(expected * 0.85)).all()
    assert counts.std() > 0.5 * math.sqrt(expected * 0.85), "too even to be random"


def test_special_tokens_are_never_hidden() -> None:
    ids = text()
    ids[:, 0], ids[:, 50:60] = 2, 3
    batch = mask(ids)
    assert (batch.targets >= FIRST).all()
    assert torch.equal(batch.input_ids[ids < FIRST], ids[ids < FIRST])


def test_a_sequence_of_almost_only_special_tokens_ignores_the_rest() -> None:
    ids = torch.full((3, LENGTH), 3)
    ids[:, 7] = 42
    batch = mask(ids)
    assert (batch.targets.sort(1, descending=True).values[:, 0] == 42).all()
    assert ((batch.targets == IGNORED).sum(1) == 14).all()
    assert torch.equal(batch.input_ids[:, 8:], ids[:, 8:])


def test_a_sample_is_masked_alike_in_any_batch_and_order() -> None:
    ids = text(16)
    samples = torch.arange(1000, 1016)
    whole = mask(ids, samples)
    order = torch.tensor([9, 3, 15, 0])
    part = mask(ids[order], samples[order])
    assert torch.equal(part.input_ids, whole.input_ids[order])
    assert torch.equal(part.positions, whole.positions[order])


def test_it_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first = mask(text())
    torch.manual_seed(123)
    second = mask(text())
    assert torch.equal(first.input_ids, second.input_ids)
    torch.random.set_rng_state(before)


@pytest.mark.parametrize("other", [{"seed": 2}, {"sample": 1}, {"sample": 2**32}, {"seed": 2**32 + 1}])
def test_another_seed_or_sample_is_masked_independently(other: dict[str, int]) -> None:
    """Independent masks share 15 % of their positions, whichever way the two differ."""
    ids = text(1, 128).expand(400, -1)
    samples = torch.arange(400) * 7
    first = hidden_map(mask(ids, samples))
    second = hidden_map(mask(ids, samples + other.get("sample", 0), seed=other.get("seed", 1)))
    hidden = first.sum(1)[0].item()
    overlap = (first & second).sum(1).double().mean() / hidden
    expected = hidden / 128
    assert abs(float(overlap) - expected) < SIGMAS * math.sqrt(expected / (400 * hidden))


def test_which_and_how_are_independent() -> None:
    """What happens to a token says nothing about which was the likeliest to be hidden."""
    how = uniform(1, 2, torch.arange(BATCH), LENGTH).flatten().double()
    which = uniform(1, 1, torch.arange(BATCH), LENGTH).flatten().double()
    assert abs(correlation(how, which)) < SIGMAS / math.sqrt(how.numel())


def test_uniform_has_the_moments_of_a_uniform_distribution() -> None:
    numbers = uniform(1, 1, torch.arange(2000), 128).double().flatten()
    count = numbers.numel()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(float(numbers.mean()) - 1 / 2) < SIGMAS * math.sqrt(1 / 12 / count)
    assert abs(float(numbers.var()) - 1 / 12) < SIGMAS * math.sqrt(1 / 180 / count)
    counts = torch.histc(numbers, 256, 0, 1)
    assert abs(standardised_chi_square(counts)) < SIGMAS


@pytest.mark.parametrize("samples", [torch.arange(2000), torch.arange(2000) * 64, 2**40 + torch.arange(2000)])
def test_neighbours_are_uncorrelated(samples: Tensor) -> None:
    numbers = uniform(3, 1, samples, 128).double()
    bound = SIGMAS / math.sqrt(numbers.numel())
    assert abs(correlation(numbers[:, 1:], numbers[:, :-1])) < bound
    assert abs(correlation(numbers[1:], numbers[:-1])) < bound
    assert len(numbers[:, 0].unique()) > 1990


def test_a_longer_sequence_starts_like_a_shorter_one() -> None:
    sample = torch.arange(4)
    assert torch.equal(uniform(1, 1, sample, 200)[:, :64], uniform(1, 1, sample, 64))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"rate": 0.0}, "rate must be between 0 and 1, got 0.0"),
        ({"rate": 1.0}, "rate must be between 0 and 1, got 1.0"),
        ({"rate": -0.1}, "rate must be between 0 and 1, got -0.1"),
        ({"rate": math.nan}, "rate must be between 0 and 1, got nan"),
        ({"mask_share": -0.1}, "mask_share must be in .* got -0.1"),
        ({"random_share": -0.1}, "random_share must be in .* got -0.1"),
        ({"mask_share": 0.95}, "mask_share and random_share .* got 0.95 and 0.1"),
        ({"mask_share": math.nan}, "mask_share"),
        ({"random_share": math.nan}, "random_share"),
    ],
)
def test_bad_shares_are_named(wrong: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Masking(**wrong)


def standardised_chi_square(counts: Tensor) -> float:
    """Pearson's statistic of even counts, in standard deviations from its mean."""
    expected = counts.sum() / len(counts)
    freedom = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def correlation(first: Tensor, second: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])
