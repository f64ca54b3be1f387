"""The gate against an oracle: robust z scores from `statistics.median` over Python's own floats."""

import math
import random
import statistics
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import astuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lion_lightning.guard.gate import Gate, History, Verdict
from lion_lightning.guard.rules import Thresholds

ARMED = 32


class Oracle:
    """The rule in plain Python: median and MAD of the last 128 finite values, isolated outliers."""

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self.log_norms: list[float] = []
        self.losses: list[float] = []
        self.outliers: dict[str, list[tuple[int, float]]] = {"norm": [], "loss": []}
        self.step = 0

    def spread(self, value: float, history: list[float], least_share: float, least: float) -> tuple[float, float]:
        """Robust z and median; remembered from the 8th value on, acted on from the 32nd."""
        if len(history) < 8:
            return math.nan, math.nan
        recent = history[-self.thresholds.window :]
        center = statistics.median_low(recent)
        deviation = 1.4826 * statistics.median_low([abs(other - center) for other in recent])
        z = (value - center) / max(deviation, least, least_share * abs(center))
        return z, center

    def isolated(self, kind: str, value: float, similar: float) -> bool:
        recent = [old for step, old in self.outliers[kind][-16:] if self.step - step <= self.thresholds.horizon]
        self.outliers[kind].append((self.step, value))
        return not any(old >= similar for old in recent)

    def judge(self, norm: float, loss: float) -> tuple[float, bool, float, float]:
        limits, finite = self.thresholds, math.isfinite(norm)
        log_norm = math.log(norm) if finite and norm > 0 else math.nan
        norm_z, center = self.spread(log_norm, self.log_norms, 0.0, 1e-3)
        loss_z, loss_center = self.spread(loss, self.losses, 1e-2, 0.0)
        above, factor, bad_loss = log_norm - center - math.log(limits.outlier_ratio), 1.0, False
        armed = [len(history) >= limits.armed_after for history in (self.log_norms, self.losses)]
        if norm_z > limits.outlier_z and above > 0 and self.isolated("norm", log_norm, log_norm - math.log(3)):
            factor = math.exp(above) if armed[0] else 1.0
        if finite and loss_z > limits.loss_z:
            bad_loss = self.isolated("loss", loss, loss_center + (loss - loss_center) / 3) and armed[1]
        norm_z, loss_z = (z if is_armed else math.nan for z, is_armed in zip((norm_z, loss_z), armed, strict=True))
        if finite:
            self.log_norms += [log_norm] if norm > 0 else []
            self.losses += [loss] if math.isfinite(loss) else []
        self.step += 1
        return factor, not finite or bad_loss, norm_z, loss_z


def readings(seed: int, steps: int, faults: bool = True) -> Iterator[tuple[float, float]]:
    """Norms and losses of a run that goes well but for outliers, bad batches and steps that are not finite."""
    dice = random.Random(seed)
    for step in range(steps):
        norm, loss = math.exp(dice.gauss(0.3, 0.25)), 2 + 2 * math.exp(-step / 200) + dice.gauss(0, 0.1)
        fault = dice.random() if faults else 1.0
        if fault < 0.03:
            norm *= 10 ** dice.uniform(0.3, 5)
        elif fault < 0.05:
            norm, loss = math.nan, math.nan
        elif fault < 0.06:
            norm = math.inf
        elif fault < 0.08:
            loss += dice.uniform(0.5, 9)
        elif fault < 0.09:
            norm = 0.0
        yield norm, loss


def judge(gate: Gate, norm: float, loss: float) -> Verdict:
    return gate.judge(torch.tensor(norm), torch.tensor(loss))


def numbers(verdict: Verdict) -> list[float]:
    return [float(value) for value in astuple(verdict)]


def fed(steps: int = 60, spread: float = 0.1, thresholds: Thresholds | None = None) -> Gate:
    """A gate that has seen norms around 1 and losses around 2."""
    gate, dice = Gate(thresholds or Thresholds(), skips_bad_losses=True), random.Random(5)
    for _ in range(steps):
        judge(gate, math.exp(dice.gauss(0, spread)), dice.gauss(2.0, spread))
    return gate


@pytest.mark.parametrize("thresholds", [Thresholds(), Thresholds(window=40, outlier_z=5, outlier_ratio=2, loss_z=6)])
def test_every_verdict_is_the_oracles(thresholds):
    clipped = skipped = 0
    for seed in (1, 2, 3):
        gate, oracle = Gate(thresholds, skips_bad_losses=True), Oracle(thresholds)
        for norm, loss in readings(seed=seed, steps=500):
            factor, skip, norm_z, loss_z = oracle.judge(norm, loss)
            verdict = judge(gate, norm, loss)
            assert bool(verdict.skip) == skip
            assert float(verdict.factor) == pytest.approx(factor, rel=2e-6)
            if math.isfinite(norm) and norm > 0:
                assert float(verdict.norm_z) == pytest.approx(norm_z, rel=1e-3, abs=1e-3, nan_ok=True)
            assert float(verdict.loss_z) == pytest.approx(loss_z, rel=1e-3, abs=1e-3, nan_ok=True)
            clipped, skipped = clipped + (factor > 1), skipped + skip
    assert clipped > 3, "the sequence has outliers"
    assert skipped > 10, "the sequence has steps to skip"


def test_it_is_armed_by_the_32nd_accepted_step_and_not_before():
    for seen, expected in ((ARMED - 1, 1.0), (ARMED, pytest.approx(1e5 / 3, rel=0.2))):
        gate = fed(seen)
        assert float(judge(gate, 1e5, 2.0).factor) == expected


def test_steps_that_are_not_finite_are_skipped_and_never_remembered():
    gate = fed(20)
    for norm, loss in ((math.nan, math.nan), (math.inf, 2.0), (math.nan, 2.0), (math.inf, math.inf)):
        before = gate.state_dict()
        verdict = judge(gate, norm, loss)
        assert float(verdict.skip) == 1
        assert float(verdict.factor) == 1
        assert gate.state_dict()["norms"] == before["norms"]
        assert gate.state_dict()["losses"] == before["losses"]


def test_a_run_that_starts_with_a_nan_is_judged_like_one_that_does_not():
    gate, other = Gate(Thresholds()), Gate(Thresholds())
    for _ in range(40):
        judge(gate, math.nan, math.nan)
    for norm, loss in readings(seed=2, steps=100, faults=False):
        assert numbers(judge(gate, norm, loss)) == pytest.approx(numbers(judge(other, norm, loss)), nan_ok=True)


def test_an_outlier_is_clipped_to_exactly_three_times_the_median_norm():
    gate = Gate(Thresholds())
    norms = [1.0 + 0.01 * step for step in range(41)]
    for norm in norms:
        judge(gate, norm, math.nan)
    for outlier in (50.0, 1e3, 1e5, 1e30):
        clipped = outlier / float(judge(deepcopy(gate), outlier, math.nan).factor)
        assert clipped == pytest.approx(3 * statistics.median(norms), rel=1e-5)


def test_a_large_z_alone_is_no_outlier_and_neither_is_a_large_ratio_alone():
    steady = fed(60, spread=1e-4)  # a norm of 2.9 is thousands of deviations away
    verdict = judge(steady, 2.9, 2.0)
    assert float(verdict.norm_z) > 100
    assert float(verdict.factor) == 1
    loose = fed(60, spread=1.0)
    verdict = judge(loose, 20.0, 2.0)
    assert float(verdict.norm_z) < 8
    assert float(verdict.factor) == 1


def test_what_recurs_from_the_start_on_is_never_clipped():
    """A penalty of every 16th step comes twice before the gate is armed."""
    gate, dice = Gate(Thresholds(), skips_bad_losses=True), random.Random(5)
    for step in range(1, 200):
        size = 50.0 if step % 16 == 0 else 1.0
        verdict = gate.judge(torch.tensor(size * math.exp(dice.gauss(0, 0.1))), torch.tensor(size + dice.gauss(0, 0.1)))
        assert float(verdict.factor) == 1
        assert not verdict.skip


def test_an_isolated_outlier_is_clipped_and_what_recurs_is_taken_until_a_thousand_steps_have_passed():
    gate, clipped = fed(128), []
    for step in range(4000):
        outlier = step % 20 == 0 and not 600 < step < 2000
        if float(judge(gate, 100.0 if outlier else 1.0 + 0.01 * (step % 7), 2.0).factor) > 1:
            clipped.append(step)
    assert clipped == [0, 2000], "after a thousand steps without one they are isolated again"


def test_a_much_larger_outlier_is_of_another_kind():
    gate = fed(128)
    for _ in range(10):
        judge(gate, 100.0, 2.0)
    assert float(judge(gate, 100.0, 2.0).factor) == 1
    assert float(judge(gate, 1e5, 2.0).factor) > 1


def test_gradients_that_are_larger_for_good_become_normal():
    gate = fed(128)
    for step in range(200):
        verdict = judge(gate, 10.0 + 0.1 * (step % 7), 2.0)
    assert abs(float(verdict.norm_z)) < 3


def test_a_rare_kind_of_batch_is_skipped_once_if_that_is_asked_and_never_by_default():
    for skips, expected in ((True, 1), (False, 0)):
        gate = Gate(Thresholds(), skips_bad_losses=skips)
        skipped = 0.0
        for step in range(900):
            rare = step > 100 and step % 7 == 0
            skipped += float(judge(gate, 1.0, 6.0 if rare else 2.0 + 0.01 * (step % 5)).skip)
        assert skipped == expected


def test_a_loss_that_falls_far_is_welcome():
    assert float(judge(fed(), 1.0, 0.1).skip) == 0


def test_losses_without_variation_are_held_to_a_tenth_of_their_size():
    gate = Gate(Thresholds(), skips_bad_losses=True)
    for _ in range(40):
        judge(gate, 1.0, 2.0)
    assert float(judge(gate, 1.0, 2.19).skip) == 0
    assert float(judge(gate, 1.0, 2.21).skip) == 1


def test_an_unknown_loss_leaves_the_norms_to_be_judged():
    gate = Gate(Thresholds())
    for _ in range(40):
        judge(gate, 1.0, math.nan)
    assert float(judge(gate, 1e3, math.nan).factor) > 1


def test_a_gradient_of_zeros_is_taken_and_says_nothing_about_size():
    gate = fed()
    before = gate.state_dict()["norms"]
    verdict = judge(gate, 0.0, 2.0)
    assert (float(verdict.factor), float(verdict.skip)) == (1, 0)
    assert gate.state_dict()["norms"] == before


def test_the_ring_keeps_the_latest_values():
    history = History(2, 8)
    for value in range(21):
        history.add(torch.tensor([float(value), -value]), torch.tensor([value % 4 != 3, value % 3 != 2]))
    kept = [value for value in range(21) if value % 4 != 3][-8:], [-value for value in range(21) if value % 3 != 2][-8:]
    for row, expected in enumerate(kept):
        assert sorted(history.state_dict()[row]["values"]) == sorted(expected)
        assert float(history.spread()[0][row]) == statistics.median_low(expected)
    assert history.count.tolist() == [16, 14]


@pytest.mark.parametrize("at", [0, 7, 33, 170])
def test_a_restored_gate_gives_the_same_verdicts_bit_for_bit(at):
    sequence = list(readings(seed=3, steps=220))
    gate, again = Gate(Thresholds()), Gate(Thresholds())
    for norm, loss in sequence[:at]:
        judge(gate, norm, loss)
    again.load_state_dict(gate.state_dict())
    for norm, loss in sequence[at:]:
        left, right = numbers(judge(gate, norm, loss)), numbers(judge(again, norm, loss))
        assert torch.tensor(left).view(torch.int32).tolist() == torch.tensor(right).view(torch.int32).tolist()


def test_another_window_than_the_checkpoints_is_refused():
    with pytest.raises(ValueError, match=r"thresholds.window=64 does not fit the checkpoint's 128"):
        Gate(Thresholds(window=64)).load_state_dict(fed().state_dict())


class CountsReads(TorchDispatchMode):
    """How often a tensor's value went to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_on_the_host():
    gate, norm, loss = Gate(Thresholds()), torch.tensor(1e4), torch.tensor(2.0)
    with CountsReads() as reads:
        verdict = gate.judge(norm, loss)
        assert reads.count == 0
        float(verdict.factor)
    assert reads.count == 1, "the count would have seen it"


def test_it_judges_on_a_device_whose_values_nobody_can_read():
    gate, unreadable = Gate(Thresholds()), torch.ones((), device="meta")
    for _ in range(3):
        verdict = gate.judge(unreadable, unreadable)
        assert {value.device.type for value in astuple(verdict)} == {"meta"}
    with pytest.raises(RuntimeError, match="meta"):
        float(verdict.factor)


def test_a_default_device_changes_nothing() -> None:
    """A tensor made on the default device, which is `meta` here, would have no numbers."""
    draw = torch.Generator("cpu").manual_seed(0)
    norms = torch.randn(80, generator=draw, device="cpu").exp()
    norms[60] = 1e4

    def judged(device: str) -> list[float]:
        with torch.device(device):
            gate = Gate(Thresholds())
            factors = [float(gate.judge(norm, norm.log()).factor) for norm in norms[:50]]
            again = Gate(Thresholds())
            again.load_state_dict(gate.state_dict())
            return factors + [float(again.judge(norm, norm.log()).factor) for norm in norms[50:]]

    there = judged("meta")
    assert there == judged("cpu")
    assert max(there) > 1, "nothing was clipped"


def test_losses_that_are_mostly_zero_have_no_outliers() -> None:
    """A margin that is satisfied, or a rare reward: the few other steps are those that teach something."""
    gate = Gate(Thresholds(), skips_bad_losses=True)
    for step in range(200):
        verdict = gate.judge(torch.tensor(1.0 + step % 3 / 10), torch.tensor(0.05 if step % 60 == 59 else 0.0))
        assert not verdict.skip
        assert not verdict.loss_z > 0
