"""The data stream: which sample comes when is a function of (seed, position) alone."""

from itertools import chain

import numpy as np
import pytest

from lion_lightning.data.sampler import FixedBatches, StepValues, StreamBatchSampler, StreamOrder
from lion_lightning.data.stream import StreamDataModule
from lion_lightning.errors import ConfigError

SIZE = 23  # a prime, so that no batch ends with an epoch


def sampler_of(batch_size: int = 4, batches: int = 30, seed: int = 1, **settings: int) -> StreamBatchSampler:
    return StreamBatchSampler(StreamOrder([SIZE], seed), StepValues(((0, batch_size),)), batches, **settings)


def stream(batch_size: int = 4, batches: int = 30, seed: int = 1, **settings: int) -> list[tuple[int, int]]:
    return list(chain.from_iterable(sampler_of(batch_size, batches, seed, **settings)))


def test_positions_count_up_from_zero() -> None:
    assert [position for position, _ in stream()] == list(range(120))


def test_the_same_seed_gives_the_same_stream_and_another_another() -> None:
    assert stream(seed=3) == stream(seed=3)
    assert stream(seed=3) != stream(seed=4)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 40])
def test_the_order_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    short = stream(batch_size, batches=120 // batch_size)
    assert short == stream()[: len(short)]


def test_asking_out_of_order_gives_the_same_answer() -> None:
    sampler = sampler_of()
    asked = [(position, sampler.order.index(position)) for position in reversed(range(120))]
    assert asked[::-1] == stream()


@pytest.mark.parametrize("epoch", range(5))
def test_every_sample_comes_once_an_epoch(epoch: int) -> None:
    indices = [index for _, index in stream()][epoch * SIZE : (epoch + 1) * SIZE]
    assert sorted(indices) == list(range(SIZE))


def test_epochs_have_orders_of_their_own_and_none_is_sorted() -> None:
    indices = [index for _, index in stream(batches=100)]
    epochs = [tuple(indices[start : start + SIZE]) for start in range(0, 10 * SIZE, SIZE)]
    assert len({*epochs, tuple(range(SIZE))}) == 11


@pytest.mark.parametrize("start", [*range(0, 44, 4), 92, 116, 120])
def test_a_resume_is_the_tail_of_the_whole_stream(start: int) -> None:
    resumed = sampler_of(start=start)
    assert list(chain.from_iterable(resumed)) == stream()[start:]
    assert len(resumed) == len(list(resumed))


@pytest.mark.parametrize("start", [1, 5, 30])
def test_a_resume_between_batches_of_another_size_goes_on_at_its_position(start: int) -> None:
    resumed = stream(start=start)
    assert resumed[: 120 - start] == stream()[start:][: len(resumed)]


@pytest.mark.parametrize("start", [0, 24, 36])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_each_global_batch_in_order(world_size: int, start: int) -> None:
    ranks = [
        list(sampler_of(12 // world_size, 10, rank=rank, world_size=world_size, start=start))
        for rank in range(world_size)
    ]
    assert {len(rank) for rank in ranks} == {10 - start // 12}
    together = list(chain.from_iterable(chain.from_iterable(batches) for batches in zip(*ranks, strict=True)))
    assert together == stream()[start:]


def test_it_ends_where_the_run_ends() -> None:
    assert len(sampler_of(batches=7)) == 7
    assert list(sampler_of(batches=7, start=28)) == []
    assert list(sampler_of(batches=7, start=500)) == []


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"batches": -1}, "num_batches must be at least 1, got -1"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, 2\), got 2"),
        ({"rank": -1}, "rank must be in .* got -1"),
        ({"start": -1}, "start must not be negative, got -1"),
    ],
)
def test_bad_arguments_are_named(wrong: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        sampler_of(**wrong)


@pytest.mark.parametrize("changes", [[[0, 16], [1e3, 64]], [[0, 16], [1.5, 64]], [[0, True], [10, 64]]])
def test_a_schedule_of_other_than_whole_numbers_is_named(changes: list[list[float]]) -> None:
    with pytest.raises(ConfigError, match=r"data.batch_schedule=.* every (step|value) must be a whole number"):
        StreamDataModule(batch_size=64, batch_schedule=changes)  # type: ignore[arg-type]


def test_an_empty_source_is_named() -> None:
    with pytest.raises(ValueError, match=r"every source must have at least 1 item, got \[5, 0\]"):
        StreamOrder([5, 0], seed=1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_validation_sees_every_item_once_over_all_ranks(world_size: int) -> None:
    for size in range(world_size, 80):
        ranks = [FixedBatches(size, 4, rank, world_size) for rank in range(world_size)]
        pairs = [pair for rank in ranks for batch in rank for pair in batch]
        assert sorted(index for _, index in pairs) == list(range(size))
        assert all(position == index for position, index in pairs)
        assert all(len(rank) == len(list(rank)) for rank in ranks)
        assert len({len(rank) for rank in ranks}) == 1, "sharded ranks wait for each other in every batch"
        assert all(0 < len(batch) <= 4 for rank in ranks for batch in rank)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"batch_size": 0}, "data.batch_size must be a whole number of at least 1, got 0"),
        ({"num_workers": -1}, "data.num_workers must be a whole number of at least 0, got -1"),
        ({"limit_train_samples": 0}, "data.limit_train_samples must be a whole number of at least 1 or null, got 0"),
    ],
)
def test_a_data_module_names_bad_settings(wrong: dict[str, int], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        StreamDataModule(**{"batch_size": 2, **wrong})


@pytest.mark.parametrize(("limit", "told"), [(20, 0), (23, 0), (24, 1)])
def test_a_limit_above_the_number_of_samples_is_named(limit: int, told: int, caplog: pytest.LogCaptureFixture) -> None:
    data = StreamDataModule(batch_size=2, limit_train_samples=limit)
    data.train_set = list(range(SIZE))  # type: ignore[assignment]
    data.check_samples(2)
    assert len(caplog.messages) == told
    assert data.num_train_samples == min(limit, SIZE)
    if told:
        assert "data.limit_train_samples=24 is more than the training set has: all 23" in caplog.text


def test_a_limit_that_leaves_out_classes_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """A folder per class, or a sorted table: the first samples are all of the first classes."""
    labels = np.repeat([0, 1, 2], 8)
    data = StreamDataModule(batch_size=2)
    data.train_set = data.train_labels = labels  # type: ignore[assignment]
    for limit in (None, 24, 17):
        data.limit_train_samples = limit
        data.check_samples(2)
    assert not caplog.messages
    data.limit_train_samples = 16
    data.check_samples(2)
    assert "data.limit_train_samples=16: the first samples have 2 of the 3 classes" in caplog.text


STEPS = StepValues(((0, 2), (3, 5), (10, 8)))


def test_values_change_at_their_steps() -> None:
    values = [STEPS.at(step) for step in range(14)]
    assert values == [2] * 3 + [5] * 7 + [8] * 4
    assert [STEPS.before(step) for step in range(15)] == [sum(values[:step]) for step in range(15)]
    assert STEPS.last == 8


def test_a_sum_is_turned_back_into_steps() -> None:
    for total in range(80):
        steps = STEPS.steps_in(total)
        assert STEPS.before(steps) <= total < STEPS.before(steps + 1)


@pytest.mark.parametrize("changes", [(), ((1, 4),), ((0, 4), (0, 5)), ((0, 4), (9, 5), (3, 6)), ((0, 0),), ((0, 1.5),)])
def test_bad_changes_are_named(changes: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match=r"steps must begin with 0 and rise|whole number of at least 1"):
        StepValues(changes)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("done", [0, 2, 3, 7, 10, 13, 20])
def test_growing_batches_share_and_resume_the_same_stream(world_size: int, done: int) -> None:
    start = STEPS.before(done) * world_size
    ranks = [
        list(StreamBatchSampler(StreamOrder([SIZE], 1), STEPS, 20, rank=rank, world_size=world_size, start=start))
        for rank in range(world_size)
    ]
    assert [len(batch) for batch in ranks[0]] == [STEPS.at(batch) for batch in range(done, 20)]
    together = list(chain.from_iterable(chain.from_iterable(batches) for batches in zip(*ranks, strict=True)))
    whole = stream(1, batches=STEPS.before(20) * world_size)
    assert together == whole[start:]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ([[0, 1], [5, 3]], r"data\.batch_schedule=.* must end with data\.batch_size=2"),
        ([[1, 2]], r"data\.batch_schedule=.* begin with 0 and rise, got \[1\]"),
        ([[0, 0], [1, 2]], r"data\.batch_schedule=.* whole number of at least 1, got 0"),
        ([4], r"data\.batch_schedule=\[4\] must be a list like"),
        ([[0, "2"]], r"data\.batch_schedule=.* whole number"),
        (7, r"data\.batch_schedule=7 must be a list like"),
    ],
)
def test_a_bad_schedule_is_named(wrong: object, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        StreamDataModule(2, batch_schedule=wrong)  # type: ignore[arg-type]
