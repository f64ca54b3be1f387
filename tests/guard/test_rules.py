"""Each rule sees what it is for, is silent on healthy series, and goes on from its state as if nothing had been."""

import math
import random
from dataclasses import replace

import pytest

from lion_lightning.guard.reading import Reading
from lion_lightning.guard.recovery import EscalationPolicy, Remedy
from lion_lightning.guard.rules import Average, Divergence, RuleSet, StuckMomentum, Thresholds, WarningAverages
from tests.guard.made_readings import healthy, troubled

LIMITS = Thresholds()


def kinds(monitors, reading):
    return [symptom.kind for symptom in monitors.observe(reading)]


def fed_poison(steps=40, rate=0.2):
    rule = StuckMomentum(LIMITS)
    assert not any(rule.observe(rate) for _ in range(steps))
    return rule


def test_a_frozen_sign_is_told_at_the_fifth_step_and_once():
    rule = fed_poison()
    assert [rule.observe(0.2 * 0.25 * 0.99) for _ in range(9)] == [False] * 4 + [True] + [False] * 4


def test_a_flip_rate_of_a_quarter_of_the_median_is_still_fine():
    rule = fed_poison()
    assert not any(rule.observe(0.2 * 0.25) for _ in range(20))


def test_one_flip_in_between_starts_the_count_again():
    rule = fed_poison()
    assert not any(rule.observe(rate) for rate in [0.01] * 4 + [0.2] + [0.01] * 4)


def test_frozen_steps_do_not_become_the_normal_rate():
    rule = fed_poison(steps=200)
    for _ in range(300):
        rule.observe(0.01)
    assert set(rule.rates) == {0.2}


def test_poison_needs_32_rates_to_compare_with():
    assert not any(fed_poison(steps=31).observe(rate) for rate in [0.01] * 20)


def test_a_flip_rate_that_was_not_measured_changes_nothing():
    rule = fed_poison()
    for _ in range(4):
        rule.observe(0.01)
    before = rule.state_dict()
    assert not rule.observe(math.nan)
    assert rule.state_dict() == before
    assert rule.observe(0.01)


def fed_divergence(seed=1, steps=300, noise=0.05):
    rule, dice = Divergence(LIMITS), random.Random(seed)
    assert not any(rule.observe(2.0 + dice.gauss(0, noise)) for _ in range(steps))
    return rule, dice


def test_a_loss_that_stays_up_is_told_after_twenty_high_steps_and_once():
    rule, dice = fed_divergence()
    told = [rule.observe(3.0 + dice.gauss(0, 0.05)) for _ in range(60)]
    assert sum(told) == 1
    # The fast average, with a half-life of 10, needs a few steps to leave the band of 4 sigma or 10 %.
    assert 20 <= told.index(True) + 1 <= 27


def test_a_few_bad_batches_are_no_divergence():
    rule, dice = fed_divergence()
    assert not any(rule.observe(loss + dice.gauss(0, 0.05)) for loss in [4.0] * 3 + [2.0] * 100)


def test_a_rise_within_a_tenth_of_the_best_is_no_divergence():
    rule, dice = fed_divergence(noise=0.001)
    assert not any(rule.observe(2.15 + dice.gauss(0, 0.001)) for _ in range(100))
    assert any(rule.observe(2.4) for _ in range(60))


def test_a_noisy_loss_gets_a_wide_band():
    rule, dice = fed_divergence(noise=0.5)
    assert rule.limit == pytest.approx(rule.best + 4 * 0.5, rel=0.15)
    assert not any(rule.observe(2.5 + dice.gauss(0, 0.5)) for _ in range(100))


def test_the_noise_is_told_apart_from_the_way_down():
    rule, dice = Divergence(LIMITS), random.Random(3)
    for step in range(400):  # falls by 8 in all, with a noise of 0.1 a step
        rule.observe(10 - 0.02 * step + dice.gauss(0, 0.1))
    deviation = (rule.limit - rule.best) / 4
    assert deviation == pytest.approx(0.1, rel=0.3)


def test_a_loss_below_zero_may_diverge_too():
    rule = Divergence(LIMITS)
    dice = random.Random(4)
    assert not any(rule.observe(-5 + dice.gauss(0, 0.05)) for _ in range(300))
    assert any(rule.observe(-4.0) for _ in range(60))


def test_before_there_is_a_best_average_nothing_diverges():
    rule = Divergence(LIMITS)
    assert not any(rule.observe(float(step)) for step in range(99))
    assert rule.limit == math.inf


def test_losses_that_are_not_finite_say_nothing_about_divergence():
    rule, _ = fed_divergence()
    before = rule.state_dict()
    assert not any(rule.observe(loss) for loss in [math.nan, math.inf] * 30)
    assert rule.state_dict() == before


def test_the_shortest_half_life_is_not_too_short():
    rule = Divergence(Thresholds(slow_half_life=1))
    assert not any(rule.observe(2.0) for _ in range(5))


def test_an_average_starts_without_bias_and_halves_in_its_half_life():
    average = Average(10)
    assert average.add(7.0) == pytest.approx(7.0)
    for _ in range(500):
        average.add(0.0)
    average.add(1.0)
    top = average.value
    for _ in range(10):
        average.add(0.0)
    assert average.value == pytest.approx(top / 2, rel=1e-6)
    assert math.isnan(Average(3).value)


@pytest.mark.parametrize(
    ("name", "sick", "fine"),
    [("dead", 0.2, 0.05), ("unmoved", 0.6, 0.4), ("near_bound", 0.1, 0.01), ("cosine", 0.02, 0.1)],
)
def test_a_gauge_beyond_its_limit_warns_once_after_a_window_of_values(name, sick, fine):
    averages = WarningAverages(LIMITS)
    assert not any(averages.observe(name, fine) for _ in range(300))
    averages = WarningAverages(LIMITS)
    told = [averages.observe(name, sick) for _ in range(300)]
    assert [step for step, symptom in enumerate(told, 1) if symptom] == [LIMITS.window]
    symptom = told[LIMITS.window - 1]
    assert symptom.kind == name
    assert f"{sick:.0%}" in symptom.message or f"{sick:.3f}" in symptom.message


def test_a_gauge_without_values_says_nothing():
    averages = WarningAverages(LIMITS)
    assert not any(averages.observe("cosine", math.nan) for _ in range(300))
    assert math.isnan(averages.cosine.value)


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_seen_in_a_healthy_run(seed):
    monitors = RuleSet(LIMITS)
    assert [kind for reading in healthy(seed, 1500) for kind in kinds(monitors, reading)] == []
    assert monitors.suspicion() == 0


def test_what_the_gate_did_is_put_on_record():
    monitors, reading = RuleSet(LIMITS), next(healthy(1, 1))
    assert kinds(monitors, replace(reading, factor=3.0)) == ["outlier"]
    assert kinds(monitors, replace(reading, skipped=True, loss_z=20.0)) == ["bad_loss"]
    (symptom,) = monitors.observe(replace(reading, skipped=True, grad_norm=math.nan, bad_ranks=(2, 5)))
    assert symptom.kind == "nonfinite"
    assert "rank 2, 5" in symptom.message
    assert (monitors.clipped, monitors.skipped, monitors.nonfinite_in_a_row) == (1, 2, 1)
    assert kinds(monitors, reading) == []
    assert monitors.nonfinite_in_a_row == 0


def test_a_run_is_suspicious_while_a_rule_is_on_its_way_to_a_verdict():
    monitors = RuleSet(LIMITS)
    for reading in healthy(1, 400):
        monitors.observe(reading)
    assert monitors.suspicion() == 0
    monitors.observe(Reading(flip_rate=0.001, loss=1.1, grad_norm=1.0))
    assert monitors.suspicion() == 0, "without an outlier a low flip rate is only noted"
    monitors.observe(Reading(flip_rate=0.001, loss=1.1, grad_norm=1.0, norm_z=20.0))
    assert 0 < monitors.suspicion() < 1
    assert monitors.suspicion(ignored=("poison",)) == 0
    for _ in range(8):
        monitors.observe(Reading(flip_rate=0.2, loss=3.0, grad_norm=1.0))
    assert 0 < monitors.suspicion() < 1
    assert monitors.suspicion(ignored=("divergence",)) == 0


def test_a_frozen_sign_is_attributed_to_an_outlier_only_if_one_was_seen():
    for norm_z, kind in ((20.0, "poison"), (1.0, "low_flip_rate")):
        rules, seen = RuleSet(LIMITS), []
        for number, reading in enumerate(healthy(6, 400)):
            frozen = {"flip_rate": 0.001} if number > 300 else {}
            frozen |= {"norm_z": norm_z} if number == 300 else {}
            seen += kinds(rules, replace(reading, **frozen))
        assert seen == [kind]


def test_bad_losses_are_counted_and_reported_once():
    rules, seen = RuleSet(LIMITS), []
    for number, reading in enumerate(healthy(6, 400)):
        seen += kinds(rules, replace(reading, loss_z=20.0) if number % 10 == 0 else reading)
    assert seen == ["bad_losses"]
    assert rules.bad_losses == 40


def test_a_loss_that_is_not_finite_with_a_finite_gradient_is_not_said_to_be_skipped():
    (symptom,) = RuleSet(LIMITS).observe(replace(next(healthy(1, 1)), bad_ranks=(0,)))
    assert symptom.kind == "nonfinite_loss"
    assert "the step was taken" in symptom.message


@pytest.mark.parametrize("seed", range(4))
def test_rules_restored_in_the_middle_decide_the_same(seed):
    dice, readings = random.Random(seed), list(troubled(seed, 900))
    saved_at = set(dice.sample(range(900), 12))
    monitors, again, seen = RuleSet(LIMITS), RuleSet(LIMITS), []
    for number, reading in enumerate(readings):
        if number in saved_at:
            state, again = again.state_dict(), RuleSet(LIMITS)
            again.load_state_dict(state)
        expected = monitors.observe(reading)
        assert again.observe(reading) == expected
        assert again.suspicion() == monitors.suspicion()
        seen += expected
    assert len({symptom.kind for symptom in seen}) >= 5, "the series has enough trouble to be worth it"


@pytest.mark.parametrize("value", [0, -1.0, math.nan])
def test_a_threshold_that_makes_no_sense_is_refused(value):
    with pytest.raises(ValueError, match=r"thresholds.outlier_z must be above 0, got"):
        Thresholds(outlier_z=value)


@pytest.mark.parametrize(
    ("level", "changes", "kind"),
    [
        (2.0, {"norm_z": 1.0}, "raised_loss"),
        (2.0, {"norm_z": -4.0}, "divergence"),
        (2.0, {"norm_z": 4.0}, "divergence"),  # the gradients have changed, too
        (2.0, {"norm_z": math.nan}, "divergence"),  # or are not known
        (2.0, {"skipped": True}, "divergence"),
        (9.0, {"norm_z": 1.0}, "divergence"),  # above the loss of the start
    ],
)
def test_a_loss_that_rises_alone_is_a_new_level(level, changes, kind):
    rules = RuleSet(Thresholds())
    readings = list(healthy(1, 300))
    seen = [symptom.kind for reading in readings for symptom in rules.observe(reading)]
    assert "divergence" not in seen
    for number in range(60):
        reading = replace(readings[-1], step=301 + number, loss=level, backward_loss=level, **changes)
        seen += [symptom.kind for symptom in rules.observe(reading)]
    assert [found for found in seen if found in ("divergence", "raised_loss")] == [kind]
    policy = EscalationPolicy(Thresholds(), "recover")
    assert (policy.remedy(kind, 320) is Remedy.NEW_LEVEL) == (kind == "raised_loss")


def test_one_huge_loss_is_no_divergence():
    divergence = Divergence(Thresholds())
    losses = [2.0 + 0.1 * math.sin(step) for step in range(300)]
    assert not any(divergence.observe(loss) for loss in [*losses, 14.0, *losses])
    assert any(divergence.observe(14.0) for _ in range(25)), "but many are"


def test_a_limit_of_another_type_is_named():
    with pytest.raises(ValueError, match=r"thresholds.window must be a whole number of at least 1, got '8'"):
        Thresholds(window="8")  # type: ignore[arg-type]


def loss_symptoms(rules, readings):
    symptoms = [symptom for reading in readings for symptom in rules.observe(reading)]
    return [symptom for symptom in symptoms if symptom.kind in ("divergence", "raised_loss")]


def risen(seed, rate):
    """A healthy run of 300 steps at a rate of 1e-4, then 30 at `rate` with twice the loss and larger gradients."""
    readings = [replace(reading, rate=1e-4) for reading in healthy(seed, 330)]
    return readings[:300] + [
        replace(each, loss=2.4, backward_loss=2.4, norm_z=4.0, rate=rate) for each in readings[300:]
    ]


@pytest.mark.parametrize("seed", range(3))
def test_a_loss_that_rises_with_a_rate_that_rose_at_once_is_no_divergence(seed):
    (symptom,) = loss_symptoms(RuleSet(LIMITS), risen(seed, rate=1e-4))
    assert symptom.kind == "divergence"
    (symptom,) = loss_symptoms(RuleSet(LIMITS), risen(seed, rate=1e-3))
    assert symptom.kind == "raised_loss"
    assert "after the learning rate had risen at once" in symptom.message
    first, second = RuleSet(LIMITS), RuleSet(LIMITS)
    assert loss_symptoms(first, risen(seed, rate=1e-3)[:305]) == []
    second.load_state_dict(first.state_dict())
    (symptom,) = loss_symptoms(second, risen(seed, rate=1e-3)[305:])
    assert symptom.kind == "raised_loss"


def test_the_message_has_the_average_that_was_compared():
    rules = RuleSet(LIMITS)
    (symptom,) = loss_symptoms(rules, risen(1, rate=1e-4))
    words = symptom.message.split()
    assert float(words[words.index("to") + 1]) > float(words[words.index("above") + 1])


def test_gradients_that_are_not_finite_are_no_divergence_of_the_loss():
    rules = RuleSet(LIMITS)
    readings = list(healthy(1, 330))
    sick = [replace(each, grad_norm=math.nan, norm_z=math.nan, skipped=True) for each in readings[300:]]
    assert loss_symptoms(rules, readings[:300] + sick) == []
    assert rules.nonfinite_in_a_row == 30
    assert not rules.is_lost, "300 steps were learned from"
    state = rules.state_dict()
    older = {name: value for name, value in state.items() if not name.startswith("rate")}
    rules.load_state_dict(older)
    assert math.isnan(rules.rate)
