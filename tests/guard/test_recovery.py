"""The escalation policy: what each symptom gets, when it escalates and starts again, and what each mode changes."""

import random

import pytest

from lion_lightning.guard.recovery import EscalationPolicy, Remedy, Trial
from lion_lightning.guard.rules import RuleSet, Thresholds
from lion_lightning.guard.snapshots import Snapshot
from tests.guard.made_readings import troubled

LIMITS = Thresholds()
MODES = ("recover", "stop", "warn")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("outlier", Remedy.CLIP),
        ("bad_loss", Remedy.SKIP),
        ("nonfinite", Remedy.SKIP),
        ("poison", Remedy.ZERO_MOMENTUM),
        ("low_flip_rate", Remedy.REBASELINE),
        ("dead", Remedy.NOTE),
        ("unmoved", Remedy.NOTE),
        ("near_bound", Remedy.NOTE),
        ("cosine", Remedy.NOTE),
    ],
)
def test_these_symptoms_get_the_same_remedy_in_every_mode(mode, kind, remedy):
    assert EscalationPolicy(LIMITS, mode).remedy(kind, 10) is remedy


def test_divergences_climb_the_ladder_to_the_end_and_stay_there():
    policy = EscalationPolicy(LIMITS, "recover")
    assert [policy.remedy("divergence", step) for step in (100, 300, 500, 700)] == [
        Remedy.REWIND,
        Remedy.REWIND_AT_HALF_RATE,
        Remedy.STOP,
        Remedy.STOP,
    ]


@pytest.mark.parametrize(("pause", "expected"), [(1000, Remedy.REWIND_AT_HALF_RATE), (1001, Remedy.REWIND)])
def test_it_comes_down_after_a_thousand_steps_without_a_divergence(pause, expected):
    policy = EscalationPolicy(LIMITS, "recover")
    policy.remedy("divergence", 100)
    assert policy.remedy("divergence", 100 + pause) is expected


def test_milder_symptoms_do_not_climb():
    policy = EscalationPolicy(LIMITS, "recover")
    for step in range(10):
        policy.remedy("outlier", step)
        policy.remedy("nonfinite", step)
        policy.remedy("poison", step)
    assert policy.level == 0


@pytest.mark.parametrize(("mode", "remedy"), [("stop", Remedy.STOP), ("warn", Remedy.NEW_LEVEL)])
def test_the_other_modes_do_not_rewind(mode, remedy):
    policy = EscalationPolicy(LIMITS, mode)
    assert {policy.remedy("divergence", step) for step in (100, 200)} == {remedy}
    assert policy.level == 0


def test_sick_weights_are_repaired_and_rewound_if_they_are_sick_again_soon():
    policy = EscalationPolicy(LIMITS, "recover")
    assert policy.remedy("sick_weights", 50) is Remedy.REPAIR
    assert policy.remedy("sick_weights", 150) is Remedy.REWIND
    assert EscalationPolicy(LIMITS, "recover").remedy("sick_weights", 50) is Remedy.REPAIR


def test_sick_weights_long_after_a_repair_are_repaired_again():
    policy = EscalationPolicy(LIMITS, "recover")
    policy.remedy("sick_weights", 50)
    assert policy.remedy("sick_weights", 151) is Remedy.REPAIR


@pytest.mark.parametrize("kind", ["sick_weights", "nonfinite_limit"])
@pytest.mark.parametrize(("mode", "remedy"), [("stop", Remedy.STOP), ("warn", Remedy.NOTE)])
def test_a_run_that_is_lost_ends_only_where_that_is_asked(mode, remedy, kind):
    assert EscalationPolicy(LIMITS, mode).remedy(kind, 50) is remedy


def test_a_momentum_that_looks_poisoned_right_after_it_was_zeroed_was_not():
    policy = EscalationPolicy(LIMITS, "recover")
    assert policy.remedy("poison", 100) is Remedy.ZERO_MOMENTUM
    assert policy.remedy("poison", 200) is Remedy.REBASELINE
    assert policy.remedy("poison", 301) is Remedy.ZERO_MOMENTUM


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(3))
def test_decisions_are_a_function_of_readings_and_state_alone(seed, mode):
    """One copy goes through, the other is saved, thrown away and restored at random steps."""
    dice = random.Random(seed)
    rules, copies = (RuleSet(LIMITS), EscalationPolicy(LIMITS, mode)), (RuleSet(LIMITS), EscalationPolicy(LIMITS, mode))
    decisions: list[Remedy] = []
    for reading in troubled(seed, 900):
        if dice.random() < 0.03:
            states = [copy.state_dict() for copy in copies]
            copies = (RuleSet(LIMITS), EscalationPolicy(LIMITS, mode))
            for copy, state in zip(copies, states, strict=True):
                copy.load_state_dict(state)
        seen, seen_again = rules[0].observe(reading), copies[0].observe(reading)
        assert seen_again == seen
        given = [rules[1].remedy(symptom.kind, reading.step) for symptom in seen]
        assert [copies[1].remedy(symptom.kind, reading.step) for symptom in seen_again] == given
        decisions += given
    assert len(set(decisions)) >= 4, "the series has enough trouble to be worth it"


@pytest.mark.parametrize(
    ("losses", "is_over"),
    [
        ([2.9], True),  # far above the middle of 1 and 3
        ([1.1], True),
        ([2.3], False),
        ([2.3, 2.2], False),
        ([2.3, 2.2, 2.4], True),
        ([2.3, 1.8, 2.4], False),
        ([2.3, 1.8] * 5, True),
    ],
)
def test_a_trial_ends_when_its_losses_decide(losses, is_over):
    newer = Snapshot(0, {}, [], [])
    trial = Trial(newer, [], 0, 0, returned=1.0, raised=3.0, deviation=0.2, losses=losses)
    assert trial.is_over(10) == is_over
    unknown = Trial(newer, [], 0, 0, returned=1.0, raised=3.0, losses=losses)
    assert unknown.is_over(10) == (is_over and len(losses) > 1)
