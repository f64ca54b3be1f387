"""How a step's numbers reach the host, and how they become a reading."""

import math

import pytest
import torch

from lion_lightning.guard.reading import FACTS, SUMS, UPDATE_SUMS, VERDICT, Reading, unpack
from lion_lightning.guard.step_monitor import AsyncReadback


def numbers(world_size=1, bad=(), **changes):
    """Numbers as a step posts them, in their order."""
    sums = {"loss": 128.0, "samples": 64, "squares": 9.0, "micro_squares": 16.0, "backward_loss": 2.5}
    sums |= {"flips": 20, "signs": 100, "projection": 3.0, "update_squares": 100, "grad_squares": 4.0, "dead": 5}
    verdict = {"norm": 3.0, "factor": 1.0, "skipped": 0.0, "norm_z": 0.5, "loss_z": -0.5}
    facts = {"step": 7, "batch_size": 64, "micro_batch_size": 16}
    assert (*sums, *verdict, *facts) == (*SUMS, *UPDATE_SUMS, *VERDICT, *FACTS)
    values = sums | verdict | facts | changes
    ranks = [float(rank in bad) for rank in range(world_size)]
    return [*(values[name] for name in (*SUMS, *UPDATE_SUMS)), *ranks, *(values[name] for name in (*VERDICT, *FACTS))]


def test_every_number_finds_its_name():
    assert unpack(numbers(), world_size=1) == Reading(
        loss=2.0,
        backward_loss=2.5,
        grad_norm=3.0,
        factor=1.0,
        skipped=False,
        norm_z=0.5,
        loss_z=-0.5,
        flip_rate=0.2,
        cosine=3.0 / 20.0,
        dead=0.05,
        bad_ranks=(),
        step=7,
        batch_size=64,
        micro_norm=4.0,
        micro_batch_size=16,
    )


def test_the_ranks_whose_loss_is_not_finite_are_named():
    reading = unpack(numbers(world_size=4, bad=(1, 3)), world_size=4)
    assert reading.bad_ranks == (1, 3)
    assert not reading.is_finite
    assert reading.step == 7
    assert unpack(numbers(world_size=4), world_size=4).is_finite


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_told_though_every_loss_was(norm):
    assert not unpack(numbers(norm=norm), 1).is_finite


def test_what_was_not_measured_is_nan():
    empty = dict.fromkeys(("samples", "signs", "update_squares", "grad_squares"), 0.0)
    reading = unpack(numbers(**empty, micro_squares=math.nan, backward_loss=math.nan), 1)
    unknown = (reading.loss, reading.flip_rate, reading.cosine, reading.dead, reading.micro_norm, reading.backward_loss)
    assert all(math.isnan(value) for value in unknown)


def test_the_queue_is_one_step_late():
    queue = AsyncReadback()
    assert queue.take() is None
    arrivals = []
    for step in range(4):
        queue.post(torch.tensor([float(step)]), (step * 10,))
        arrivals.append(queue.take())
    assert arrivals == [None, [0.0, 0], [1.0, 10], [2.0, 20]]
    assert queue.state_dict() == [[3.0, 30]]
    assert queue.take() is None
    assert queue.take(flush=True) == [3.0, 30]
    assert queue.take(flush=True) is None
    assert queue.state_dict() == []


def test_unread_vectors_survive_a_checkpoint():
    queue, again = AsyncReadback(), AsyncReadback()
    for step in range(2):
        queue.post(torch.tensor([0.1, float(step)]), (step,))
    again.load_state_dict(queue.state_dict())
    assert again.state_dict() == queue.state_dict()
    assert again.take() == queue.take() == [pytest.approx(0.1), 0.0, 0]
    assert again.take(flush=True) == queue.take(flush=True)
    again.post(torch.zeros(1))
    again.load_state_dict([])
    assert again.take(flush=True) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_posting_does_not_synchronise():
    queue = AsyncReadback()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3):
            queue.post(torch.full((4,), float(step), device="cuda"), (step,))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert queue.take() == [0.0] * 4 + [0]
