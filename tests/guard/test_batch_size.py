"""The batch of a step is counted, and its accumulation worked out."""

from collections import UserDict

import torch

from lion_lightning.guard.preflight import EffectiveBatch, samples_in


def test_the_samples_of_a_batch_are_counted_where_its_structure_tells_them():
    x, y, image = torch.ones(64, 4), torch.ones(64, 1), torch.ones(3, 8, 8)
    assert samples_in([x, y]) == samples_in({"x": x, "y": y}) == samples_in(x) == 64
    assert samples_in(UserDict(x=x, y=y)) == 64  # as transformers' BatchEncoding
    assert samples_in({"texts": ["a"] * 5}) == samples_in([[image] * 5, [{"boxes": y}] * 5]) == 5
    assert samples_in({"ragged": [torch.ones(length) for length in (3, 5, 7)]}) == 3
    for several_loaders in ({"a": [x, y], "b": [x, y]}, [[x, y], [x, y]], [[x, x], [x, x]], [[x, y]]):
        assert samples_in(several_loaders) == 0


def test_micro_batches_add_up_and_a_short_tail_counts_as_it_is():
    batch = EffectiveBatch(min_batch_size=64)
    assert not batch.is_small  # nothing seen yet
    for samples, expected in (((32, 32), 64), ((32, 7), 39)):
        for micro in samples:
            batch.pending += micro
        batch.close()
        assert batch.last == expected
    assert batch.is_small


def test_the_advice_names_what_was_seen_and_what_to_do():
    batch = EffectiveBatch(min_batch_size=64)
    batch.pending += 24
    batch.close()
    assert "24 samples, below 64" in batch.advice()
    assert "accumulate 3 times" in batch.advice()


def test_state_goes_round():
    batch = EffectiveBatch()
    batch.pending += 5
    batch.close()
    batch.pending += 3
    again = EffectiveBatch()
    again.load_state_dict(batch.state_dict())
    again.close()
    assert (batch.last, again.last) == (5, 3)
