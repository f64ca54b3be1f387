"""Every fault hurts a run without the guard, and with it the run ends where the clean one does."""

from functools import cache

import pytest

from lion_lightning import Lion, LionGuard
from tests.faults.cases import CASES, FOR_EVER, HIT, Case, MakeOptimizer
from tests.faults.injected import NaNBatch, ScaledWeights
from tests.faults.task import STEPS, Outcome, train

SEED = 1
AT_MOST_LATE_STEPS = 15


@cache
def clean(optimizer: MakeOptimizer | None, guarded: bool) -> Outcome:
    return train(SEED, LionGuard() if guarded else None, optimizer=optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_fault_hurts_without_the_guard_and_not_with_it(case: Case):
    bare = train(SEED, None, case.inject(), optimizer=case.optimizer)
    assert bare.loss > case.hurts * clean(case.optimizer, guarded=False).loss
    guarded = train(SEED, LionGuard(**case.guard), case.inject(), optimizer=case.optimizer)
    assert guarded.stopped is None
    assert guarded.loss < case.ends_within * clean(case.optimizer, guarded=True).loss
    event, noticed = guarded.first(case.seen_as)
    assert HIT < event.step <= noticed <= HIT + AT_MOST_LATE_STEPS


def test_a_clean_run_has_no_events():
    assert [event.kind for event in clean(None, guarded=True).events] == ["warmup"]  # that there is none
    assert clean(None, guarded=True).loss < 1.03 * clean(None, guarded=False).loss


@pytest.mark.slow
def test_ruined_weights_are_rewound():
    """The loss returns with the older weights, so the rewind stands."""
    fault = ScaledWeights(HIT, 4.0)
    guarded = train(SEED, LionGuard(on_divergence="recover"), [fault])
    assert guarded.stopped is None
    assert [event.kind for event in guarded.events if event.kind in ("divergence", "new_level")] == ["divergence"]
    assert guarded.loss < 1.06 * clean(None, guarded=True).loss
    assert train(SEED, None, [fault]).loss > 1.2 * clean(None, guarded=False).loss


def test_data_that_stay_wrong_are_a_new_level():
    """The older weights have the raised loss too: the rewind is undone, and the run is not stopped."""
    outcome = train(SEED, LionGuard(**FOR_EVER.guard), FOR_EVER.inject())
    assert outcome.stopped is None
    assert outcome.steps == STEPS
    events = [event for event in outcome.events if event.kind in ("divergence", "new_level")]
    assert [event.kind for event in events] == ["divergence", "new_level"]
    assert HIT + 20 <= events[0].step <= HIT + 25
    assert "the task has changed, not the weights" in events[1].message
    assert outcome.loss < 1.1 * train(SEED, None, FOR_EVER.inject()).loss


@pytest.mark.slow
def test_the_same_data_are_only_told_of_if_that_is_asked():
    outcome = train(SEED, LionGuard(on_divergence="warn"), FOR_EVER.inject())
    assert outcome.stopped is None
    assert outcome.steps == STEPS
    assert "divergence" in outcome.kinds()


@pytest.mark.slow
def test_all_good_steps_after_a_nan_are_taken():
    outcome = train(SEED, LionGuard(), [NaNBatch([HIT])], steps=HIT + 129)
    assert outcome.kinds() == ["warmup", "nonfinite"]


@pytest.mark.slow
def test_a_rate_30_times_too_high_is_told_before_and_while_it_trains():
    outcome = train(SEED, LionGuard(), optimizer=lambda params: Lion(params, lr=30 * 5e-4, weight_decay=0.1))
    (finding,) = (event for event in outcome.events if event.kind == "lr")
    assert finding.step == 0
    assert "lr=0.015 moves the matrices" in finding.message
    assert {"dead", "cosine"} & set(outcome.kinds())
    assert outcome.loss > 1.2 * clean(None, guarded=True).loss
