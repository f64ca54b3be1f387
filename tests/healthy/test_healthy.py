"""The guard leaves healthy trainings alone: a few kinds always, all of them in the slow test."""

from dataclasses import replace

import pytest

from lion_lightning import LionGuard
from tests.healthy.kind import OPTIMIZERS, Outcome, train
from tests.healthy.verdict import Row
from tests.healthy.zoo import KINDS

SPREADS = {
    ("rare positives", "lion"): 0.024,
    ("a task every fifth batch", "adamw"): 0.075,
    ("loss weight x10", "lion"): 0.89,
    ("loss scale x64", "lion"): 0.022,
    ("new classes appear", "adamw"): 0.011,
    ("sequence length curriculum", "adamw"): 0.028,
    ("contrastive with a queue", "adamw"): 0.012,
}
"""Kinds that run alone, with an optimizer: range of the metric over the seeds 1 to 3 without the guard."""
ALWAYS = (("rare positives", "lion"), ("loss scale x64", "lion"), ("new classes appear", "adamw"))
SEEDS = (1, 2, 3)


def outcome(metric: float, ended: str | None = None, unsaved: int = 0) -> Outcome:
    counts = {"skipped": 0, "clipped": 0, "rewinds": 0, "unsaved": unsaved, "unsaved_at_end": bool(unsaved)}
    return Outcome(metric, 100, **counts, ended=ended, events={}, messages=[], seconds=1.0)


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [pytest.param(*pair, id="-".join(pair), marks=[] if pair in ALWAYS else pytest.mark.slow) for pair in SPREADS],
)
def test_a_healthy_training_is_left_alone(kind: str, optimizer: str):
    """Without warm-up the two runs are the same, bit for bit, up to the first action of the guard."""
    bare, guarded = (train(KINDS[kind], optimizer, 1, guard) for guard in (None, LionGuard(warmup_steps=0)))
    assert guarded.ended is None
    assert guarded.skipped == guarded.rewinds == 0
    assert guarded.clipped <= 0.01 * guarded.steps
    assert guarded.unsaved <= 0.1 * guarded.steps
    row = Row(KINDS[kind], optimizer, [bare], [guarded])
    assert row.loss <= SPREADS[kind, optimizer]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["defaults", "recover"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_healthy_training_is_left_alone(kind: str, optimizer: str, mode: str):
    """Without warm-up a guard that takes no action changes no bit; so the narrow limit of `recover` can hold."""
    options = {"on_divergence": "recover", "warmup_steps": 0} if mode == "recover" else {}
    bare = [train(KINDS[kind], optimizer, seed, None) for seed in SEEDS]
    guarded = [train(KINDS[kind], optimizer, seed, LionGuard(**options)) for seed in SEEDS]
    row = Row(KINDS[kind], optimizer, bare, guarded, recovers=mode == "recover")
    assert row.ended == 0
    assert not row.is_harmed
    assert sum(one.skipped for one in guarded) == 0


def test_kinds_have_names_of_their_own_and_are_many():
    assert len(KINDS) >= 28
    assert len({kind.make_module for kind in KINDS.values()}) >= 28


def test_a_run_is_a_function_of_its_seed():
    kind = replace(KINDS["VAE with a KL ramp"], steps=30)
    first, again, other = (train(kind, "lion", seed, None).metric for seed in (1, 1, 2))
    assert first == again != other


def test_verdicts():
    lower, higher = KINDS["loss scale x64"], KINDS["rare positives"]
    seeds = [outcome(1.0), outcome(1.2), outcome(1.1)]
    worse = [outcome(1.25), outcome(1.25), outcome(1.25)]
    assert Row(lower, "lion", seeds, seeds).verdict == "identical"
    assert Row(lower, "lion", seeds, worse).verdict == "no harm"
    assert Row(lower, "lion", seeds, worse, recovers=True).verdict == "harmed"
    assert Row(higher, "lion", seeds, worse, recovers=True).verdict == "no harm"
    assert Row(lower, "lion", seeds, [outcome(1.4)] * 3).verdict == "harmed"
    assert Row(lower, "lion", seeds, [outcome(float("nan"))] * 3).verdict == "harmed"
    assert Row(lower, "lion", seeds, [*seeds[:2], outcome(1.1, ended="stopped")]).verdict == "harmed"
    assert Row(lower, "lion", seeds, [*seeds[:2], outcome(1.1, unsaved=1)]).verdict == "harmed"
