"""LionGuard inside a Lightning run of a module that is not ours."""

import logging
import math
from collections.abc import Sequence

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lion_lightning import LionGuard, LionMixin
from lion_lightning.guard.callback import TrainingStopped
from lion_lightning.guard.lr_warmup import warmup_length
from tests.guard.memory_logger import MemoryLogger


class Regression(LionMixin, LightningModule):
    def __init__(self, poisoned_steps: Sequence[int] = ()) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)
        self.poisoned_steps = poisoned_steps

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        return loss * float("nan") if batch_idx in self.poisoned_steps else loss


class AdamRegression(Regression):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def fit(module, guard, tmp_path, samples=512, batch_size=64, **options):
    recorder = MemoryLogger()
    torch.manual_seed(1)
    inputs = torch.randn(samples, 4)
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=recorder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **{"max_epochs": 1, "callbacks": [guard], **options},
    )
    trainer.fit(module, DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=batch_size))
    return trainer, recorder.rows


@pytest.mark.parametrize("module", [Regression, AdamRegression])
def test_the_first_steps_are_warmed_up_and_what_is_logged_is_what_was_applied(tmp_path, module):
    trainer, rows = fit(module(), LionGuard(warmup_steps=4), tmp_path)
    (name,) = {key for key in rows[0] if key.startswith("lr/") and not key.endswith("no_decay")}
    peak = trainer.optimizers[0].param_groups[0].get("initial_lr", 0.1)
    assert rows[0][name] == pytest.approx(peak / 4)
    _, bare = fit(module(), LionGuard(warmup_steps=0), tmp_path)
    assert [row[name] for row in rows] == pytest.approx(
        [row[name] * min(1, (step + 1) / 4) for step, row in enumerate(bare)]
    )
    assert rows[0]["guard/warmup_factor"] == 0.25
    assert rows[-1]["guard/warmup_factor"] == 1.0


def test_hooks_are_gone_after_the_run(tmp_path):
    guard = LionGuard(warmup_steps=4)
    trainer, _ = fit(Regression(), guard, tmp_path)
    optimizer = trainer.optimizers[0]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert guard.warmup.step == trainer.global_step == 8


def test_a_small_batch_is_warned_about_once_with_what_to_do(tmp_path, caplog):
    guard = LionGuard()
    with caplog.at_level(logging.WARNING, "lion_lightning"):
        _, rows = fit(Regression(), guard, tmp_path, samples=96, batch_size=16)
    warnings = [record.message for record in caplog.records if "batch_size" in record.message]
    assert len(warnings) == 1
    assert "16 samples, below 64" in warnings[0]
    assert "4 times" in warnings[0]
    assert rows[-1]["guard/effective_batch_size"] == 16
    assert [event.kind for event in guard.events if event.kind == "batch_size"] == ["batch_size"]


def test_accumulation_is_counted_and_the_tail_is_what_it_is(tmp_path, caplog):
    guard = LionGuard(min_batch_size=1)
    _, rows = fit(Regression(), guard, tmp_path, samples=16 * 4 + 16 + 5, batch_size=16, accumulate_grad_batches=4)
    sizes = [row["guard/effective_batch_size"] for row in rows if "guard/effective_batch_size" in row]
    assert 64 in sizes
    assert guard.batch.last == 21
    assert not [event for event in guard.events if event.kind == "batch_size"]


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_loss_is_the_mean_of_the_micro_batches_not_a_part_of_it(tmp_path, accumulate):
    class Constant(Regression):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 0 + 2.5

    _, rows = fit(Constant(), LionGuard(min_batch_size=1), tmp_path, accumulate_grad_batches=accumulate)
    losses = [row["guard/loss"] for row in rows if "guard/loss" in row]
    assert losses
    assert losses == pytest.approx([2.5] * len(losses))


@pytest.mark.parametrize("step", [0, 3, 7])
def test_one_loss_that_is_not_a_number_is_skipped_and_told(tmp_path, step):
    guard = LionGuard(warmup_steps=0)
    trainer, _ = fit(Regression(poisoned_steps=[step]), guard, tmp_path)
    (event,) = (event for event in guard.events if event.kind == "nonfinite")
    assert event.step == step + 1
    assert "rank 0" in event.message
    assert "skipped" in event.remedy
    assert trainer.model.net.weight.isfinite().all()


def test_losses_that_stay_not_a_number_stop_the_run_and_say_why(tmp_path):
    guard = LionGuard(warmup_steps=0, on_divergence="stop")
    with pytest.raises(TrainingStopped, match=r"the last 6 steps had no finite gradient.*learning rate") as stopped:
        fit(Regression(poisoned_steps=range(2, 8)), guard, tmp_path)
    assert stopped.value.exit_code == 42
    assert not guard.is_healthy()


class Learned(Regression):
    """Noise at first, then nothing is left to learn: the gradient all but vanishes, as at the end of fine-tuning."""

    def training_step(self, batch, batch_idx):
        noise = torch.randn_like(batch[1])
        loss = nn.functional.mse_loss(self.net(batch[0]), noise)
        return loss if batch_idx < 60 else loss * 1e-4


@pytest.mark.parametrize("disabled", [[], ["stuck_momentum"]])
def test_a_sign_that_stops_flipping_with_no_outlier_does_not_keep_the_run_from_being_saved(tmp_path, disabled):
    unhealthy = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, *_):
            unhealthy.extend([trainer.global_step] * (not guard.is_healthy()))

    guard = LionGuard(warmup_steps=0, min_batch_size=1, on_divergence="recover", disabled=disabled)
    fit(Learned(), guard, tmp_path, samples=200, batch_size=1, callbacks=[guard, Watch()])
    assert not unhealthy
    found = [event for event in guard.events if event.kind == "low_flip_rate"]
    assert len(found) == (not disabled)
    if found:
        assert "starts a new history" in found[0].remedy


def test_without_the_guard_the_same_run_goes_on_in_silence(tmp_path):
    trainer, _ = fit(Regression(poisoned_steps=[3]), Callback(), tmp_path)
    assert trainer.global_step == 8


def test_state_survives_and_the_warm_up_is_not_started_again(tmp_path):
    guard = LionGuard(warmup_steps=20)
    fit(Regression(), guard, tmp_path)
    again = LionGuard(warmup_steps=20)
    again.load_state_dict(guard.state_dict())
    _, rows = fit(Regression(), again, tmp_path)
    assert rows[0]["guard/warmup_factor"] == pytest.approx(9 / 20)


def test_default_warm_up_is_a_share_of_short_runs_and_a_number_of_steps_of_long_ones():
    assert [warmup_length(None, steps) for steps in (0, 300, 1_000, 10_000, 300_000)] == [0, 90, 300, 2_000, 2_000]
    assert warmup_length(None, math.inf) == 200


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="warmup_steps must be at least 0, got -3"):
        LionGuard(warmup_steps=-3)
    for arguments, message in (
        ({"gate": "off"}, "gate must be true or false, got 'off'"),
        ({"dry_run": "false"}, "dry_run must be true or false, got 'false'"),
        ({"thresholds": {"outlier_z": 10}}, "thresholds must be a lion_lightning.guard.rules.Thresholds"),
        ({"samples": 64}, "samples must be a function from a batch to its number of samples, got 64"),
        ({"disabled": None}, "disabled must be a list of rules"),
    ):
        with pytest.raises(ValueError, match=message):
            LionGuard(**arguments)


def test_the_factor_that_is_logged_after_a_rewind_is_the_one_that_was_applied(tmp_path):
    class Rewinds(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                guard.monitors[0].rate.rewarm()

    guard = LionGuard(warmup_steps=0)
    _, rows = fit(AdamRegression(), guard, tmp_path, callbacks=[guard, Rewinds()])
    factors = [row["guard/warmup_factor"] for row in rows]
    assert factors == pytest.approx([row["lr/AdamW/0"] / 0.1 for row in rows])
    assert factors[:3] == [1, 1, 1]
    assert max(factors[3:5]) < 0.2


def test_a_warm_up_below_one_is_a_share_of_the_run():
    assert [warmup_length(given, 400) for given in (0, 0.03, 0.2, 1, 30)] == [0, 12, 80, 1, 30]
    assert warmup_length(0.2, math.inf) == warmup_length(None, math.inf), "there is no share of it"
    assert [warmup_length(given, math.inf) for given in (0, 1, 30)] == [0, 1, 30]


def test_a_share_of_the_run_is_warmed_up_and_a_resumed_run_keeps_it(tmp_path):
    guard, again = LionGuard(warmup_steps=0.5), LionGuard(warmup_steps=0.5)
    _, rows = fit(Regression(), guard, tmp_path)
    assert guard.warmup.warmup_steps == 4, "of 8 steps"
    assert [row["guard/warmup_factor"] for row in rows if "guard/warmup_factor" in row][:4] == [0.25, 0.5, 0.75, 1.0]
    again.load_state_dict(guard.state_dict())
    fit(Regression(), again, tmp_path, max_epochs=3)
    assert again.warmup.warmup_steps == 4, "as it was, though the run is longer now"
    with pytest.raises(ValueError, match="min_batch_size must be at least 0, got -1"):
        LionGuard(min_batch_size=-1)


def test_hooks_are_gone_after_a_run_that_broke(tmp_path):
    class Breaks(Callback):
        def on_train_batch_end(self, *_):
            raise OSError("no space")

    module, guard = Regression(), LionGuard(warmup_steps=4)
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=3,
        enable_progress_bar=False, callbacks=[guard, Breaks()],
    )  # fmt: skip
    with pytest.raises(OSError, match="no space"):
        trainer.fit(module, DataLoader(TensorDataset(torch.randn(64, 4), torch.randn(64, 1)), batch_size=64))
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks
    assert guard.state_dict()["steps"] == 1
