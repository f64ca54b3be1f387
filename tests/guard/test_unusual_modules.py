"""Modules and optimizers of unusual kinds train with the guard as without it."""

import math

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lion_lightning import LionGuard
from tests.guard.regression import Regression, trainer_with


class KeywordClosure(torch.optim.SGD):
    def step(self, *, closure=None):
        return super().step(closure)


class WithKeywordClosure(Regression):
    def configure_optimizers(self):
        return KeywordClosure(self.parameters(), lr=1e-3)


class SecondClosure(torch.optim.SGD):
    def step(self, scale=None, closure=None):
        return super().step(closure)


class WithSecondClosure(Regression):
    def configure_optimizers(self):
        return SecondClosure(self.parameters(), lr=1e-3)


class Lazy(Regression):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 1))


class LazyAlone(Regression):
    def __init__(self):
        super().__init__()
        self.net = nn.LazyLinear(1)


class InDouble(Regression):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1, dtype=torch.float64)

    def training_step(self, batch, batch_idx):
        return super().training_step([part.double() for part in batch], batch_idx)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)


class WithoutALossAtTimes(Regression):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 2 else super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    "module", [WithKeywordClosure, WithSecondClosure, Lazy, LazyAlone, InDouble, WithoutALossAtTimes]
)
def test_unusual_modules_train_as_without_the_guard(tmp_path, module):
    torch.set_default_dtype(torch.float64 if module is InDouble else torch.float32)
    try:
        weights = []
        for guard in (LionGuard(warmup_steps=0), Callback()):
            trainer = trainer_with(guard, tmp_path)
            built = module()
            trainer.fit(built)
            assert trainer.global_step == 8
            weights.append(torch.cat([parameter.detach().flatten() for parameter in built.parameters()]))
            if isinstance(guard, LionGuard):
                assert not guard.is_off
                assert {event.kind for event in guard.events} <= {"batch_size", "warmup", "decay"}
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(*weights)


def test_a_rate_that_the_module_sets_while_it_trains_is_kept(tmp_path):
    class OwnRate(Regression):
        def training_step(self, batch, batch_idx):
            if self.global_step == 2:
                self.optimizers().param_groups[0]["lr"] = 1e-4
            return super().training_step(batch, batch_idx)

    trainer = trainer_with(LionGuard(warmup_steps=0.5), tmp_path)
    trainer.fit(OwnRate())
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-4


def test_a_state_of_a_run_that_was_over_is_not_of_the_next_one(tmp_path):
    trainer = trainer_with(LionGuard(warmup_steps=20, disabled=["settings", "batch_size"]), tmp_path)
    trainer.fit(Regression())
    trainer.save_checkpoint(tmp_path / "done.ckpt")
    guard, rates = LionGuard(warmup_steps=20, disabled=["settings", "batch_size"]), []
    trainer_with(guard, tmp_path).fit(Regression(), ckpt_path=tmp_path / "done.ckpt", weights_only=True)
    assert guard.state_dict()["steps"] == 8, "what was loaded is what is saved"

    class Watched(Regression):
        def on_train_batch_end(self, *_):
            rates.append(guard.monitors[0].warmup.applied[0])

    trainer_with(guard, tmp_path).fit(Watched())
    assert rates[0] == pytest.approx(1e-3 / 20)
    assert guard.steps == 8


def test_a_nan_in_the_imaginary_part_of_a_gradient_is_skipped(tmp_path):
    class Spectral(Regression):
        def __init__(self):
            super().__init__()
            self.spectrum = torch.nn.Parameter(torch.ones(4, dtype=torch.complex64))

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx) + self.spectrum.abs().square().mean()
            if batch_idx == 3:
                self.spectrum.register_hook(lambda grad: torch.complex(grad.real, grad.real * math.nan))
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=self.lr)

    module, guard = Spectral(), LionGuard(disabled=["settings", "batch_size"])
    trainer_with(guard, tmp_path, max_steps=4).fit(module)
    assert "nonfinite" in [event.kind for event in guard.events]
    assert bool(module.spectrum.isfinite().all())


def test_a_few_gradients_that_are_not_finite_at_the_end_do_not_end_a_finished_run(tmp_path):
    class BrokenTail(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * math.nan if self.trainer.global_step >= 36 else loss

    module, guard = BrokenTail(), LionGuard(on_divergence="recover", disabled=["settings", "batch_size"])
    trainer = trainer_with(guard, tmp_path, max_epochs=5)
    trainer.fit(module)
    assert trainer.global_step == 40
    assert bool(module.net.weight.isfinite().all())
    assert guard.is_healthy()


def test_a_reset_on_purpose_is_not_undone(tmp_path):
    """Layers that are made anew in the middle of a run, which older weights would always be better than."""

    class Reset(Regression):
        def on_train_batch_end(self, *_):
            if self.trainer.global_step == 300:
                with torch.no_grad():
                    self.net.weight.fill_(-3.0)
                if guard is not None:
                    guard.new_level()

    losses, kinds = [], []
    for guard in (
        None,
        LionGuard(on_divergence="recover", on_bad_loss="note", disabled=["settings", "batch_size", "outlier"]),
    ):
        torch.manual_seed(1)
        module = Reset()
        module.lr = 5e-3
        callbacks = guard if guard is not None else Callback()
        trainer_with(callbacks, tmp_path, max_epochs=50).fit(module)
        losses.append(module.net.weight.detach().clone())
        kinds.append([event.kind for event in guard.events] if guard is not None else [])
    assert torch.equal(*losses)
    assert "divergence" not in kinds[1]
