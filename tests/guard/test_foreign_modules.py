"""LionGuard in modules and with tools that it does not know: training goes on, whatever happens."""

import copy
import csv
import logging
import math
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lion_lightning import Lion, LionGuard, LionMixin
from lion_lightning.guard.lr_warmup import LinearWarmup
from lion_lightning.guard.preflight import samples_in
from lion_lightning.guard.reading import Reading
from lion_lightning.guard.recovery import Recovery
from lion_lightning.guard.rules import Thresholds
from lion_lightning.guard.step_monitor import GatedRules, Losses, StepMonitor
from lion_lightning.hyperparams import linear
from tests.guard.regression import Regression, trainer_with


def test_a_hook_that_meets_what_it_did_not_expect_turns_the_guard_off_and_says_so_once(tmp_path, caplog):
    def samples(batch):
        raise KeyError("images")

    guard = LionGuard(samples=samples)
    trainer = trainer_with(guard, tmp_path)
    with caplog.at_level(logging.DEBUG, "lion_lightning"):
        trainer.fit(Regression())
    assert trainer.global_step == 8
    assert guard.is_off
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks
    said = [record.message for record in caplog.records if "off for the rest of this run" in record.message]
    assert len(said) == 1
    assert "KeyError: 'images'" in said[0]
    assert any(record.exc_info for record in caplog.records)


def test_the_learning_rate_finder_and_the_fit_after_it(tmp_path):
    guard, module = LionGuard(warmup_steps=4), Regression()
    trainer = trainer_with(guard, tmp_path)
    Tuner(trainer).lr_find(module, num_training=6, update_attr=False)
    trainer.fit(module)
    assert trainer.global_step == 8
    assert not guard.is_off
    assert guard.warmup.step == 8


def test_a_state_loaded_for_a_test_does_not_reach_the_next_fit(tmp_path):
    guard, module = LionGuard(warmup_steps=4), Regression()
    trainer_with(guard, tmp_path).fit(module)
    trainer = trainer_with(guard, tmp_path)
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "fold.ckpt")
    trainer.test(module, ckpt_path=tmp_path / "fold.ckpt", weights_only=False)
    trainer_with(guard, tmp_path).fit(Regression())
    assert guard.steps == guard.warmup.step == 8


class NoOptimizer(Regression):
    def configure_optimizers(self):
        return None


class OwnData(Regression):
    def on_fit_start(self):
        self.data = DataLoader(TensorDataset(torch.randn(128, 4), torch.randn(128, 1)), batch_size=64)

    def train_dataloader(self):
        return self.data


class SetsUpAgain(Regression):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == 2:
            self.trainer.strategy.setup_optimizers(self.trainer)


@pytest.mark.parametrize("module", [NoOptimizer, OwnData, SetsUpAgain])
def test_unusual_optimizers_and_data(tmp_path, module):
    guard = LionGuard()
    trainer_with(guard, tmp_path).fit(module())
    assert not guard.is_off


@pytest.mark.parametrize("options", [{"max_epochs": -1, "max_steps": 3}, {"limit_train_batches": 0}, {"max_steps": 0},
                                     {"fast_dev_run": 2}, {"overfit_batches": 1}], ids=str)  # fmt: skip
def test_any_length_of_run(tmp_path, options):
    guard = LionGuard()
    trainer_with(guard, tmp_path, **options).fit(Regression())
    assert not guard.is_off


def test_finders_of_batch_size_and_rate_as_callbacks(tmp_path):
    class Data(LightningDataModule):
        batch_size = 8

        def train_dataloader(self):
            inputs = torch.randn(256, 4)
            return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=self.batch_size)

    for finder in (BatchSizeFinder(steps_per_trial=2, max_trials=2), LearningRateFinder(num_training_steps=5)):
        guard = LionGuard(warmup_steps=2)
        trainer = Trainer(
            default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, max_epochs=1, callbacks=[finder, guard],
        )  # fmt: skip
        trainer.fit(Regression(), Data())
        assert not guard.is_off
        assert guard.steps == guard.warmup.step == trainer.global_step > 0


class WithLBFGS(Regression):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=5)


class Sam(torch.optim.SGD):
    """Two evaluations of the loss for one step, as in sharpness-aware minimisation."""

    def step(self, closure):
        closure()
        return super().step(closure)


class WithSam(Regression):
    def configure_optimizers(self):
        return Sam(self.parameters(), lr=1e-3)


class NoRate(torch.optim.SGD):
    """A group without a learning rate, as Adafactor's with a relative step."""

    def step(self, closure=None):
        rate, self.param_groups[0]["lr"] = self.param_groups[0]["lr"], 1e-3
        try:
            return super().step(closure)
        finally:
            self.param_groups[0]["lr"] = rate


class WithoutRate(Regression):
    def configure_optimizers(self):
        optimizer = NoRate(self.parameters(), lr=1e-3)
        optimizer.param_groups[0]["lr"] = None
        return optimizer


class Sparse(Regression):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(16, 4, sparse=True)

    def training_step(self, batch, batch_idx):
        return (self.table(torch.arange(8)).sum(0) - 1).square().sum() + 0 * super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SparseAdam(list(self.table.parameters()), lr=1e-2)


@pytest.mark.parametrize("module", [WithLBFGS, WithSam, WithoutRate, Sparse])
def test_a_step_of_any_optimizer_counts_once(tmp_path, module):
    guard = LionGuard(warmup_steps=3)
    trainer = trainer_with(guard, tmp_path)
    trainer.fit(module())
    assert not guard.is_off
    assert guard.steps == trainer.global_step == 8
    assert [event.kind for event in guard.events if event.kind != "batch_size"] == []


class Jumps(Regression):
    """One batch has gradients a million times as large."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=1e-3, max_iter=3)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1e6 if self.trainer.global_step == 40 else 1)


def test_gradients_that_an_optimizer_compares_within_a_step_are_not_clipped(tmp_path):
    guarded = trainer_with(LionGuard(), tmp_path, max_epochs=6)
    guarded.fit(module := Jumps())
    trainer_with(LionGuard(gate=False), tmp_path, max_epochs=6).fit(alone := Jumps())
    assert torch.equal(module.net.weight, alone.net.weight)
    assert [event.kind for event in guarded.callbacks[0].events] == ["bad_losses"]


def test_a_step_of_a_raw_optimizer_is_told_once(tmp_path):
    class Raw(Regression):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            super().training_step(batch, batch_idx).backward()
            optimizer.step()

    guard = LionGuard(disabled=["settings"])
    trainer_with(guard, tmp_path, max_epochs=2).fit(Raw())
    assert [event.kind for event in guard.events] == ["unseen_steps"]


def test_copies_in_the_middle_of_a_fit_have_the_state_and_no_hooks(tmp_path):
    class Copies(Regression):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 3:
                guard = self.trainer.callbacks[0]
                self.copies = [copy.deepcopy(guard), pickle.loads(pickle.dumps(guard))]

    guard, module = LionGuard(on_divergence="recover"), Copies()
    trainer_with(guard, tmp_path).fit(module)
    for copied in module.copies:
        assert copied.monitors == []
        assert copied.state_dict()["steps"] == 4
        trainer_with(copied, tmp_path).fit(Regression())
        assert not copied.is_off


def test_another_number_of_warmup_steps_after_a_resume_counts_and_is_told(tmp_path, caplog):
    trainer = trainer_with(LionGuard(warmup_steps=4), tmp_path)
    trainer.fit(Regression())
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    guard = LionGuard(warmup_steps=20)
    trainer_with(guard, tmp_path, max_epochs=2).fit(Regression(), ckpt_path=tmp_path / "first.ckpt", weights_only=False)
    assert guard.warmup.warmup_steps == 20
    assert guard.warmup.step == 16
    assert "warmup_steps=20, not 4 as in the checkpoint" in caplog.text


def test_a_checkpoint_from_before_the_guard(tmp_path, caplog):
    trainer = trainer_with(Callback(), tmp_path)
    trainer.fit(Regression())
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    guard = LionGuard(warmup_steps=20)
    trainer_with(guard, tmp_path, max_epochs=2).fit(Regression(), ckpt_path=tmp_path / "first.ckpt", weights_only=False)
    assert guard.steps == 16
    assert "starts at step 8 without a state of its own" in caplog.text


def test_keys_of_its_own_beside_a_monitor_of_learning_rates(tmp_path):
    class Named(Regression):
        def configure_optimizers(self):
            return Lion([{"params": self.net.parameters(), "name": "all"}], lr=self.lr)

    logger = CSVLogger(tmp_path)
    Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=logger, enable_progress_bar=False, log_every_n_steps=1,
        enable_model_summary=False, max_epochs=1, callbacks=[LearningRateMonitor("step"), LionGuard(warmup_steps=8)],
    ).fit(Named())  # fmt: skip
    logger.save()
    with open(logger.experiment.metrics_file_path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["lr/Lion/all"]]
    assert [int(row["step"]) for row in rows] == list(range(8))
    assert float(rows[0]["lr/Lion/all"]) == pytest.approx(1e-3 / 8)
    assert any(key.startswith("lr-Lion") for key in rows[0])


def test_disabled_rules_neither_act_nor_report(tmp_path):
    class Spike(Regression):
        def on_after_backward(self):
            if self.trainer.global_step in (40, 50):
                self.net.weight.grad.mul_(torch.inf if self.trainer.global_step == 50 else 1e6)

    def kinds(disabled):
        guard = LionGuard(warmup_steps=0, disabled=disabled)
        trainer_with(guard, tmp_path, max_epochs=8).fit(Spike())
        assert not guard.is_off
        return {event.kind for event in guard.events}

    assert kinds(["settings"]) == {"outlier", "nonfinite"}
    assert kinds(["settings", "outlier"]) <= {"nonfinite", "poison"}
    assert kinds(["settings", "outlier", "nonfinite", "stuck_momentum"]) == set()
    with pytest.raises(ValueError, match=r"disabled must be a list of rules of nonfinite, .* got \['gate'\]"):
        LionGuard(disabled=["gate"])


def test_overflows_of_a_grad_scaler_are_no_faults():
    param = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([param], lr=0.1)
    monitor = StepMonitor(optimizer, Thresholds(), LinearWarmup(0), scaled=True)
    recovery = Recovery(Thresholds(), "warn")
    recovery.monitors = [monitor]
    overflow = Reading(grad_norm=math.inf, skipped=True, step=1)
    assert list(recovery.process(monitor, overflow)) == []
    assert [treated.symptom.kind for treated in recovery.process(monitor, replace(overflow, bad_ranks=(0,)))] == [
        "nonfinite"
    ]


def test_a_model_that_changes_while_it_trains(tmp_path):
    """Its loss rises when it is changed, so it is rewound to a snapshot of the smaller model; the rewind is undone."""

    class Grows(Regression):
        def __init__(self):
            super().__init__()
            self.frozen = nn.Linear(4, 1)
            self.frozen.requires_grad_(False)
            self.register_buffer("queue", torch.zeros(2))

        def configure_optimizers(self):
            return Lion(self.net.parameters(), lr=self.lr)

        def training_step(self, batch, batch_idx):
            inputs, targets = batch
            raised = 50.0 if self.trainer.global_step >= 200 else 0.0
            return nn.functional.mse_loss(self.net(inputs) + self.frozen(inputs), targets) + raised

        def on_train_batch_start(self, batch, batch_idx):
            if self.trainer.global_step == 200:
                self.frozen.requires_grad_(True)
                self.trainer.optimizers[0].add_param_group({"params": self.frozen.parameters()})
                self.queue = torch.zeros(5)

    torch.manual_seed(1)
    guard = LionGuard(warmup_steps=0, on_divergence="recover", thresholds=Thresholds(proven_after=20))
    trainer_with(guard, tmp_path, max_epochs=40).fit(Grows())
    assert not guard.is_off
    kinds = [event.kind for event in guard.events if event.kind in ("divergence", "new_level")]
    assert kinds == ["divergence", "new_level"]
    (divergence,) = (event for event in guard.events if event.kind == "divergence")
    assert divergence.remedy.endswith("left as it is: frozen.weight, frozen.bias")


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.ones(4), torch.ones(1)


class Mixed(LionMixin, Regression):
    configure_optimizers = LionMixin.configure_optimizers


class Linear(Mixed):
    schedule = linear


def test_a_function_as_schedule_and_a_run_of_unknown_length(tmp_path, caplog):
    trainer = trainer_with(LionGuard(warmup_steps=0), tmp_path)
    trainer.fit(Linear())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0)
    trainer = trainer_with(LionGuard(), tmp_path, max_epochs=-1, max_time={"milliseconds": 200})
    trainer.fit(Mixed(), DataLoader(Endless(), batch_size=64))
    assert trainer.global_step > 0
    assert "the length of this run is not known" in caplog.text
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-4


def test_a_hook_on_the_step_that_fails_turns_the_guard_off_and_the_step_goes_on(tmp_path, caplog):
    class Breaks(Regression):
        def on_before_zero_grad(self, optimizer):
            if self.trainer.global_step == 3:
                self.trainer.callbacks[0].monitors[0].warmup.warmup.step = None  # what no hook expects

    guard = LionGuard(warmup_steps=20)
    trainer = trainer_with(guard, tmp_path)
    trainer.fit(Breaks())
    assert trainer.global_step == 8
    assert guard.is_off
    assert caplog.text.count("off for the rest of this run") == 1
    assert "TypeError" in caplog.text
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3)
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


def test_hooks_that_run_twice_for_one_step_count_once():
    """As in torch before 2.13 for an optimizer whose step calls that of its base class."""
    param = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([param], lr=0.1)
    monitor = StepMonitor(optimizer, Thresholds(), LinearWarmup(10))
    before, after = (
        list(optimizer._optimizer_step_pre_hooks.values()),
        list(optimizer._optimizer_step_post_hooks.values()),
    )
    param.grad = torch.full((4,), torch.nan)
    monitor.before_step(Losses(), None, (1, 4, 4))
    for hook in [*before, *before]:
        hook(optimizer, (optimizer,), {})
    assert param.grad is None, "the step is to be skipped"
    for hook in [*after, *after]:
        hook(optimizer, (optimizer,), {})
    assert param.grad.isnan().all(), "the gradient is returned"
    assert monitor.warmup.warmup.step == 1
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_ignored_divergence_never_stops_a_run(tmp_path):
    class NeverFinite(Regression):
        def on_after_backward(self):
            self.net.weight.grad.fill_(torch.nan)

    for options in ({"on_divergence": "ignore"}, {"on_divergence": "stop", "disabled": ["nonfinite"]}):
        trainer = trainer_with(LionGuard(**options), tmp_path)
        trainer.fit(NeverFinite())
        assert trainer.global_step == 8


SPAWNED = """
from lightning.pytorch import Trainer
from lion_lightning import LionGuard
from tests.guard.regression import Regression

if __name__ == "__main__":
    guard, module = LionGuard(on_divergence="recover", warmup_steps=2), Regression()
    before = module.net.weight.clone()
    trainer = Trainer(
        strategy="ddp_spawn", devices=2, accelerator="cpu", max_epochs=1, logger=False, callbacks=[guard],
        enable_progress_bar=False, enable_checkpointing=False,
    )
    trainer.fit(module)
    assert not guard.is_off and not guard.events
    assert not bool((before == module.net.weight).any())
"""


@pytest.mark.slow
def test_ddp_spawn_which_pickles_the_guard(root, tmp_path):
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "for the rest of this run" not in done.stderr


class MendsGradients(Regression):
    """One element of the gradient is NaN in every step, and the module's own hook sees to it."""

    def __init__(self, optimizer):
        super().__init__()
        self.optimizer = optimizer

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=3e-2)

    def on_after_backward(self):
        self.net.weight.grad[0, 0] = torch.nan

    def on_before_optimizer_step(self, optimizer):
        self.net.weight.grad.nan_to_num_()


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 1.0}], ids=["", "clipped"])
@pytest.mark.parametrize(
    "optimizer", [Lion, torch.optim.AdamW, lambda params, lr: torch.optim.AdamW(params, lr, fused=True)]
)
def test_gradients_that_the_module_mends_before_the_step_are_judged_after_that(tmp_path, optimizer, options):
    guard = LionGuard(warmup_steps=0, on_divergence="recover", disabled=["settings", "batch_size"])
    trainer_with(guard, tmp_path, max_epochs=10, **options).fit(module := MendsGradients(optimizer))
    assert [event.kind for event in guard.events].count("late_gradients") == 1
    assert {event.kind for event in guard.events} == {"nonfinite", "late_gradients"}
    (rules,) = [monitor["rules"] for monitor in guard.state_dict()["monitors"]]
    assert 4 <= rules["skipped"] <= 6
    assert rules["nonfinite_in_a_row"] == 0
    assert module.net.weight.isfinite().all()
    assert module.net.weight[0, 1:].sub(1).abs().mean() < 0.3, "it has learned"


def test_a_module_that_changes_the_size_of_its_gradients_is_not_clipped_once_they_are_judged_later(tmp_path):
    """Norms of before are no history of those after."""

    class Unscales(Regression):
        def on_after_backward(self):
            for param in self.parameters():
                param.grad.mul_(torch.nan if 60 <= self.trainer.global_step < 64 else 1e-3)

        def on_before_optimizer_step(self, optimizer):
            for param in self.parameters():
                param.grad.nan_to_num_().mul_(1e3)

    guard = LionGuard(warmup_steps=0, disabled=["settings", "batch_size"])
    trainer_with(guard, tmp_path, max_epochs=20).fit(Unscales())
    assert {event.kind for event in guard.events} == {"nonfinite", "late_gradients"}


def test_no_norm_of_a_micro_batch_is_compared_with_gradients_that_were_clipped_since(tmp_path):
    guard = LionGuard(warmup_steps=0, disabled=["settings", "batch_size"])

    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            guard.monitors[0].defers = True

    trainer = trainer_with(guard, tmp_path, max_epochs=10, accumulate_grad_batches=2, gradient_clip_val=1e-6)
    trainer.callbacks.append(Watch())
    trainer.fit(Regression())
    assert not guard.is_off
    assert math.isnan(guard.noise.value)


def test_an_error_while_gradients_are_judged_in_the_step_turns_the_guard_off_and_the_run_goes_on(tmp_path):
    guard = LionGuard(warmup_steps=0, disabled=["settings", "batch_size"])

    class Breaks(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 5:
                guard.monitors[0].defers = True
                guard.monitors[0].sample.measure = lambda: 1 / 0

    trainer = trainer_with(guard, tmp_path, max_steps=10)
    trainer.callbacks.append(Breaks())
    trainer.fit(Regression())
    assert trainer.global_step == 8
    assert guard.is_off


def test_gradients_of_a_grad_scaler_are_never_judged_in_the_step():
    """The state may be of a run in another precision."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(4))], lr=0.1)
    monitor = StepMonitor(optimizer, Thresholds(), LinearWarmup(0), scaled=True)
    monitor.load_state_dict({**monitor.state_dict(), "defers": True})
    assert not monitor.defers


def test_an_optimizer_that_compares_gradients_is_not_clipped_after_a_resume_either():
    optimizer = torch.optim.LBFGS([nn.Parameter(torch.ones(4))])
    first, second = (StepMonitor(optimizer, Thresholds(), LinearWarmup(0)) for _ in range(2))
    first.gate.clips_outliers = False
    second.load_state_dict(first.state_dict())
    assert not second.gate.clips_outliers


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_run_that_ends_by_an_exception_leaves_no_copies_of_the_model(tmp_path, error):
    class Interrupted(Regression):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 20:
                raise error
            return super().training_step(batch, batch_idx)

    guard = LionGuard(warmup_steps=0, on_divergence="recover")
    with pytest.raises((SystemExit, error)):
        trainer_with(guard, tmp_path, max_epochs=4).fit(Interrupted())
    assert not guard.recovery.ring.ring


def test_gradients_that_stay_not_finite_are_skipped_after_the_hooks_of_the_module_too(tmp_path):
    class Looks(MendsGradients):
        def on_before_optimizer_step(self, optimizer):
            self.seen = self.net.weight.grad.norm()

    for optimizer in (Lion, torch.optim.AdamW):
        guard = LionGuard(warmup_steps=0, disabled=["settings", "batch_size"])
        trainer_with(guard, tmp_path, max_epochs=2).fit(module := Looks(optimizer))
        assert guard.state_dict()["monitors"][0]["rules"]["skipped"] == 16
        trainer_with(guard, tmp_path)  # seeds
        assert torch.equal(module.net.weight, Looks(optimizer).net.weight)


def test_a_batch_whose_items_are_attributes_is_counted(tmp_path):
    class Items(dict):
        def __getattr__(self, name):
            return self[name]

    assert samples_in(Items(x=torch.zeros(5, 2))) == 5
    named = Items(values=torch.zeros(5, 2))
    named.values = named["values"]  # as where `self.__dict__ = self`
    assert samples_in(named) == 5


@pytest.mark.parametrize("acts", [True, False])
def test_every_rise_of_the_loss_is_reported_also_where_the_run_is_only_watched(acts):
    recovery, monitor = Recovery(Thresholds(), "warn", acts=acts), GatedRules(Thresholds())
    recovery.monitors = [monitor]
    seen = []
    for step in range(1, 1100):
        loss = 1 + 0.01 * (step % 2) + (step > 300) + (step > 800) * 1e4
        reading = Reading(loss=loss, backward_loss=loss, grad_norm=1 + 4 * (step > 300) + 500 * (step > 800), step=step)
        seen += [
            (treated.symptom.kind, treated.said) for treated in recovery.process(monitor, replace(reading, norm_z=9))
        ]
    said = "noted; the loss is compared with its new level from now on"
    assert [event for event in seen if event[0] == "divergence"] == [("divergence", said)] * 2


def test_losses_and_weights_on_a_mesh(root, tmp_path):
    script = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from lion_lightning.guard.recovery import Recovery
from lion_lightning.guard.rules import Thresholds
from lion_lightning.guard.step_monitor import Losses
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
weight = torch.nn.Parameter(distribute_tensor(torch.zeros(8, 4), init_device_mesh("cpu", (1,)), [Replicate()]))
loss, losses = (weight - 1).square().mean(), Losses()
losses.before_backward(loss, True)
losses.add(loss, 2)
assert type(losses.backward) is type(losses.total) is torch.Tensor
assert (losses.backward, losses.total) == (1, 2)
recovery = Recovery(Thresholds(), "recover")
recovery.module = torch.nn.ParameterList([weight])
recovery.keep(0, trusted=True)
assert recovery.ring.newest is not None
assert recovery.state_dict(snapshots=True)["snapshots"] == [], "every rank would load the part of rank 0"
dist.destroy_process_group()
"""
    command, environment = [sys.executable, "-c", script], {**os.environ, "PYTHONPATH": str(root)}
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr


def test_a_learning_rate_finder_in_the_middle_of_a_run_leaves_the_guard_as_it_was(tmp_path):
    class LaterFinder(LearningRateFinder):
        """As FineTuneLearningRateFinder in Lightning's documentation."""

        def on_fit_start(self, trainer, pl_module):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                self.lr_find(trainer, pl_module)
                assert trainer.global_step == 16

    guard = LionGuard(warmup_steps=0, on_divergence="recover", disabled=["settings", "batch_size"])
    momenta = {}

    class Compare(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 16 and trainer.current_epoch == 2:  # after the guard's own hook
                (state,) = guard.recovery.ring.newest.optimizers
                momenta["kept"] = [entry["exp_avg"].clone() for entry in state["state"].values()]
                optimizer = trainer.optimizers[0]
                params = optimizer.param_groups[0]["params"]
                momenta["found"] = [optimizer.state[param]["exp_avg"].clone() for param in params]

    finder = LaterFinder(min_lr=1e-6, max_lr=1e-4, num_training_steps=40, update_attr=False)
    trainer = trainer_with(guard, tmp_path, max_epochs=4)
    trainer.callbacks.append(finder)
    kept = []

    class Watch(Callback):
        def on_train_end(self, trainer, pl_module):
            kept.append(guard.recovery.ring.newest)

    trainer.callbacks.insert(0, Watch())
    trainer.callbacks.append(Compare())
    trainer.fit(Regression())
    assert guard.steps == trainer.global_step == 32
    torch.testing.assert_close(momenta["kept"], momenta["found"], rtol=0, atol=0)
    assert guard.events == []
    assert kept[0] is not None, "there is something to go back to"
