"""The rate that is applied is always warm-up x schedule, whatever the scheduler, and no scheduler ever sees it."""

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, AdamW
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from lion_lightning.guard.lr_warmup import LinearWarmup, WarmupHook

STEPS, WARMUP = 12, 5
SCHEDULERS = {
    "none": lambda optimizer: None,
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, STEPS),
    "one_cycle": lambda optimizer: OneCycleLR(optimizer, max_lr=0.5, total_steps=STEPS + 1, cycle_momentum=False),
    "plateau": lambda optimizer: ReduceLROnPlateau(optimizer, patience=1),
    "sequential": lambda optimizer: SequentialLR(
        optimizer, [ConstantLR(optimizer, 0.5, 3), LinearLR(optimizer, 1.0, 0.1, 6)], [4]
    ),
}


@pytest.mark.parametrize("tensor_rate", [False, True])
def test_a_rate_that_the_closure_sets_is_scaled_and_kept(tensor_rate):
    parameter = nn.Parameter(torch.ones(1))
    optimizer = AdamW([parameter], lr=torch.tensor(0.1) if tensor_rate else 0.1)
    hook = WarmupHook(optimizer, LinearWarmup(4))
    group, inside, applied, after = optimizer.param_groups[0], [], [], []

    def closure():
        parameter.grad = torch.ones(1)
        if hook.warmup.step == 1:
            group["lr"] = torch.tensor(0.04) if tensor_rate else 0.04
        inside.append(float(group["lr"]))
        return 0.0

    for _ in range(5):
        optimizer.step(closure)
        applied.append(float(hook.applied[0]))
        after.append(float(group["lr"]))
    assert inside == after == pytest.approx([0.1, 0.04, 0.04, 0.04, 0.04]), "a closure sees the true rates"
    assert applied == pytest.approx([0.1 / 4, 0.04 * 2 / 4, 0.04 * 3 / 4, 0.04, 0.04])


def test_a_rate_that_the_closure_derives_from_the_present_one_is_that_without_warm_up():
    """As where a module steps a scheduler in `training_step`, which Lightning runs within the optimizer's step."""
    rates = []
    for hooked in (False, True):
        parameter = nn.Parameter(torch.ones(1))
        optimizer = SGD([parameter], lr=0.1)
        if hooked:
            WarmupHook(optimizer, LinearWarmup(30))
        schedule = ExponentialLR(optimizer, 0.99)

        def closure(parameter=parameter, schedule=schedule):
            parameter.grad = torch.ones(1)
            schedule.step()
            return 0.0

        for _ in range(20):
            optimizer.step(closure)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == rates[1] == pytest.approx(0.1 * 0.99**20)


def test_a_closure_that_is_run_several_times_runs_with_the_true_rate_each_time():
    parameter, inside = nn.Parameter(torch.full((2,), 3.0)), []
    optimizer = LBFGS([parameter], lr=0.5, max_iter=4)
    hook = WarmupHook(optimizer, LinearWarmup(10))

    def closure():
        inside.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        loss = (parameter**4).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(inside) > 2
    assert set(inside) == {0.5}
    assert hook.applied == pytest.approx([0.05])
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_an_optimizer_that_reads_its_rate_before_the_closure_is_warmed_up_too():
    moved = []
    for steps in (0, 1000):
        parameter = nn.Parameter(torch.full((1,), 3.0))
        optimizer = LBFGS([parameter], lr=1.0, max_iter=1)
        WarmupHook(optimizer, LinearWarmup(steps))

        def closure(parameter=parameter, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (parameter**2).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        moved.append(3.0 - float(parameter.detach()))
    assert moved[1] == pytest.approx(moved[0] / 1000, rel=1e-3)


def test_a_rate_that_a_hook_after_the_step_sets_is_kept():
    parameter = nn.Parameter(torch.ones(1))
    optimizer = SGD([parameter], lr=1.0)

    def halve(optimizer, *_):
        optimizer.param_groups[0]["lr"] = 0.5

    optimizer.register_step_post_hook(halve)
    WarmupHook(optimizer, LinearWarmup(10))
    parameter.grad = torch.ones(1)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


def rates_of(make_scheduler, warmup_steps, steps=STEPS, tensor_rate=False):
    """(rates seen inside each step, rates in the groups after each step)"""
    parameter = nn.Parameter(torch.ones(1))
    rate = torch.tensor(0.1) if tensor_rate else 0.1
    optimizer = AdamW([parameter], lr=rate) if tensor_rate else SGD([parameter], lr=rate)
    if warmup_steps is not None:
        WarmupHook(optimizer, LinearWarmup(warmup_steps))
    inside: list[float] = []
    optimizer.register_step_pre_hook(lambda opt, *_: inside.append(float(opt.param_groups[0]["lr"])))
    scheduler = make_scheduler(optimizer)
    after = []
    for _ in range(steps):
        parameter.grad = torch.ones(1)
        optimizer.step()
        if scheduler is not None:
            scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
        after.append(float(optimizer.param_groups[0]["lr"]))
    return inside, after


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_applied_rate_is_the_product(name):
    bare_inside, bare_after = rates_of(SCHEDULERS[name], None)
    inside, after = rates_of(SCHEDULERS[name], WARMUP)
    factors = [min(1.0, (step + 1) / WARMUP) for step in range(STEPS)]
    assert inside == pytest.approx([rate * factor for rate, factor in zip(bare_inside, factors, strict=True)])
    assert after == pytest.approx(bare_after)


class Run:
    """An optimizer with its schedule and its warm-up; `resumed` is another process that loads its states."""

    def __init__(self, name, warmup_steps=WARMUP):
        self.name = name
        self.parameter = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.optimizer = SGD([self.parameter], lr=0.1)
        self.warmup = LinearWarmup(warmup_steps)
        self.hook = WarmupHook(self.optimizer, self.warmup)
        self.scheduler = SCHEDULERS[name](self.optimizer)

    def step(self):
        """The rate that the step applied, told by how far the weight went: SGD with a gradient of 1."""
        before = self.parameter.detach().clone()
        self.parameter.grad = torch.ones_like(before)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step(*([1.0] if isinstance(self.scheduler, ReduceLROnPlateau) else []))
        return float(before - self.parameter)

    def resumed(self):
        other = Run(self.name, warmup_steps=0)
        other.optimizer.load_state_dict(self.optimizer.state_dict())
        if self.scheduler is not None:
            other.scheduler.load_state_dict(self.scheduler.state_dict())
        other.warmup.load_state_dict(self.warmup.state_dict())
        return other


def factor_after(step, rewarmed_at=None, scale=1.0):
    """The factor of a step (from 0 on), worked out anew: warm-up x (0.1 to 1 over ten steps after a rewind) x scale."""
    warm = min(1.0, (step + 1) / WARMUP)
    if rewarmed_at is None or step < rewarmed_at:
        return warm
    return warm * min(1.0, 0.1 + 0.9 * (step - rewarmed_at) / 10) * scale


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("resume_at", [2, 8])
def test_what_moves_the_weight_is_the_product_before_and_after_a_resume(name, resume_at):
    bare = rates_of(SCHEDULERS[name], None)[0]
    run, applied = Run(name), []
    for step in range(STEPS):
        if step == resume_at:
            run = run.resumed()
        applied.append(run.step())
        assert run.hook.applied == pytest.approx(applied[-1:])
    assert applied == pytest.approx([rate * factor_after(step) for step, rate in enumerate(bare)])


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_after_a_rewind_the_rate_climbs_from_a_tenth_under_any_schedule_and_through_a_resume(name, scale):
    bare = rates_of(SCHEDULERS[name], None)[0]
    run, applied = Run(name), []
    for step in range(STEPS):
        if step == 3:
            run.warmup.rewarm(scale)
        if step == 7:
            run = run.resumed()
        applied.append(run.step())
    assert applied == pytest.approx([rate * factor_after(step, 3, scale) for step, rate in enumerate(bare)])


def test_after_a_long_warm_up_the_second_one_is_as_long():
    warmup = LinearWarmup(40)
    warmup.step = 100
    warmup.rewarm()
    factors = []
    for _ in range(50):
        factors.append(warmup.factor)
        warmup.step += 1
    assert factors[:41] == pytest.approx([0.1 + 0.9 * step / 40 for step in range(41)])
    assert factors[40:] == [1.0] * 10


def test_two_rewinds_halve_the_rate_twice_and_for_good():
    warmup = LinearWarmup(0)
    for _ in range(2):
        warmup.rewarm(0.5)
    warmup.step = 1000
    assert warmup.factor == 0.25


def test_two_optimizers_are_warmed_up_each_by_its_own_steps():
    first, second = Run("none"), Run("none")
    assert [first.step() for _ in range(3)] == pytest.approx([0.02, 0.04, 0.06])
    assert second.step() == pytest.approx(0.02)


def test_a_tensor_rate_is_scaled_in_place_and_put_back():
    bare_inside, bare_after = rates_of(SCHEDULERS["none"], None, tensor_rate=True)
    inside, after = rates_of(SCHEDULERS["none"], WARMUP, tensor_rate=True)
    assert inside[:2] == pytest.approx([0.1 / WARMUP, 0.2 / WARMUP])
    assert inside[-1] == pytest.approx(bare_inside[-1])
    assert after == pytest.approx(bare_after)


def test_an_exception_inside_the_step_does_not_stick():
    parameter = nn.Parameter(torch.ones(1))
    optimizer = SGD([parameter], lr=0.1)
    hook = WarmupHook(optimizer, LinearWarmup(4))

    def broken():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(broken)
    parameter.grad = torch.ones(1)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    assert hook.applied == pytest.approx([0.025])  # the failed step did not count
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(broken)
    hook.remove()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_a_resumed_warm_up_goes_on_where_it_was():
    warmup = LinearWarmup(10)
    warmup.step = 3
    resumed = LinearWarmup(0)
    resumed.load_state_dict(warmup.state_dict())
    assert resumed.factor == warmup.factor == pytest.approx(0.4)


def test_no_warm_up_and_a_negative_one():
    assert LinearWarmup(0).factor == 1.0
    with pytest.raises(ValueError, match="warmup_steps must be at least 0, got -1"):
        LinearWarmup(-1)
