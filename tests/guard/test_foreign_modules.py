"""LionGuard in modules and with tools that it does not know: training goes on, whatever happens."""

import logging

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lion_lightning import Lion, LionGuard


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.lr = nn.Linear(4, 1), 1e-3

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)

    def train_dataloader(self):
        inputs = torch.randn(512, 4, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=64)

    test_dataloader = train_dataloader

    def configure_optimizers(self):
        return Lion(self.parameters(), lr=self.lr)


def trainer_with(guard, tmp_path, **options):
    return Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[guard], **{"max_epochs": 1, **options},
    )  # fmt: skip


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
