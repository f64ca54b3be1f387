"""The batch of a step is counted, and its accumulation worked out."""

import pytest

from lion_lightning.guard.batch_size import EffectiveBatch, accumulation


def test_micro_batches_add_up_and_a_short_tail_counts_as_it_is():
    batch = EffectiveBatch(min_batch_size=64)
    assert not batch.is_small  # nothing seen yet
    for samples, expected in (((32, 32), 64), ((32, 7), 39)):
        for micro in samples:
            batch.add(micro)
        batch.close()
        assert batch.last == expected
    assert batch.is_small


def test_the_advice_names_what_was_seen_and_what_to_do():
    batch = EffectiveBatch(min_batch_size=64)
    batch.add(24)
    batch.close()
    assert "24 samples, below 64" in batch.advice()
    assert "accumulate 3 times" in batch.advice()


def test_state_goes_round():
    batch = EffectiveBatch()
    batch.add(5)
    batch.close()
    batch.add(3)
    again = EffectiveBatch()
    again.load_state_dict(batch.state_dict())
    again.close()
    assert (batch.last, again.last) == (5, 3)


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "least", "expected"),
    [(16, 1, 64, 4), (20, 1, 64, 4), (64, 1, 64, 1), (100, 1, 64, 1), (1, 1, 64, 64), (16, 8, 64, 8), (63, 1, 64, 2)],
)
def test_accumulation_is_raised_until_the_batch_is_met_and_never_lowered(batch_size, accumulate, least, expected):
    micro_batches = accumulation(batch_size, accumulate, least)
    assert micro_batches == expected
    assert micro_batches * batch_size >= least
    assert (micro_batches - 1) * batch_size < least or micro_batches == accumulate
