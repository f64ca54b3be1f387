"""What the guard lets be saved, and how a run ends under it: a healthy run loses nothing."""

import pickle

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lion_lightning import Lion, LionGuard
from lion_lightning.guard.callback import TrainingStopped
from lion_lightning.guard.rules import Symptom
from lion_lightning.training.checkpoint.files import DurableCheckpointIO
from lion_lightning.training.checkpoint.policy import RunCheckpoint
from tests.guard.memory_logger import MemoryLogger

BATCH, BATCHES = 64, 20


class Task(LightningModule):
    """A small regression; `change` is what happens to the loss of a step."""

    def __init__(self, change=lambda loss, step: loss, batches=BATCHES):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
        self.change, self.batches = change, batches

    def loss(self, batch):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return self.change(self.loss(batch), self.trainer.global_step)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self):
        return Lion(self.parameters(), lr=1e-3)

    def train_dataloader(self):
        inputs = torch.randn(BATCH * self.batches, 4, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=BATCH)

    val_dataloader = train_dataloader


def raised(factor, at=300):
    """A loss weight that is raised on purpose."""
    return lambda loss, step: loss if step < at else loss * factor


def trainer(*callbacks, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    saves = any(isinstance(callback, RunCheckpoint | ModelCheckpoint) for callback in callbacks)
    options = {**quiet, "accelerator": "cpu", "max_epochs": 1, "enable_checkpointing": saves, **options}
    return Trainer(callbacks=list(callbacks), **options)


def saved(folder, module, guard, steps, every=None, **options):
    """The names of the checkpoints that train.py's policy writes of a run."""
    checkpoint = RunCheckpoint(folder, monitor="val/loss", every_n_steps=every)
    options = {"check_val_every_n_epoch": None, "val_check_interval": 10, "max_epochs": -1, **options}
    trainer(guard, checkpoint, plugins=[DurableCheckpointIO()], max_steps=steps, **options).fit(module)
    return sorted(path.name for path in folder.glob("*.ckpt"))


def failing(at):
    """A function for `samples` that fails in a batch."""
    calls = iter(range(10**6))

    def samples(batch):
        if next(calls) == at:
            raise KeyError("an odd batch")
        return BATCH

    return samples


def test_a_guard_that_is_off_keeps_no_run_from_being_saved(tmp_path):
    broken = Task(lambda loss, step: loss * float("nan") if step == 4 else loss)
    guard = LionGuard(on_divergence="recover", samples=failing(5))
    names = saved(tmp_path, broken, guard, 20)
    assert guard.is_off
    assert "best.ckpt" in names
    assert "step-000000020.ckpt" in names


def test_the_warm_up_of_a_guard_that_turned_itself_off_goes_on_and_is_not_repeated_after_a_resume(tmp_path):
    rates = []

    class Applied(Callback):
        def on_train_batch_end(self, trainer, *_):
            hooks = guard._warming or [monitor.warmup for monitor in guard.monitors]
            rates.append(hooks[0].applied[0])

    guard = LionGuard(warmup_steps=10, samples=failing(4))
    first = trainer(guard, Applied(), max_epochs=2)
    first.fit(Task())
    assert guard.is_off
    assert rates[:12] == pytest.approx([1e-4 * min(10, step) for step in range(1, 13)])
    assert first.optimizers[0].param_groups[0]["lr"] == 1e-3
    first.save_checkpoint(tmp_path / "off.ckpt")
    rates.clear()
    guard = LionGuard(warmup_steps=10)
    trainer(guard, Applied(), max_epochs=3).fit(Task(), ckpt_path=tmp_path / "off.ckpt", weights_only=False)
    assert set(rates) == {1e-3}
    assert guard.steps == 3 * BATCHES


def test_a_guard_that_is_off_can_be_copied_and_leaves_the_optimizer_as_it_was_found():
    class Copies(Callback):
        def on_train_end(self, trainer, pl_module):
            assert guard.is_off
            assert not pickle.loads(pickle.dumps(guard)).monitors

    guard = LionGuard(warmup_steps=100)

    run = trainer(Odd(guard), guard, Copies())
    run.fit(Task())
    optimizer = run.optimizers[0]
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


class Odd(Callback):
    """Turns a guard off in the middle of its warm-up."""

    def __init__(self, guard):
        self.guard = guard

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 4:
            self.guard.turn_off("an odd batch")


def test_an_error_at_the_guards_own_end_leaves_the_optimizer_as_it_was_found(tmp_path):
    class Broken(Task):
        def training_step(self, batch, batch_idx):
            if batch_idx == 5:
                guard.trace.flush = lambda: (_ for _ in ()).throw(OSError("the disk is full"))
                raise RuntimeError("the run breaks")
            return super().training_step(batch, batch_idx)

    guard = LionGuard(warmup_steps=100, trace=tmp_path / "guard.csv")
    run, module = trainer(guard), Broken()
    with pytest.raises(RuntimeError, match="the run breaks"):
        run.fit(module)
    assert run.optimizers[0].param_groups[0]["lr"] == 1e-3
    assert not run.optimizers[0]._optimizer_step_pre_hooks


@pytest.mark.parametrize("end", [319, 320, 321, 322])
def test_a_run_that_ends_while_its_loss_is_judged_keeps_its_newest_weights(tmp_path, end):
    """A divergence is seen at step 320, and the rewind is undone at 322: the loss weight was raised on purpose."""
    bare, guarded = Task(raised(200), batches=100), Task(raised(200), batches=100)
    trainer(max_epochs=-1, max_steps=end, limit_val_batches=0).fit(bare)
    guard = LionGuard(on_divergence="recover", disabled=["bad_loss"])
    names = saved(tmp_path, guarded, guard, end, limit_val_batches=0)
    losses = [float(task.loss(task.train_dataloader().dataset.tensors)) for task in (bare, guarded)]
    assert losses[1] < 1.1 * losses[0], "the weights are those of a snapshot"
    assert f"step-{end:09}.ckpt" in names


def test_steps_that_were_skipped_do_not_keep_a_run_from_being_saved(tmp_path):
    bad = Task(lambda loss, step: loss * float("nan") if step % 10 == 9 else loss)
    names = saved(tmp_path, bad, LionGuard(on_divergence="recover"), 60, every=5)
    assert "best.ckpt" in names
    assert "step-000000060.ckpt" in names


@pytest.mark.parametrize("options", [{}, {"disabled": ["nonfinite"]}, {"on_divergence": "recover"}])
def test_a_loss_that_is_never_finite_beside_finite_gradients_is_saved(tmp_path, options):
    names = saved(
        tmp_path, Task(lambda loss, step: loss + torch.tensor(float("inf"))), LionGuard(**options), 15, every=5
    )
    assert "step-000000010.ckpt" in names


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    class Broken(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 7:
                pl_module.net[0].weight.data[0] = float("nan")

    guard = LionGuard(on_divergence="warn", disabled=["outlier"])
    checkpoint = RunCheckpoint(tmp_path, every_n_steps=1)
    run = trainer(Broken(), guard, checkpoint, plugins=[DurableCheckpointIO()], max_steps=12, limit_val_batches=0)
    run.fit(Task())
    newest = max(path.name for path in tmp_path.glob("step-*.ckpt"))
    assert newest in ("step-000000006.ckpt", "step-000000007.ckpt")


@pytest.mark.parametrize("mode", ["recover", "stop"])
def test_a_dry_run_and_a_guard_that_only_watches_do_not_end_a_run(mode):
    class ByHand(Task):
        def __init__(self, change):
            super().__init__(change)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    lost = lambda loss, step: loss * float("nan") if step >= 8 else loss  # noqa: E731
    with pytest.raises(TrainingStopped):
        trainer(LionGuard(on_divergence=mode)).fit(Task(lost))
    trainer(LionGuard(dry_run=True, on_divergence=mode)).fit(Task(lost))
    trainer(LionGuard(on_divergence=mode)).fit(ByHand(lost))


def test_a_short_fp16_run_whose_scale_is_not_found_yet_does_not_end_in_an_error():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    trainer(LionGuard(on_divergence="recover"), plugins=[plugin], max_steps=4).fit(Task())


def test_overflows_of_a_grad_scaler_do_not_keep_a_run_from_being_saved(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler), DurableCheckpointIO()]
    checkpoint = RunCheckpoint(tmp_path, monitor="val/loss", every_n_steps=6)
    options = {"check_val_every_n_epoch": None, "val_check_interval": 6, "max_epochs": -1}
    trainer(LionGuard(on_divergence="recover"), checkpoint, plugins=plugins, max_steps=6, **options).fit(Task())
    assert checkpoint.best_step == 6


def test_weights_that_are_put_back_after_their_validation_are_not_the_best(tmp_path):
    """The rewind that is on trial at the last step is undone: what was validated were other weights."""

    class Rewinds(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 20:
                guard.recovery.treat(Symptom("divergence", "made up"), 20, guard.monitors[0])
                assert guard.recovery.trial is not None

    guard = LionGuard(warmup_steps=0, on_divergence="recover")
    checkpoint = RunCheckpoint(tmp_path, monitor="val/loss")
    options = {"check_val_every_n_epoch": None, "val_check_interval": 10, "max_epochs": -1, "max_steps": 20}
    climbing = Task(lambda loss, step: -loss)  # so the weights of the snapshot are better than any since
    trainer(Rewinds(), guard, checkpoint, plugins=[DurableCheckpointIO()], **options).fit(climbing)
    assert (checkpoint.best_step, guard.events[-1].kind) == (10, "new_level")
    assert (tmp_path / "step-000000020.ckpt").exists(), "the end is saved all the same"


def test_telemetry_that_was_read_and_not_logged_yet_is_in_the_checkpoint(tmp_path):
    keeps = ModelCheckpoint(tmp_path, every_n_train_steps=104, save_top_k=-1, filename="{step}")
    trainer(LionGuard(), keeps, max_epochs=-1, max_steps=104).fit(Task())
    logger = MemoryLogger()
    options = {"logger": logger, "log_every_n_steps": 10, "max_epochs": -1, "max_steps": 112}
    trainer(LionGuard(), **options).fit(Task(), ckpt_path=tmp_path / "step=104.ckpt", weights_only=False)
    assert [name for name in logger.latest if name.startswith("lion/")]


def test_a_run_resumed_while_its_loss_is_judged_goes_through_as_the_uninterrupted_one(tmp_path):
    def guard():
        return LionGuard(on_divergence="recover", disabled=["bad_loss"], checkpoint_snapshots=True)

    keeps = ModelCheckpoint(tmp_path, every_n_train_steps=310, save_top_k=-1, filename="{step}")
    whole, resumed = guard(), guard()
    trainer(whole, keeps, max_epochs=40).fit(one := Task(raised(200), batches=10))
    path = tmp_path / "step=310.ckpt"
    trainer(resumed, max_epochs=40).fit(two := Task(raised(200), batches=10), ckpt_path=path, weights_only=False)
    assert resumed.steps == whole.steps == 400
    assert [(event.step, event.kind) for event in resumed.events] == [(each.step, each.kind) for each in whole.events]
    torch.testing.assert_close(two.state_dict(), one.state_dict(), rtol=0, atol=0)


def test_a_state_that_was_loaded_for_a_run_that_failed_is_not_of_the_next_one(tmp_path):
    first = trainer(LionGuard(warmup_steps=10), max_epochs=2)
    first.fit(Task())
    first.save_checkpoint(tmp_path / "done.ckpt")
    guard = LionGuard(warmup_steps=10)
    with pytest.raises(Exception, match="max_epochs"):
        trainer(guard).fit(Task(), ckpt_path=tmp_path / "done.ckpt", weights_only=False)
    trainer(guard).fit(Task())
    assert guard.steps == BATCHES


@pytest.mark.parametrize("steps", [0, 5])
def test_a_given_number_of_warm_up_steps_counts_after_a_resume_also_0(tmp_path, steps):
    first = trainer(LionGuard(warmup_steps=100))
    first.fit(Task())
    first.save_checkpoint(tmp_path / "warm.ckpt")
    guard = LionGuard(warmup_steps=steps)
    trainer(guard, max_epochs=2).fit(Task(), ckpt_path=tmp_path / "warm.ckpt", weights_only=False)
    assert guard.warmup.warmup_steps == steps


@pytest.mark.parametrize("options", [{"dry_run": True}, {"disabled": ["batch_size"]}])
@pytest.mark.parametrize("mode", ["accumulate", "error"])
def test_a_small_batch_is_left_alone_by_a_guard_that_does_not_act_on_it(mode, options):
    run = trainer(LionGuard(min_batch_size=512, on_small_batch=mode, **options))
    run.fit(Task())
    assert run.accumulate_grad_batches == 1


def test_a_module_with_lazy_layers_keeps_its_guard_in_recover_mode():
    class Lazy(Task):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(1))

    guard = LionGuard(on_divergence="recover")
    trainer(guard).fit(Lazy())
    assert not guard.is_off


@pytest.mark.parametrize("kind", ["sparse", "csr", "quantized", "float8", "expanded"])
def test_buffers_of_unusual_kinds_are_left_alone_by_a_rewind(kind):
    buffers = {
        "sparse": lambda: torch.eye(4).to_sparse(),
        "csr": lambda: torch.eye(4).to_sparse_csr(),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
        "float8": lambda: torch.ones(4).to(torch.float8_e4m3fn),
        "expanded": lambda: torch.ones(1).expand(3),
    }

    class WithBuffer(Task):
        def __init__(self):
            super().__init__(raised(200), batches=100)
            self.register_buffer("unusual", buffers[kind](), persistent=False)

    guard = LionGuard(on_divergence="recover", disabled=["bad_loss"])
    trainer(guard, max_epochs=4, limit_val_batches=0).fit(WithBuffer())
    assert [event.kind for event in guard.events if event.kind in ("divergence", "new_level")] == [
        "divergence",
        "new_level",
    ]
    assert not guard.is_off


class Periodic(RunCheckpoint):
    """Remembers the steps at which something was saved."""

    def __init__(self, folder, every):
        super().__init__(folder, every_n_steps=every)
        self.steps = []

    def _save(self, trainer, best=False):
        self.steps.append(trainer.global_step)
        return super()._save(trainer, best)


@pytest.mark.parametrize("validates", [True, False])
def test_a_run_without_validation_is_saved_as_often(tmp_path, validates):
    checkpoint = Periodic(tmp_path, 20)
    options = {} if validates else {"limit_val_batches": 0}
    options |= {"check_val_every_n_epoch": None, "val_check_interval": 20, "max_epochs": -1, "max_steps": 90}
    trainer(checkpoint, plugins=[DurableCheckpointIO()], **options).fit(Task())
    assert checkpoint.steps == [20, 40, 60, 80, 90]


def test_a_run_that_early_stopping_may_not_end_yet_is_saved_as_often(tmp_path):
    stops, checkpoint = EarlyStopping("val/loss", min_delta=1e3, patience=1), Periodic(tmp_path, 10)
    options = {"check_val_every_n_epoch": None, "val_check_interval": 25, "max_epochs": -1, "min_steps": 90}
    trainer(stops, checkpoint, plugins=[DurableCheckpointIO()], max_steps=100, **options).fit(Task())
    assert {10, 20, 30, 40, 50, 60, 70, 80, 90} <= set(checkpoint.steps)


def test_a_high_loss_keeps_a_run_from_being_saved_from_half_way_to_the_verdict_on(tmp_path):
    """A few high losses in a row are common where losses have heavy tails."""
    unfit = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, *_):
            unfit.extend([trainer.global_step] * (not guard.is_healthy()))

    guard = LionGuard(warmup_steps=0, on_divergence="recover", on_bad_loss="ignore")
    trainer(guard, Watch(), max_steps=317, max_epochs=-1).fit(Task(raised(200), batches=100))
    assert unfit
    assert 310 <= unfit[0] <= 312
    assert unfit == list(range(unfit[0], 318))
    assert guard.is_healthy(), "the end is saved"
