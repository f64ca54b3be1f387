"""Whole words and spans: nothing but whole units, spans of SpanBERT's lengths, the same ones every time."""

import math
from itertools import groupby

import pytest
import torch
from torch import Tensor

from lion_lightning.recipes.bert_mlm.masking import IGNORED, Masking, span_numbers, whole_units, word_numbers
from tests.recipes.hidden_text import FIRST, MASK, SIGMAS, Vocabulary, hidden_map

VOCABULARY = Vocabulary(205, starts_word=torch.arange(205) < 140)  # the rest goes on with a word: a third of the tokens
BATCH, LENGTH = 400, 128
mask = VOCABULARY.mask


def text(batch: int = BATCH, length: int = LENGTH) -> Tensor:
    ids = VOCABULARY.text(batch, length)
    ids[:, 0], ids[:, 70] = 2, 3
    return ids


def words_by_hand(row: list[int]) -> list[int]:
    numbers = []
    for place, token in enumerate(row):
        goes_on = place > 0 and token >= 140 and row[place - 1] >= FIRST
        numbers.append(numbers[-1] if goes_on else (numbers[-1] + 1 if numbers else 0))
    return numbers


def test_words_are_numbered_as_by_hand() -> None:
    ids = text(20)
    ids[:, 1] = 150  # a block that begins in the middle of a word
    found = word_numbers(ids, ids < FIRST, VOCABULARY.starts_word)
    assert found.tolist() == [words_by_hand(row) for row in ids.tolist()]


def test_a_word_is_hidden_whole_or_not_at_all() -> None:
    ids = text()
    hidden = hidden_map(mask(ids, unit="word"))
    for row, flags in zip(ids.tolist(), hidden.tolist(), strict=True):
        for _, pieces in groupby(zip(words_by_hand(row), flags, strict=True), key=lambda pair: pair[0]):
            assert len({flag for _, flag in pieces}) == 1
    assert (ids[hidden] >= 140).any(), "no word of several pieces was hidden, so this says nothing"


def test_as_many_whole_words_are_hidden_as_fit() -> None:
    budget = round(0.15 * LENGTH)
    batch = mask(text(), unit="word")
    assert batch.positions.shape == (BATCH, budget)
    counts = hidden_map(batch).sum(1)
    assert int(counts.max()) == budget
    # What stays free is at most the last word that did not fit: under one token on average.
    assert float(counts.double().mean()) > budget - 1


def test_a_word_longer_than_the_budget_stays_visible_and_the_others_get_its_place() -> None:
    ids = torch.full((BATCH, 64), 150)
    ids[:, :3] = torch.tensor([2, 10, 11])
    ids[:, 40:] = 12
    batch = mask(ids, unit="word")
    assert not hidden_map(batch)[:, 2:40].any()
    assert (hidden_map(batch).sum(1) == round(0.15 * 64)).all()


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_spans_have_the_lengths_of_the_truncated_geometric_distribution(p: float) -> None:
    most, rows = 10, 2000
    words = torch.arange(LENGTH).expand(rows, -1)
    spans = span_numbers(words, torch.rand(rows, LENGTH, generator=torch.Generator().manual_seed(1)), p, most)
    lengths = torch.stack([torch.bincount(row, minlength=LENGTH) for row in spans])[:, :10]  # none cut by the end
    counts = torch.bincount(lengths.flatten(), minlength=most + 1).double()
    expected = torch.tensor([0.0] + [p * (1 - p) ** (number - 1) for number in range(1, most + 1)]).double()
    expected *= counts.sum() / expected.sum()
    assert counts[0] == 0
    assert len(counts) == most + 1
    deviations = (counts - expected)[1:] / expected[1:].sqrt()
    assert float(deviations.abs().max()) < SIGMAS
    if p == 0.2:  # 3.8 words, as the paper says
        mean = float(lengths.double().mean())
        assert mean == pytest.approx(3.80, abs=0.06)


def test_hidden_runs_are_spans() -> None:
    """With few hidden tokens spans hardly touch: runs are as long as spans, and not as long as single tokens."""
    ids = text(4000)
    ids[ids >= 140] = 100  # a word is a token
    hidden = hidden_map(mask(ids, unit="span", rate=0.06))
    runs = [len(list(run)) for row in hidden.tolist() for flag, run in groupby(row) if flag]
    assert (hidden.sum(1) == round(0.06 * LENGTH)).all()
    assert 2.6 < sum(runs) / len(runs) < 4.2  # 3.8 less what the budget of 8 cuts
    tokens = hidden_map(mask(ids, unit="token", rate=0.06))
    runs = [len(list(run)) for row in tokens.tolist() for flag, run in groupby(row) if flag]
    assert sum(runs) / len(runs) < 1.2


def test_spans_fill_the_budget_exactly_and_begin_with_words() -> None:
    ids = text()
    hidden = hidden_map(mask(ids, unit="span"))
    assert (hidden.sum(1) == round(0.15 * LENGTH)).all()
    for row, flags in zip(ids.tolist(), hidden.tolist(), strict=True):
        words = words_by_hand(row)
        for place in range(2, LENGTH):
            if flags[place] and not flags[place - 1]:
                assert words[place] != words[place - 1] or row[place - 1] < FIRST


def test_a_span_is_replaced_as_one_and_words_token_by_token() -> None:
    ids = text(1000)
    for unit, alike in (("span", True), ("word", False)):
        batch = mask(ids, unit=unit, mask_share=0.5, random_share=0.0)
        became_mask = (batch.input_ids == MASK).double()
        shown = hidden_map(batch)
        both = shown[:, 1:] & shown[:, :-1]
        same = (became_mask[:, 1:] == became_mask[:, :-1])[both].double().mean()
        # Neighbours are mostly of one span; of different units or tokens they agree half of the time.
        assert (float(same) > 0.8) is alike
        share = float(became_mask.sum() / shown.sum())
        assert share == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("unit", ["word", "span"])
def test_every_place_is_hidden_about_equally_often(unit: str) -> None:
    rows = 4000
    ids = text(1, LENGTH).expand(rows, -1).clone()
    ids[:, 1:] = torch.randint(FIRST, VOCABULARY.size, (rows, LENGTH - 1), generator=torch.Generator().manual_seed(2))
    hidden = hidden_map(mask(ids, unit=unit)).double()
    per_place = hidden.sum(0)[1:]
    mean = float(per_place.mean())
    assert mean == pytest.approx(rows * 0.145, rel=0.08)
    # Tokens of a unit go together, which makes rows vary more but not places: bound by independent draws.
    assert float((per_place - mean).abs().max()) < SIGMAS * math.sqrt(mean) + 0.03 * mean
    assert hidden[:, 0].sum() == 0


@pytest.mark.parametrize("unit", ["word", "span"])
def test_special_tokens_are_never_hidden_and_the_rest_is_untouched(unit: str) -> None:
    ids = text()
    ids[:, 30:60:2] = 3
    batch = mask(ids, unit=unit)
    hidden = hidden_map(batch)
    assert not hidden[ids < FIRST].any()
    assert torch.equal(batch.input_ids[~hidden], ids[~hidden])
    kept = batch.targets != IGNORED
    assert torch.equal(batch.targets[kept], ids.gather(1, batch.positions)[kept])
    assert all(len(set(row)) == len(row) for row in batch.positions.tolist())


@pytest.mark.parametrize("unit", ["word", "span"])
def test_a_sample_is_masked_alike_in_any_batch_and_another_differently(unit: str) -> None:
    ids = text(16)
    samples = torch.arange(1000, 1016)
    whole = mask(ids, samples, unit=unit)
    order = torch.tensor([9, 3, 15, 0])
    part = mask(ids[order], samples[order], unit=unit)
    assert torch.equal(part.input_ids, whole.input_ids[order])
    assert torch.equal(part.targets, whole.targets[order])
    for other in (mask(ids, samples + 1, unit=unit), mask(ids, samples, seed=2, unit=unit)):
        overlap = (hidden_map(other) & hidden_map(whole)).sum() / hidden_map(whole).sum()
        assert float(overlap) < 0.35


def test_units_of_one_token_are_taken_by_their_keys() -> None:
    unit = torch.arange(8).expand(3, -1)
    key = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
    special = torch.zeros(3, 8, dtype=torch.bool)
    for cut in (True, False):
        positions, kept = whole_units(unit, key, special, 3, cut)
        assert torch.equal(positions, key.topk(3).indices)
        assert kept.all()


def test_words_need_to_be_known() -> None:
    with pytest.raises(ValueError, match="unit='word' needs starts_word"):
        Vocabulary(205).mask(text(2), unit="word")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"unit": "sentence"}, "unit must be one of token, word, span, got 'sentence'"),
        ({"span_p": 0.0}, "span_p must be between 0 and 1, got 0.0"),
        ({"span_p": 1.0}, "span_p must be between 0 and 1, got 1.0"),
        ({"span_max": 0}, "span_max must be a whole number of at least 1, got 0"),
        ({"span_max": 2.5}, "span_max must be a whole number of at least 1, got 2.5"),
    ],
)
def test_bad_units_are_named(wrong: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Masking(**wrong)
