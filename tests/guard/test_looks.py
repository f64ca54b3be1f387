"""The gate acts in each step; all other rules look every few steps at the readings since, and miss none."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lion_lightning import Lion, LionGuard
from lion_lightning.guard.thresholds import Thresholds
from lion_lightning.guard.trace import Trace, read_trace
from tests.faults.injected import NaNBatch, Outlier
from tests.faults.task import train

ZEROED = "the momentum was zeroed"


@pytest.mark.parametrize("phase", range(5))
@pytest.mark.parametrize(
    ("look_every", "log_every", "steps_between"), [(5, 50, 5), (5, 0, 5), (1, 50, 1), (5, 3, 1), (6, 50, 2)]
)
def test_what_the_gate_has_done_is_told_at_the_next_look(phase, look_every, log_every, steps_between):
    guard = LionGuard(thresholds=Thresholds(look_every=look_every))
    outcome = train(1, guard, [NaNBatch([60 + phase])], steps=90, log_every_n_steps=log_every)
    event, noticed = outcome.first("nonfinite")
    assert event.step == 61 + phase
    # A reading arrives with the step after its own.
    assert noticed == -(-(event.step + 1) // steps_between) * steps_between


@pytest.mark.parametrize("phase", range(5))
def test_a_poisoned_momentum_is_zeroed_once_whenever_it_is_looked_at(phase):
    outcome = train(1, LionGuard(gate=False), [Outlier(170 + phase, 1e5)], steps=220)
    poisoned = [event for event in outcome.events if event.kind == "poison"]
    assert [ZEROED in event.remedy for event in poisoned] == [True]
    _, noticed = outcome.first("poison")
    assert noticed <= 170 + phase + 11


class BreaksAt(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("the disk is full")


def test_a_run_that_breaks_leaves_the_readings_of_all_its_steps(tmp_path):
    guard = LionGuard(trace=tmp_path / "guard.csv")
    with pytest.raises(RuntimeError, match="the disk is full"):
        train(1, guard, [BreaksAt(38)], steps=60)
    assert [reading.step for reading in read_trace(tmp_path / "guard.csv")[0]] == list(range(1, 39))


class ThreeStepsABatch(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.automatic_optimization = nn.Linear(4, 1), False

    def configure_optimizers(self) -> Lion:
        return Lion(self.parameters(), lr=1e-3)

    def training_step(self, batch: list[torch.Tensor]) -> None:
        for _ in range(3):
            self.optimizers().zero_grad()
            self.manual_backward(self.layer(batch[0]).square().mean())
            self.optimizers().step()


class Unread(pl.Callback):
    def __init__(self, guard: LionGuard) -> None:
        self.guard = guard
        self.counts: list[int] = []

    def on_train_batch_end(self, *_: object) -> None:
        self.counts.append(len(self.guard.watches[0].unread()))


def test_several_steps_a_batch_are_looked_at_when_five_more_are_done(tmp_path):
    guard = LionGuard(warmup_steps=0)
    guard.trace = Trace(tmp_path / "guard.csv")
    unread = Unread(guard)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[guard, unread], log_every_n_steps=50,
    )  # fmt: skip
    trainer.fit(ThreeStepsABatch(), DataLoader(TensorDataset(torch.randn(24, 4)), batch_size=4))
    # Steps 3, 6, 9, 12, 15, 18: the fifth, tenth and fifteenth have just been passed at 6, 12 and 15.
    assert unread.counts == [3, 1, 4, 1, 1, 4]
    assert [reading.step for reading in read_trace(tmp_path / "guard.csv")[0]] == list(range(1, 19))
