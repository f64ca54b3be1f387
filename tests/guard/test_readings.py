"""How a step's numbers get to the host, and what they mean there."""

import math

import pytest
import torch

from lion_lightning.guard.readings import FACTS, SUMS, VERDICT, Mailbox, Reading


def numbers(world_size=1, bad=(), **changes):
    """Numbers as a step posts them, in their order."""
    sums = {"loss": 128.0, "samples": 64, "squares": 9.0, "micro_squares": 16.0, "backward_loss": 2.5}
    sums |= {"flips": 20, "signs": 100, "projection": 3.0, "update_squares": 100, "grad_squares": 4.0, "dead": 5}
    verdict = {"norm": 3.0, "factor": 1.0, "skipped": 0.0, "norm_z": 0.5, "loss_z": -0.5}
    facts = {"step": 7, "batch_size": 64, "micro_batch_size": 16}
    assert (*sums, *verdict, *facts) == (*SUMS, *VERDICT, *FACTS)
    values = sums | verdict | facts | changes
    ranks = [float(rank in bad) for rank in range(world_size)]
    return [*(values[name] for name in SUMS), *ranks, *(values[name] for name in (*VERDICT, *FACTS))]


def test_every_number_finds_its_name():
    assert Reading.unpack(numbers(), world_size=1) == Reading(
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
    reading = Reading.unpack(numbers(world_size=4, bad=(1, 3)), world_size=4)
    assert reading.bad_ranks == (1, 3)
    assert not reading.is_finite
    assert reading.step == 7
    assert Reading.unpack(numbers(world_size=4), world_size=4).is_finite


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_told_though_every_loss_was(norm):
    assert not Reading.unpack(numbers(norm=norm), 1).is_finite


def test_what_was_not_measured_is_nan():
    empty = dict.fromkeys(("samples", "signs", "update_squares", "grad_squares"), 0.0)
    reading = Reading.unpack(numbers(**empty, micro_squares=math.nan, backward_loss=math.nan), 1)
    unknown = (reading.loss, reading.flip_rate, reading.cosine, reading.dead, reading.micro_norm, reading.backward_loss)
    assert all(math.isnan(value) for value in unknown)


def test_the_mailbox_is_one_step_late():
    box = Mailbox()
    assert box.take() is None
    arrivals = []
    for step in range(4):
        box.post(torch.tensor([float(step)]), (step * 10,))
        arrivals.append(box.take())
    assert arrivals == [None, [0.0, 0], [1.0, 10], [2.0, 20]]
    assert box.waiting() == [[3.0, 30]]
    assert box.take() is None
    assert box.take(flush=True) == [3.0, 30]
    assert box.take(flush=True) is None
    assert box.waiting() == []


def test_a_mailbox_should_be_read_when_it_is_full_or_an_urgent_vector_may_be_taken():
    box = Mailbox()
    for urgent, due in ((False, False), (True, False), (False, True)):
        box.post([0.0], urgent=urgent)
        assert box.should_be_read(3) == due
    box.take()
    assert box.should_be_read(3), "the urgent one is still there"
    box.take()
    assert not box.should_be_read(3)
    for due in (False, False, True):
        box.post([0.0])
        assert box.should_be_read(3) == due
    box.clear()
    assert not box.should_be_read(3)


def test_mail_on_its_way_survives_a_checkpoint():
    box, again = Mailbox(), Mailbox()
    for step in range(2):
        box.post(torch.tensor([0.1, float(step)]), (step,))
    again.load_state_dict(box.state_dict())
    assert again.waiting() == box.waiting()
    assert again.take() == box.take() == [pytest.approx(0.1), 0.0, 0]
    assert again.take(flush=True) == box.take(flush=True)
    again.post(torch.zeros(1))
    again.clear()
    assert again.take(flush=True) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nobody_waits_for_the_vector():
    box = Mailbox()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(3):
            box.post(torch.full((4,), float(step), device="cuda"), (step,))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert box.take() == [0.0] * 4 + [0]
