"""Judged inside Lion's step, on a CPU: the same figures and decisions as before the step, with fewer look-ups."""

import csv
import math

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lion_lightning.optim.kernels.measures import MEASURES, Survey
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lion_lightning import Lion, LionGuard
from lion_lightning.guard.sampling import SampledCoordinates
from lion_lightning.guard.thresholds import Thresholds
from lion_lightning.guard.warmup import LinearWarmup
from lion_lightning.guard.watch import Losses, OptimizerWatch
from lion_lightning.lightning import GradientRelease
from lion_lightning.optim import release_gradients
from lion_lightning.optim.kernels import library
from tests.faults.injected import NaNBatch, Outlier
from tests.faults.task import INPUTS, Student, train
from tests.guard.test_sampling import Oracle, give_gradients, parameters

pytestmark = pytest.mark.skipif(library.load() is None, reason="no C compiler")
MANY = 1 << 20


def survey(optimizer, sample):
    """What the sample reads off the tasks of one step."""
    seen = []
    optimizer.before_update = lambda tasks: seen.append(None if tasks is None else sample.survey(tasks))
    optimizer.step()
    return seen[0]


@pytest.mark.parametrize(
    "options",
    [{}, {"betas": (0.5, 0.98)}, {"maximize": True}, {"momentum_dtype": "bfloat16"}, {"cautious": True}],
    ids=str,
)
def test_the_sums_are_those_of_float64(options):
    params = parameters()
    optimizer = Lion([{"params": params[:2]}, {"params": params[2:], **options}], lr=1e-3)
    sample = SampledCoordinates(optimizer)
    oracle, flips = Oracle(sample), 0
    for number in range(6):
        give_gradients(params, number)
        if number == 0:  # there is no momentum
            optimizer.step()
            continue
        expected = oracle.measure()
        expected_square = sum(float(param.grad.double().square().sum()) for param in params)
        square, *measured = survey(optimizer, sample)
        assert square == pytest.approx(expected_square, rel=1e-6)
        for name, value in zip(MEASURES, measured, strict=True):
            assert value == pytest.approx(expected[name], rel=1e-4, abs=1.5), name
        flips += expected["flips"]
    assert flips > 100


def test_a_transposed_weight_is_sampled_as_before_the_step():
    weight = nn.Parameter(torch.randn(64, 96).t())
    optimizer = Lion([weight], lr=1e-3)
    weight.grad = torch.randn(96, 64)
    optimizer.step()
    weight.grad = torch.randn(96, 64)  # laid out otherwise than the weight
    before, inside = SampledCoordinates(optimizer), SampledCoordinates(optimizer)
    expected = [float(value) for value in before.measure()]
    assert list(survey(optimizer, inside))[1:] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("case", "kind", "options"),
    [
        ("float32", torch.float32, {}),
        ("bf16 gradients", torch.bfloat16, {}),
        ("int8 momentum", torch.float32, {"momentum_dtype": "int8"}),
        ("too much for one thread", torch.float32, {}),
        ("a parameter without a gradient", torch.float32, {}),
        ("another engine", torch.float32, {"fused": False}),
    ],
)
def test_what_is_left_to_the_way_before_the_step(case, kind, options):
    shapes = [(64, 96), (4096,)] + [(MANY, 1)] * (case == "too much for one thread")
    params = parameters(shapes=shapes, dtype=kind)
    optimizer = Lion(params, lr=1e-3, **options)
    sample = SampledCoordinates(optimizer)
    for param in params:
        param.grad = torch.ones_like(param)
    if case == "a parameter without a gradient":
        params[1].grad = None
    assert (survey(optimizer, sample) is not None) == (case == "float32")


def outcome_of(monkeypatch, tmp_path, inside, **options):
    """Weights, every reading and every event of a run with an outlier and a NaN batch; how many steps were joined."""
    joined, step = [], OptimizerWatch._judge_tasks
    with monkeypatch.context() as patch:
        patch.setattr(OptimizerWatch, "_judge_tasks", lambda self, *args: joined.append(1) or step(self, *args))
        if not inside:
            made = OptimizerWatch.__init__
            patch.setattr(
                OptimizerWatch, "__init__", lambda self, *args, **kw: made(self, *args, **{**kw, "joins_step": False})
            )
        trace = tmp_path / f"{inside}.csv"
        guard = LionGuard(trace=trace, warmup_steps=0)
        run = train(1, guard, [Outlier(step=50, factor=1e4), NaNBatch(steps=[60])], steps=70, **options)
    with trace.open() as file:
        readings = list(csv.reader(file))
    events = [(event.step, event.kind, event.remedy) for event in guard.events]
    return [param.detach().clone() for param in run.model.parameters()], readings, events, len(joined)


def test_a_run_is_the_same_judged_inside_the_step_or_before_it(monkeypatch, tmp_path):
    weights, readings, events, joined = outcome_of(monkeypatch, tmp_path, inside=True)
    other_weights, other_readings, other_events, others = outcome_of(monkeypatch, tmp_path, inside=False)
    assert (joined, others) == (69, 0), "the first step has no momentum to sample"
    assert {kind for _, kind, _ in events} >= {"outlier", "nonfinite"}
    assert events == other_events
    assert readings == other_readings
    assert len(readings) == 71
    assert all(torch.equal(left, right) for left, right in zip(weights, other_weights, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 0.3},
        {"gradient_clip_val": 0.3, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2},
    ],
    ids=str,
)
def test_gradients_that_are_clipped_later_are_judged_before(monkeypatch, tmp_path, options):
    *_, joined = outcome_of(monkeypatch, tmp_path, inside=True, **options)
    assert (joined > 0) == ("gradient_clip_val" not in options)


def test_with_gradients_released_in_backward_the_loss_is_still_read():
    guard = LionGuard(warmup_steps=0)
    run = train(1, guard, [GradientRelease()], steps=20)
    assert "no_gradients" in {event.kind for event in guard.events}
    fast_average = guard.state_dict()["watches"][0]["rules"]["monitors"]["rules"]["divergence"]["fast"]
    assert fast_average[0] == len(run.losses) - 1, "it goes by the loss of the step before"


class ClipsByItself(Student):
    """As a module may that clips without the Trainer's settings."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="value")


class ChangesGradients(Student):
    """... or looks after gradients in its own hook."""

    def on_before_optimizer_step(self, optimizer):
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="value")


class Later(Callback):
    """... or another callback does."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        nn.utils.clip_grad_value_(pl_module.parameters(), 0.1)


@pytest.mark.parametrize(
    ("module", "after", "joins"),
    [(Student, False, True), (ClipsByItself, False, False), (ChangesGradients, False, False), (Student, True, False)],
)
def test_who_clips_without_the_trainers_settings_does_not_hide_a_bad_step(module, after, joins):
    inputs, labels = torch.randn(50 * 64, INPUTS), torch.zeros(50 * 64, dtype=torch.long)
    inputs[45 * 64] = math.inf
    guard = LionGuard(warmup_steps=0)
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[guard] + [Later()] * after, **silent)
    joined = []

    class Watched(module):
        def on_train_batch_end(self, *_):
            joined.append(guard.watches[0]._joins_step)

    trainer.fit(Watched(steps=50), DataLoader(TensorDataset(inputs, labels), batch_size=64))
    assert set(joined) == {joins}
    assert (46, "nonfinite") in {(event.step, event.kind) for event in guard.events}


@pytest.mark.parametrize("sizes", [(512, 1_000_000, 4096, 300), (4096, 4096, 4096, 4096)])
def test_places_follow_the_parameters_when_some_join_later_and_others_have_no_gradient(sizes):
    """Tasks are then as many as parameters were: places of the wrong tensors, beyond their ends or not."""
    first, second, third, fourth = (nn.Parameter(torch.ones(size)) for size in sizes)
    optimizer = Lion([first, second, third], lr=1e-3)
    sample = SampledCoordinates(optimizer)
    optimizer.add_param_group({"params": [fourth]})
    for param in (first, third, fourth):
        param.grad = torch.ones_like(param)
    assert survey(optimizer, sample) is None
    second.grad = torch.ones_like(second)
    assert survey(optimizer, sample) is not None


def test_a_place_beyond_its_tensor_is_not_read():
    small = nn.Parameter(torch.ones(300))
    small.grad, seen = torch.ones(300), []
    optimizer = Lion([small], lr=1e-3)
    surveys = [Survey(places) for places in ([(0, 0, 300)], [(0, 256, 301)], [(1, 0, 300)])]
    optimizer.before_update = lambda tasks: (
        seen.extend(one.measure(tasks, torch.zeros(300)) for one in surveys) or False
    )
    optimizer.step()
    assert [sums is not None for sums in seen] == [True, False, False]


def test_where_a_part_of_the_model_releases_its_gradients_every_step_is_judged():
    outside, inner = nn.Parameter(torch.ones(300)), nn.Linear(16, 16)
    optimizer = Lion([outside, *inner.parameters()], lr=1e-3)
    release_gradients(inner, optimizer)
    watch = OptimizerWatch(optimizer, Thresholds(), LinearWarmup(0), joins_step=True)
    for number in range(4):
        (inner(torch.ones(2, 16)).sum() + outside.sum()).backward()
        watch.before_step(Losses(), None, (number, 4, 4))
        optimizer.step()
        assert (watch.read() is not None) == (number > 0)
        outside.grad = None


def test_a_step_that_fails_leaves_nothing_for_the_next_one():
    param = nn.Parameter(torch.ones(300))
    optimizer = Lion([param], lr=1e-3)
    optimizer.before_update = lambda tasks: False
    param.grad = torch.ones(300).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()
    assert optimizer.before_update is None


def test_the_sample_follows_betas_that_are_set_after_a_state_was_loaded():
    params = parameters()
    optimizer = Lion(params, lr=1e-3)
    give_gradients(params, 0)
    optimizer.step()
    sample = SampledCoordinates(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["betas"] = (0.2, 0.99)
    give_gradients(params, 1)
    before = [float(value) for value in sample.measure()]
    sample.forget()
    assert list(survey(optimizer, sample))[1:] == pytest.approx(before, rel=1e-5)


def test_a_trainer_that_logs_nothing_is_no_error():
    guard = LionGuard(warmup_steps=0)
    train(1, guard, steps=12, log_every_n_steps=0)
    assert guard.steps == 12


def test_a_guard_that_has_gone_leaves_nothing_for_the_next_step():
    params = parameters()
    optimizer = Lion(params, lr=1e-3)
    watch = OptimizerWatch(optimizer, Thresholds(), LinearWarmup(0), joins_step=True)
    give_gradients(params, 0)
    optimizer.step()
    assert watch.before_step(Losses(), None, (1, 4, 4))
    assert optimizer.before_update is not None
    watch.remove()
    assert optimizer.before_update is None
