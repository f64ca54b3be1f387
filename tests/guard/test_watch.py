"""One optimizer's step as the guard gates it, without Lightning: what is clipped, skipped, measured, and never read."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from lion_lightning import Lion
from lion_lightning.guard.monitors import Symptom
from lion_lightning.guard.readings import Mailbox
from lion_lightning.guard.recovery import Remedy
from lion_lightning.guard.thresholds import Thresholds
from lion_lightning.guard.treatment import Treatment
from lion_lightning.guard.warmup import LinearWarmup
from lion_lightning.guard.watch import Losses, OptimizerWatch

OPTIMIZERS = {
    "lion": partial(Lion, lr=1e-2),
    "lion inside": partial(Lion, lr=1e-2),
    "adamw": partial(AdamW, lr=1e-2, foreach=True),
    "adamw fused": partial(AdamW, lr=1e-2, fused=True),
    "sgd": partial(SGD, lr=1e-2, momentum=0.9),
}
ARMED = 40


def made(name, **options):
    torch.manual_seed(1)
    params = [nn.Parameter(torch.randn(8, 40)), nn.Parameter(torch.randn(8))]
    optimizer = OPTIMIZERS[name](params)
    options = {"joins_step": name == "lion inside", **options}
    return params, optimizer, OptimizerWatch(optimizer, Thresholds(), LinearWarmup(0), **options)


def losses(value=2.0):
    seen = Losses()
    seen.before_backward(torch.tensor(value), judged=True)
    seen.add(torch.tensor(value), 4)
    return seen


def step(params, optimizer, watch, number, factor=1.0, clip_val=None, loss=2.0):
    """A step whose gradient has about the norm sqrt(328) * factor; clips afterwards as a Trainer does."""
    dice = torch.Generator().manual_seed(number)
    for param in params:
        param.grad = factor * torch.randn(param.shape, generator=dice)
    if watch is not None:
        watch.before_step(losses(loss), clip_val, (number + 1, 4, 4))
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
    params, optimizer, watch = made(name)
    for number in range(3):
        step(params, optimizer, watch, number)
    before = everything(params, optimizer)
    step(params, optimizer, watch, 3, factor=fault)
    assert all(torch.equal(left, right) for left, right in zip(before, everything(params, optimizer), strict=True))
    step(params, optimizer, watch, 4)
    after = everything(params, optimizer)
    assert not torch.equal(before[0], after[0]), "the next step is taken"
    assert all(tensor.isfinite().all() for tensor in after)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_the_guard_the_same_step_ruins_the_run(name):
    params, optimizer, watch = made(name)
    watch.remove()
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
    params, optimizer, watch = made(name)
    twins, twin, unused = made(name)
    unused.remove()
    norms = []
    for number in range(ARMED):
        norms.append(norm_of(step(params, optimizer, watch, number, factor=0.01, clip_val=clip_val)))
        step(twins, twin, None, number, factor=0.01, clip_val=clip_val)
    limit = 3 * sorted(norms)[(ARMED - 1) // 2]
    step(params, optimizer, watch, ARMED, factor=1e4, clip_val=clip_val)
    step(twins, twin, None, ARMED, factor=1e4, clip_val=limit)
    for left, right in zip(everything(params, optimizer), everything(twins, twin), strict=True):
        assert torch.allclose(left, right, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bad_loss_is_skipped_and_both_are_told(name):
    params, optimizer, watch = made(name)
    for number in range(ARMED):
        step(params, optimizer, watch, number, loss=2.0 + 0.01 * (number % 7))
        watch.read()
    before = everything(params, optimizer)
    step(params, optimizer, watch, ARMED, loss=9.0)
    assert all(torch.equal(left, right) for left, right in zip(before, everything(params, optimizer), strict=True))
    watch.read()
    reading = watch.read(flush=True)
    assert reading.skipped
    assert reading.is_finite
    assert reading.loss_z > 10
    assert reading.backward_loss == 9.0
    assert (reading.step, reading.batch_size) == (ARMED + 1, 4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gate_that_may_not_act_changes_nothing_bit_for_bit(name):
    (params, optimizer, watch), (twins, twin, unused) = made(name, acts=False), made(name)
    unused.remove()
    for number in range(ARMED + 4):
        factor = 1e5 if number == ARMED else 1.0
        step(params, optimizer, watch, number, factor)
        step(twins, twin, None, number, factor)
    for left, right in zip(everything(params, optimizer), everything(twins, twin), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_healthy_step_is_taken_as_it_is_bit_for_bit(name):
    (params, optimizer, watch), (twins, twin, unused) = made(name), made(name)
    unused.remove()
    for number in range(ARMED + 4):
        step(params, optimizer, watch, number)
        step(twins, twin, None, number)
    for left, right in zip(everything(params, optimizer), everything(twins, twin), strict=True):
        assert torch.equal(left, right)


def test_a_norm_that_the_trainer_would_clip_is_judged_as_clipped_but_infinity_is_not_remembered():
    params, optimizer, watch = made("lion")
    for number in range(4):
        step(params, optimizer, watch, number, clip_val=5.0)
    before = watch.gate.state_dict()
    assert sorted(before["norms"]["values"])[:4] == pytest.approx([math.log(5.0)] * 4)
    step(params, optimizer, watch, 4, factor=math.inf, clip_val=5.0)
    assert watch.gate.state_dict() == before
    assert watch.read(flush=True) is not None


def test_the_verdict_is_gone_after_the_step_and_the_hooks_after_the_watch():
    params, optimizer, watch = made("lion")
    step(params, optimizer, watch, 0)
    assert (optimizer.grad_scale, optimizer.found_inf) == (None, None)
    watch.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_under_a_grad_scaler_the_inputs_of_a_fused_optimizer_are_the_scalers():
    params, optimizer, watch = made("adamw fused", scaled=True)
    optimizer.found_inf = marker = torch.zeros(())
    for param in params:
        param.grad = torch.ones_like(param)
    watch.before_step(losses(), None, (1, 4, 4))
    assert optimizer.found_inf is marker


def test_zeroing_the_momentum_leaves_the_second_moment_and_the_weights():
    params, optimizer, watch = made("adamw")
    step(params, optimizer, watch, 0)
    weights, second = params[0].detach().clone(), optimizer.state[params[0]]["exp_avg_sq"].clone()
    watch.zero_momentum()
    assert not optimizer.state[params[0]]["exp_avg"].any()
    assert torch.equal(optimizer.state[params[0]]["exp_avg_sq"], second)
    assert torch.equal(params[0], weights)


def test_zeroing_an_int8_momentum_zeroes_its_scales():
    param = nn.Parameter(torch.randn(80, 80))
    optimizer = Lion([param], lr=1e-3, momentum_dtype="int8")
    watch = OptimizerWatch(optimizer, Thresholds(), LinearWarmup(0))
    step([param], optimizer, watch, 0)
    assert optimizer.state[param]["exp_avg_scale"].any()
    watch.zero_momentum()
    assert not optimizer.state[param]["exp_avg_scale"].any()
    assert not optimizer.state[param]["exp_avg"].any()


@pytest.mark.parametrize("place", ["weight", "exp_avg"])
def test_sick_weights_and_sick_momentum_are_found(place):
    params, optimizer, watch = made("lion")
    step(params, optimizer, watch, 0)
    assert bool(watch.is_finite())
    with torch.no_grad():
        tensor = params[1] if place == "weight" else optimizer.state[params[1]]["exp_avg"]
        tensor.view(-1)[3] = math.nan
    assert not bool(watch.is_finite())


def test_a_reading_tells_what_was_measured():
    params, optimizer, watch = made("lion")
    step(params, optimizer, watch, 0)
    dice = torch.Generator().manual_seed(1)
    grads = [torch.randn(param.shape, generator=dice) for param in params]
    step(params, optimizer, watch, 1)
    first, second = watch.read(), watch.read(flush=True)
    assert math.isnan(first.cosine), "there was no momentum"
    assert second.grad_norm == pytest.approx(norm_of(grads), rel=1e-6)
    assert second.loss == second.backward_loss == 2.0
    assert second.factor == 1
    assert 0.3 < second.cosine <= 1
    assert second.flip_rate > 0 or math.isnan(second.flip_rate)


def test_a_restored_watch_decides_the_same():
    params, optimizer, watch = made("lion")
    for number in range(ARMED):
        step(params, optimizer, watch, number)
        watch.read()
    again = OptimizerWatch(
        Lion([nn.Parameter(torch.zeros_like(param)) for param in params]), Thresholds(), LinearWarmup(0)
    )
    again.load_state_dict(watch.state_dict())
    assert again.read(flush=True) == watch.read(flush=True)
    assert again.rules_state() == watch.rules_state()
    assert again.warmup.warmup.step == ARMED


def test_a_whole_guarded_step_reads_nothing_on_the_host():
    """On the meta device a value cannot be read at all."""
    params = [nn.Parameter(torch.empty(300, 40, device="meta")), nn.Parameter(torch.empty(300, device="meta"))]
    optimizer = Lion(params, lr=1e-3)
    watch = OptimizerWatch(optimizer, Thresholds(), LinearWarmup(10))
    treatment = Treatment(Thresholds(), "recover", acts=True, gates=True)
    treatment.watches = [watch]
    treatment.ring.take(0, nn.Module(), [], [], trusted=True)
    for number in range(3):
        seen = Losses()
        for param in params:
            optimizer.state[param] = {"exp_avg": torch.empty_like(param)}
            param.grad = torch.empty_like(param)
        seen.before_backward(torch.empty((), device="meta"), judged=True)
        seen.micro_square = watch.squared_norm()
        seen.add(torch.empty((), device="meta"), 4)
        assert watch.before_step(seen, 1.0, (number + 1, 4, 4))
        assert optimizer.found_inf.device.type == "meta"
        treatment.keep(number + 1)
    with pytest.raises(RuntimeError, match="meta"):
        watch.unread()


def test_the_latest_readings_are_waited_for_only_where_a_snapshot_is_due(monkeypatch):
    params, optimizer, watch = made("lion")
    treatment, module = Treatment(Thresholds(), "recover", acts=True, gates=True), nn.ParameterList(params)
    treatment.watches, treatment.module = [watch], module
    looked, waiting = [], Mailbox.waiting
    monkeypatch.setattr(Mailbox, "waiting", lambda self: looked.append(number) or waiting(self))
    for number in range(250):
        step(params, optimizer, watch, number)
        watch.read()
        treatment.keep(number)
    assert looked == [0, 100, 200]


def test_no_snapshot_is_taken_right_after_a_step_that_was_not_finite():
    params, optimizer, watch = made("lion")
    treatment = Treatment(Thresholds(), "recover", acts=True, gates=True)
    treatment.watches, treatment.module = [watch], nn.ParameterList(params)
    step(params, optimizer, watch, 0, factor=math.nan)
    treatment.keep(1)
    assert treatment.ring.newest is None
    step(params, optimizer, watch, 1)
    treatment.keep(2)
    assert treatment.ring.newest is None, "the step before was not, and the rules have not looked at it yet"
    watch.monitors.observe(watch.read())
    step(params, optimizer, watch, 2)
    treatment.keep(3)
    assert treatment.ring.newest.step == 3


@pytest.mark.parametrize(("loss", "news"), [(2.0, False), (math.nan, True)])
def test_a_loss_that_is_not_finite_is_news_where_the_gradient_is(loss, news):
    params, optimizer, watch = made("lion")
    step(params, optimizer, watch, 0, loss=loss)
    assert not watch.mailbox.should_be_read(5), "it arrives with the next step"
    step(params, optimizer, watch, 1)
    assert watch.mailbox.should_be_read(5) == news
    assert watch.read().is_finite != news


def test_a_rewind_without_a_snapshot_is_the_end():
    _, _, watch = made("lion")
    treatment = Treatment(Thresholds(), "recover", acts=True, gates=True)
    treatment.watches = [watch]
    assert treatment.treat(Symptom("divergence", "the loss has risen"), 50, watch)[0] is Remedy.STOP


def test_without_gradients_no_step_is_said_to_be_skipped():
    """As with gradient release: there is nothing to gate, whatever the loss."""
    params, _, watch = made("lion")
    for param in params:
        param.grad = None
    for number in range(1, 60):
        seen = Losses()
        seen.before_backward(torch.tensor(2.0 + 0.01 * (number % 7) if number < 55 else 1e6), judged=True)
        assert not watch.before_step(seen, None, (number, 4, 4))
    readings = [watch.read(flush=True) for _ in range(1, 60)]
    assert not any(reading.skipped for reading in readings)
    assert all(reading.is_finite for reading in readings)
