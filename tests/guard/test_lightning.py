"""LionGuard in the ways people train: precisions, clipping, accumulation, manual optimization, other optimizers."""

import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, TensorDataset

from lion_lightning import Lion, LionGuard
from lion_lightning.guard.events import read_trace
from tests.faults.injected import LabelNoise, NaNBatch, Outlier, every
from tests.faults.task import BATCH, CLASSES, INPUTS, Student, teacher_data, train
from tests.guard.memory_logger import MemoryLogger

STEPS = 50
OPTIMIZERS = {
    "lion": partial(Lion, lr=5e-4, weight_decay=0.1),
    "lion int8": partial(Lion, lr=5e-4, momentum_dtype="int8"),
    "adamw": partial(AdamW, lr=1e-3),
    "adamw fused": partial(AdamW, lr=1e-3, fused=True),
    "sgd": partial(SGD, lr=0.05, momentum=0.9),
}


def cold(**options):
    """A guard without warm-up: it changes nothing of a healthy run."""
    return LionGuard(**{"warmup_steps": 0, **options})


def weights(outcome):
    return torch.cat([param.detach().float().flatten() for param in outcome.model.parameters()])


def state_tensors(optimizer):
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_healthy_run_is_the_same_with_the_guard_bit_for_bit(name):
    bare = train(1, None, optimizer=OPTIMIZERS[name], steps=STEPS)
    guarded = train(1, cold(), optimizer=OPTIMIZERS[name], steps=STEPS)
    assert guarded.losses == bare.losses
    assert torch.equal(weights(guarded), weights(bare))


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.3}], ids=str)
def test_a_healthy_run_is_the_same_when_it_accumulates_or_clips(options):
    bare = train(1, None, steps=20, **options)
    guarded = train(1, cold(), steps=20, **options)
    assert torch.equal(weights(guarded), weights(bare))


@pytest.mark.parametrize("name", ["lion", "adamw", "sgd"])
def test_a_dry_run_changes_nothing_of_a_sick_run_either(name):
    faults = [Outlier(step=40, factor=1e4), NaNBatch(steps=[45])]
    bare = train(1, None, faults, optimizer=OPTIMIZERS[name], steps=STEPS)
    guard = cold(dry_run=True)
    dry = train(1, guard, faults, optimizer=OPTIMIZERS[name], steps=STEPS)
    assert torch.equal(weights(dry).nan_to_num(7.0), weights(bare).nan_to_num(7.0))
    said = {event.kind: event.remedy for event in guard.events}
    assert said["outlier"] == "nothing was done (would be: the step was clipped)"
    assert said["nonfinite"] == "nothing was done (would be: the step was skipped)"


class Snoop(NaNBatch):
    """Remembers weights before and after the steps it hits, and the optimizer's state at the end."""

    def __init__(self, step):
        super().__init__([step])
        self.step, self.seen = step, {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen[trainer.global_step] = nn.utils.parameters_to_vector(pl_module.parameters()).detach().clone()
        self.state = state_tensors(trainer.optimizers[0])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_nan_batch_is_a_step_that_never_was(name, precision):
    guard, snoop = cold(), Snoop(step=5)
    trainer = fit(Student(OPTIMIZERS[name]), guard, batches=12, callbacks=[snoop, guard], precision=precision)
    assert torch.equal(snoop.seen[5], snoop.seen[6])
    assert not torch.equal(snoop.seen[6], snoop.seen[7])
    assert snoop.seen[12].isfinite().all()
    assert all(tensor.isfinite().all() for tensor in snoop.state)
    assert [event.kind for event in guard.events].count("nonfinite") == 1
    assert trainer.global_step == 12


def test_without_the_guard_the_nan_batch_ends_it():
    assert train(1, None, [Snoop(step=5)], optimizer=OPTIMIZERS["adamw"], steps=12).loss == math.inf


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_a_grad_scaler_a_nan_batch_is_survived_too(name):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    guard, snoop = cold(), Snoop(step=5)
    outcome = train(1, guard, [snoop], optimizer=OPTIMIZERS[name], steps=12, plugins=[plugin])
    assert outcome.steps == 12
    assert weights(outcome).isfinite().all()
    assert all(tensor.isfinite().all() for tensor in snoop.state)
    assert torch.equal(snoop.seen[5], snoop.seen[6])
    assert not torch.equal(snoop.seen[6], snoop.seen[7])
    assert "nonfinite" in outcome.kinds()
    assert scaler.get_scale() == 2.0**9, "the scaler has seen it as well"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_the_trainer_clips_and_the_guard_too_is_neither_twice(name, tmp_path):
    guard = cold(trace=tmp_path / "guard.csv")
    fault = Outlier(step=40, factor=1e5)
    outcome = train(1, guard, [fault], optimizer=OPTIMIZERS[name], steps=STEPS, gradient_clip_val=1.0)
    assert weights(outcome).isfinite().all()
    readings = read_trace(guard.trace.path)[0]
    assert max(reading.grad_norm for reading in readings) > 1e3, "what is logged is the norm as it was"
    assert all(reading.factor < 10 for reading in readings), "what is judged is what is left after the Trainer's limit"


class Gan(LightningModule):
    """Two optimizers by hand; what one does to its half must not touch the other's."""

    def __init__(self, nan_at=None, second_every=1):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = nn.Linear(INPUTS, 64), nn.Linear(64, CLASSES)
        self.nan_at, self.second_every, self.seen = nan_at, second_every, []

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        spoil = math.nan if batch_idx == self.nan_at else 1.0
        self.seen.append(
            [nn.utils.parameters_to_vector(half.parameters()).detach().clone() for half in self.children()]
        )
        loss = nn.functional.cross_entropy(self.critic(self.generator(batch[0])), batch[1])
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(loss * spoil)
        first.step()
        if batch_idx % self.second_every == 0:
            second.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self.critic(self.generator(batch[0])), batch[1]))
            second.step()

    def configure_optimizers(self):
        return [Lion(self.generator.parameters(), lr=1e-3), AdamW(self.critic.parameters(), lr=1e-3)]


def fit(module, guard, batches=20, samples=None, collate_fn=None, **options):
    torch.manual_seed(1)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=MemoryLogger(),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=2,
        **{"callbacks": [guard], **options},
    )
    data = TensorDataset(*teacher_data(1, samples or batches * BATCH))
    trainer.fit(module, DataLoader(data, batch_size=BATCH, collate_fn=collate_fn))
    return trainer


@pytest.mark.parametrize("second_every", [1, 3])
def test_two_optimizers_by_hand_and_a_nan_in_the_first(second_every):
    guard, module = LionGuard(warmup_steps=4, manual_optimization="act"), Gan(nan_at=6, second_every=second_every)
    trainer = fit(module, guard)
    before, after, later = (module.seen[step] for step in (6, 7, 8))
    assert torch.equal(before[0], after[0]), "the generator's step was skipped"
    assert torch.equal(before[1], after[1]) == (6 % second_every != 0), "the critic's own was not"
    assert not torch.equal(after[0], later[0])
    assert [event.kind for event in guard.events].count("nonfinite") == 1
    assert guard.steps == 20
    assert guard.batch.last == BATCH
    assert trainer.logger.latest["lr/Lion/0"] == pytest.approx(1e-3)
    assert trainer.logger.latest["lr/AdamW-1/0"] == pytest.approx(1e-3)


def test_two_optimizers_by_hand_are_not_disturbed():
    runs = []
    for guard in (Callback(), cold(), cold(manual_optimization="act")):
        module = Gan()
        torch.manual_seed(3)
        for param in module.parameters():
            nn.init.normal_(param, std=0.1)
        fit(module, guard)
        runs.append(nn.utils.parameters_to_vector(module.parameters()))
    assert all(torch.equal(run, runs[0]) for run in runs[1:])


def test_the_state_of_two_optimizers_goes_round():
    guard, again = LionGuard(warmup_steps=30), LionGuard(warmup_steps=30)
    fit(Gan(), guard)
    again.load_state_dict(guard.state_dict())
    trainer = fit(Gan(), again)
    assert trainer.logger.latest["guard/warmup_factor"] == 1.0
    assert again.steps == 40


def test_the_tail_of_an_epoch_counts_as_it_is_and_its_loss_and_norm_are_those_of_a_whole_step(tmp_path):
    guard = cold(trace=tmp_path / "guard.csv")
    fit(Student(), guard, samples=BATCH * 4 * 10 + BATCH, accumulate_grad_batches=4)
    readings = read_trace(guard.trace.path)[0]
    assert [reading.batch_size for reading in readings] == [BATCH * 4] * 10 + [BATCH]
    losses = [reading.backward_loss for reading in readings]
    assert losses[-1] == pytest.approx(losses[-2], rel=0.3)
    assert math.isfinite(guard.noise.value)
    assert [reading.micro_batch_size for reading in readings] == [BATCH] * 11


def test_too_small_a_batch_is_accumulated_before_anything_is_made_from_it():
    guard = cold(on_small_batch="accumulate", min_batch_size=200)
    trainer = fit(Student(), guard, batches=20)
    assert trainer.accumulate_grad_batches == 4
    assert trainer.global_step == 5
    assert guard.batch.last == 4 * BATCH
    assert "accumulate_grad_batches is 4, not 1, for 200 samples a step" in [event.message for event in guard.events]


class Validated(Student):
    """Counts its validations."""

    def __init__(self):
        super().__init__()
        self.validations = 0

    def val_dataloader(self):
        return DataLoader(TensorDataset(*teacher_data(2, BATCH)), batch_size=BATCH)

    def validation_step(self, batch, batch_idx):
        self.validations += 1


@pytest.mark.parametrize(("every_n_epochs", "validations"), [(1, 4), (None, 1)])
def test_accumulation_keeps_the_validations_of_an_epoch_and_spreads_those_of_a_run(every_n_epochs, validations):
    """Integers within an epoch are the user's; those over the whole run, as our recipes set them, are steps."""
    module, guard = Validated(), cold(on_small_batch="accumulate", min_batch_size=200)
    intervals = {"val_check_interval": 5, "check_val_every_n_epoch": every_n_epochs, "num_sanity_val_steps": 0}
    fit(module, guard, batches=20, **intervals)
    assert module.validations == validations


def test_accumulation_is_not_promised_beside_a_callback_that_schedules_it():
    guard = cold(on_small_batch="accumulate", min_batch_size=200)
    with pytest.raises(ValueError, match="cannot act beside a GradientAccumulationScheduler"):
        fit(Student(), guard, callbacks=[guard, GradientAccumulationScheduler({0: 1})])


def test_notes_on_settings_are_not_events_of_the_training():
    """Pictures mark the steps at which the count rises."""
    guard = cold(min_batch_size=2 * BATCH)
    trainer = fit(Student(), guard, batches=5)
    assert [(event.step, event.kind) for event in guard.events] == [(0, "batch_size")]
    assert trainer.logger.latest["guard/events"] == 0


def test_too_small_a_batch_may_be_an_error():
    guard = cold(on_small_batch="error", min_batch_size=200)
    with pytest.raises(ValueError, match=r"effective batch is 64 samples, below min_batch_size=200"):
        fit(Student(), guard)
    fit(Student(), cold(on_small_batch="error", min_batch_size=64), batches=2)


def test_accumulation_by_hand_is_not_promised():
    with pytest.raises(ValueError, match="manual optimization"):
        fit(Gan(), cold(on_small_batch="accumulate", min_batch_size=200))


class Sentences(Student):
    """Batches from which nobody can tell their size."""

    def training_step(self, batch, batch_idx):
        return super().training_step([batch.inputs, batch.labels], batch_idx)


class Opaque:
    def __init__(self, pairs):
        self.inputs = torch.stack([pair[0] for pair in pairs])
        self.labels = torch.stack([pair[1] for pair in pairs])


def test_a_batch_of_unknown_size_does_not_end_the_run():
    guard = cold()
    trainer = fit(Sentences(), guard, batches=4, collate_fn=Opaque)
    assert not [event for event in guard.events if event.kind == "batch_size"]
    assert trainer.global_step == 4


def test_a_dry_run_keeps_nobody_from_saving():
    guard = LionGuard(dry_run=True)
    outcome = train(1, guard, [LabelNoise(every(150))], steps=220)
    assert "divergence" in outcome.kinds()
    assert outcome.stopped is None
    assert guard.is_healthy()
