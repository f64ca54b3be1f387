"""One optimizer's step as the guard measures and gates it, without Lightning."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from lion_lightning import Lion
from lion_lightning.guard.lr_warmup import LinearWarmup
from lion_lightning.guard.recovery import Recovery, Remedy
from lion_lightning.guard.rules import Symptom, Thresholds
from lion_lightning.guard.snapshots import Snapshot
from lion_lightning.guard.step_monitor import AsyncReadback, Losses, StepMonitor

OPTIMIZERS = {
    "lion": partial(Lion, lr=1e-2),
    "adamw": partial(AdamW, lr=1e-2, foreach=True),
    "adamw fused": partial(AdamW, lr=1e-2, fused=True),
    "sgd": partial(SGD, lr=1e-2, momentum=0.9),
}
ARMED = 40


def made(name, **options):
    torch.manual_seed(1)
    params = [nn.Parameter(torch.randn(8, 40)), nn.Parameter(torch.randn(8))]
    optimizer = OPTIMIZERS[name](params)
    return params, optimizer, StepMonitor(optimizer, Thresholds(), LinearWarmup(0), **options)


def losses(value=2.0):
    seen = Losses()
    seen.before_backward(torch.tensor(value), comparable=True)
    seen.add(torch.tensor(value), 4)
    return seen


def step(params, optimizer, monitor, number, factor=1.0, clip_val=None, loss=2.0):
    """A step whose gradient has about the norm sqrt(328) * factor; clips afterwards as a Trainer does."""
    dice = torch.Generator().manual_seed(number)
    for param in params:
        param.grad = factor * torch.randn(param.shape, generator=dice)
    if monitor is not None:
        monitor.before_step(losses(loss), clip_val, (number + 1, 4, 4))
    if clip_val is not None and params[0].grad is not None:
        nn.utils.clip_grad_norm_(params, clip_val)
    taken = [None if param.grad is None else param.grad.clone() for param in params]
    optimizer.step()
    return taken


def norm_of(grads):
    return float(torch.cat([grad.flatten() for grad in grads]).double().norm())


def everything(params, optimizer):
    state = (value for param in params for value in optimizer.state[param].values())
    return [torch.as_tensor(value).clone() for value in (*(param.detach() for param in params), *state)]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(name, fault):
    params, optimizer, monitor = made(name)
    for number in range(3):
        step(params, optimizer, monitor, number)
    before = everything(params, optimizer)
    step(params, optimizer, monitor, 3, factor=fault)
    assert all(torch.equal(left, right) for left, right in zip(before, everything(params, optimizer), strict=True))
    step(params, optimizer, monitor, 4)
    after = everything(params, optimizer)
    assert not torch.equal(before[0], after[0]), "the next step is taken"
    assert all(tensor.isfinite().all() for tensor in after)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_the_guard_the_same_step_ruins_the_run(name):
    params, optimizer, monitor = made(name)
    monitor.remove()
    step(params, optimizer, None, 0)
    step(params, optimizer, None, 1, factor=math.nan)
    frozen = [param.detach().clone() for param in params]
    step(params, optimizer, None, 2)
    sick = any(not tensor.isfinite().all() for tensor in everything(params, optimizer))
    # Our Lion leaves elements alone whose gradient is not finite; all others are lost.
    assert sick != name.startswith("lion")
    assert frozen[0].isfinite().all() == name.startswith("lion")


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("clip_val", [None, 1.0, 40.0])
def test_an_outlier_counts_as_three_times_the_median_whoever_clips_afterwards(name, clip_val):
    """The state after an outlier is that of an unguarded optimizer whose gradient was clipped to 3x the median."""
    params, optimizer, monitor = made(name)
    twins, twin, unused = made(name)
    unused.remove()
    norms = []
    for number in range(ARMED):
        norms.append(norm_of(step(params, optimizer, monitor, number, factor=0.01, clip_val=clip_val)))
        step(twins, twin, None, number, factor=0.01, clip_val=clip_val)
    limit = 3 * sorted(norms)[(ARMED - 1) // 2]
    step(params, optimizer, monitor, ARMED, factor=1e4, clip_val=clip_val)
    step(twins, twin, None, ARMED, factor=1e4, clip_val=limit)
    for left, right in zip(everything(params, optimizer), everything(twins, twin), strict=True):
        assert torch.allclose(left, right, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bad_loss_is_skipped_if_that_is_asked(name):
    params, optimizer, monitor = made(name, skips_bad_losses=True)
    for number in range(ARMED):
        step(params, optimizer, monitor, number, loss=2.0 + 0.01 * (number % 7))
        monitor.read()
    before = everything(params, optimizer)
    step(params, optimizer, monitor, ARMED, loss=9.0)
    assert all(torch.equal(left, right) for left, right in zip(before, everything(params, optimizer), strict=True))
    monitor.read()
    reading = monitor.read(flush=True)
    assert reading.skipped
    assert reading.is_finite
    assert reading.loss_z > 10
    assert reading.backward_loss == 9.0
    assert (reading.step, reading.batch_size) == (ARMED + 1, 4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gate_that_may_not_act_changes_nothing_bit_for_bit(name):
    (params, optimizer, monitor), (twins, twin, unused) = made(name, acts=False), made(name)
    unused.remove()
    for number in range(ARMED + 4):
        factor = 1e5 if number == ARMED else 1.0
        step(params, optimizer, monitor, number, factor)
        step(twins, twin, None, number, factor)
    for left, right in zip(everything(params, optimizer), everything(twins, twin), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_healthy_step_is_taken_as_it_is_bit_for_bit(name):
    (params, optimizer, monitor), (twins, twin, unused) = made(name), made(name)
    unused.remove()
    for number in range(ARMED + 4):
        step(params, optimizer, monitor, number)
        step(twins, twin, None, number)
    for left, right in zip(everything(params, optimizer), everything(twins, twin), strict=True):
        assert torch.equal(left, right)


def test_a_norm_that_the_trainer_would_clip_is_judged_as_clipped_but_infinity_is_not_remembered():
    params, optimizer, monitor = made("lion")
    for number in range(4):
        step(params, optimizer, monitor, number, clip_val=5.0)
    before = monitor.gate.state_dict()
    assert sorted(before["norms"]["values"])[:4] == pytest.approx([math.log(5.0)] * 4)
    step(params, optimizer, monitor, 4, factor=math.inf, clip_val=5.0)
    assert monitor.gate.state_dict()["norms"] == before["norms"]
    assert monitor.read(flush=True) is not None


def test_the_verdict_is_gone_after_the_step_and_the_hooks_after_the_watch():
    params, optimizer, monitor = made("lion")
    step(params, optimizer, monitor, 0)
    assert (optimizer.grad_scale, optimizer.found_inf) == (None, None)
    monitor.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_under_a_grad_scaler_the_inputs_of_a_fused_optimizer_are_the_scalers():
    params, optimizer, monitor = made("adamw fused", scaled=True)
    optimizer.found_inf = marker = torch.zeros(())
    for param in params:
        param.grad = torch.ones_like(param)
    monitor.before_step(losses(), None, (1, 4, 4))
    assert optimizer.found_inf is marker


def test_zeroing_the_momentum_leaves_the_second_moment_and_the_weights():
    params, optimizer, monitor = made("adamw")
    step(params, optimizer, monitor, 0)
    weights, second = params[0].detach().clone(), optimizer.state[params[0]]["exp_avg_sq"].clone()
    monitor.zero_momentum()
    assert not optimizer.state[params[0]]["exp_avg"].any()
    assert torch.equal(optimizer.state[params[0]]["exp_avg_sq"], second)
    assert torch.equal(params[0], weights)


def test_zeroing_an_int8_momentum_zeroes_its_scales():
    param = nn.Parameter(torch.randn(80, 80))
    optimizer = Lion([param], lr=1e-3, momentum_dtype="int8")
    monitor = StepMonitor(optimizer, Thresholds(), LinearWarmup(0))
    step([param], optimizer, monitor, 0)
    assert optimizer.state[param]["exp_avg_scale"].any()
    monitor.zero_momentum()
    assert not optimizer.state[param]["exp_avg_scale"].any()
    assert not optimizer.state[param]["exp_avg"].any()


@pytest.mark.parametrize("place", ["weight", "exp_avg"])
def test_sick_weights_and_sick_momentum_are_found(place):
    params, optimizer, monitor = made("lion")
    step(params, optimizer, monitor, 0)
    assert bool(monitor.is_finite())
    with torch.no_grad():
        tensor = params[1] if place == "weight" else optimizer.state[params[1]]["exp_avg"]
        tensor.view(-1)[3] = math.nan
    assert not bool(monitor.is_finite())


def test_a_reading_tells_what_was_measured():
    params, optimizer, monitor = made("lion")
    step(params, optimizer, monitor, 0)
    dice = torch.Generator().manual_seed(1)
    grads = [torch.randn(param.shape, generator=dice) for param in params]
    step(params, optimizer, monitor, 1)
    first, second = monitor.read(), monitor.read(flush=True)
    assert math.isnan(first.cosine), "there was no momentum"
    assert second.grad_norm == pytest.approx(norm_of(grads), rel=1e-6)
    assert second.loss == second.backward_loss == 2.0
    assert second.factor == 1
    assert 0.3 < second.cosine <= 1
    assert second.flip_rate > 0 or math.isnan(second.flip_rate)


def test_a_restored_watch_decides_the_same():
    params, optimizer, monitor = made("lion")
    for number in range(ARMED):
        step(params, optimizer, monitor, number)
        monitor.read()
    again = StepMonitor(
        Lion([nn.Parameter(torch.zeros_like(param)) for param in params]), Thresholds(), LinearWarmup(0)
    )
    again.load_state_dict(monitor.state_dict())
    assert repr(again.read(flush=True)) == repr(monitor.read(flush=True))  # what was not measured is NaN
    assert again.rules_state() == monitor.rules_state()
    assert again.warmup.warmup.step == ARMED


def test_a_whole_guarded_step_reads_nothing_on_the_host():
    """On the meta device a value cannot be read at all."""
    params = [nn.Parameter(torch.empty(300, 40, device="meta")), nn.Parameter(torch.empty(300, device="meta"))]
    optimizer = Lion(params, lr=1e-3)
    monitor = StepMonitor(optimizer, Thresholds(), LinearWarmup(10))
    recovery = Recovery(Thresholds(), "recover", acts=True, gates=True)
    recovery.monitors = [monitor]
    recovery.ring.ring.append(Snapshot.of_run(0, nn.Module(), [], [], trusted=True))
    for number in range(3):
        seen = Losses()
        for param in params:
            optimizer.state[param] = {"exp_avg": torch.empty_like(param)}
            param.grad = torch.empty_like(param)
        seen.before_backward(torch.empty((), device="meta"), comparable=True)
        seen.micro_square = monitor.squared_norm()
        seen.add(torch.empty((), device="meta"), 4)
        assert monitor.before_step(seen, 1.0, (number + 1, 4, 4))
        assert optimizer.found_inf.device.type == "meta"
        recovery.keep(number + 1)
    with pytest.raises(RuntimeError, match="meta"):
        monitor.unread()


def test_the_latest_readings_are_waited_for_only_where_a_snapshot_is_due(monkeypatch):
    params, optimizer, monitor = made("lion")
    recovery, module = Recovery(Thresholds(), "recover", acts=True, gates=True), nn.ParameterList(params)
    recovery.monitors, recovery.module, recovery.optimizers = [monitor], module, [optimizer]
    looked, waiting = [], AsyncReadback.state_dict
    monkeypatch.setattr(AsyncReadback, "state_dict", lambda self: looked.append(number) or waiting(self))
    for number in range(250):
        step(params, optimizer, monitor, number)
        monitor.read()
        recovery.keep(number)
    assert looked == [0, 100, 200]


def test_no_snapshot_is_taken_right_after_a_step_that_was_not_finite():
    params, optimizer, monitor = made("lion")
    recovery = Recovery(Thresholds(), "recover", acts=True, gates=True)
    recovery.monitors, recovery.module, recovery.optimizers = [monitor], nn.ParameterList(params), [optimizer]
    step(params, optimizer, monitor, 0, factor=math.nan)
    recovery.keep(1)
    assert recovery.ring.newest is None, "the reading of the latest step is not read yet"
    for number in (1, 2):
        step(params, optimizer, monitor, number)
        monitor.rules.observe(monitor.read())
        recovery.keep(number + 1)
        assert (recovery.ring.newest is None) == (number == 1), "in step 1 the rules have seen the step before"
    assert recovery.ring.newest.step == 3


def test_a_third_divergence_at_the_end_does_not_fail_a_run_that_is_over():
    _, _, monitor = made("lion")
    recovery = Recovery(Thresholds(), "recover", acts=True, gates=True)
    recovery.monitors, recovery.policy.level, recovery.policy.last_escalation = [monitor], 2, 40
    recovery.is_ending = True
    assert recovery.treat(Symptom("divergence", "the loss has risen"), 50, monitor).remedy is Remedy.NEW_LEVEL


def test_without_a_snapshot_a_raised_loss_is_noted_and_sick_weights_are_the_end():
    _, _, monitor = made("lion")
    recovery = Recovery(Thresholds(), "recover", acts=True, gates=True)
    recovery.monitors = [monitor]
    assert recovery.treat(Symptom("divergence", "the loss has risen"), 50, monitor).remedy is Remedy.NEW_LEVEL
    assert recovery.policy.level == 0
    assert recovery.treat(Symptom("sick_weights", "weights are not finite"), 60, monitor).remedy is Remedy.STOP


def test_without_gradients_no_step_is_said_to_be_skipped():
    """As with gradient release: there is nothing to gate, whatever the loss."""
    params, _, monitor = made("lion")
    for param in params:
        param.grad = None
    for number in range(1, 60):
        seen = Losses()
        seen.before_backward(torch.tensor(2.0 + 0.01 * (number % 7) if number < 55 else 1e6), comparable=True)
        assert not monitor.before_step(seen, None, (number, 4, 4))
    readings = [monitor.read(flush=True) for _ in range(1, 60)]
    assert not any(reading.skipped for reading in readings)
    assert all(reading.is_finite for reading in readings)


def test_a_skipped_step_keeps_its_gradients_and_an_optimizer_without_inputs_does_not_see_them():
    params, optimizer, monitor = made("sgd")
    taken = step(params, optimizer, monitor, 0, factor=math.nan)
    assert [torch.equal(param.grad.isnan(), grad.isnan()) for param, grad in zip(params, taken, strict=True)] == [
        True
    ] * 2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_whose_gradients_are_made_by_its_closure_is_skipped_too(name):
    params, optimizer, monitor = made(name)
    for number in range(3):
        step(params, optimizer, monitor, number)
    before = everything(params, optimizer)

    def closure():
        for param in params:
            param.grad = torch.full_like(param, math.nan)
        monitor.before_step(losses(), None, (4, 4, 4))
        return torch.tensor(2.0)

    assert optimizer.step(closure) == 2.0
    assert all(torch.equal(left, right) for left, right in zip(before, everything(params, optimizer), strict=True))
    assert params[0].grad.isnan().all()
    step(params, optimizer, monitor, 4)
    assert not torch.equal(before[0], params[0])


@pytest.mark.parametrize("size", [1e-18, 1.0, 1e25], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_is_that_of_float64_also_where_squares_overflow_in_fp32(size, dtype):
    params, _, monitor = made("adamw")
    dice = torch.Generator().manual_seed(2)
    for param in params:
        param.data = param.data.to(dtype)
        param.grad = (size * torch.randn(param.shape, generator=dice)).to(dtype)
    assert float(monitor.squared_norm()) == pytest.approx(norm_of([param.grad for param in params]) ** 2, rel=1e-5)
