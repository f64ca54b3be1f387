"""The rules look at several readings at once where nothing is going on, and see, say and do all that they did."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lion_lightning import Lion, LionGuard
from lion_lightning.guard.thresholds import Thresholds
from lion_lightning.guard.trace import read_trace
from tests.faults.injected import LabelNoise, NaNBatch, NaNMomentum, Outlier
from tests.faults.task import train


class Watcher(pl.Callback):
    """After each batch: whether the run may be saved, and how many readings of each optimizer wait."""

    def __init__(self, guard: LionGuard) -> None:
        self.guard = guard
        self.healthy: list[bool] = []
        self.unread: list[list[int]] = []

    def on_train_batch_end(self, *_: object) -> None:
        self.healthy.append(self.guard.is_healthy())
        self.unread.append([len(watch.unread()) for watch in self.guard.watches])


def everything_seen(look_every, hit, gate, log_every, path):
    """All that a run with faults says and does, and when."""
    guard = LionGuard(thresholds=Thresholds(look_every=look_every), gate=gate, trace=path / f"{look_every}.csv")
    watcher = Watcher(guard)
    faults = [NaNBatch([hit]), Outlier(hit + 20, 1e5), NaNMomentum(hit + 45), LabelNoise(range(hit + 65, hit + 125))]
    options = {"callbacks_after": [watcher], "log_every_n_steps": log_every}
    outcome = train(1, guard, faults, steps=hit + 140, **options)
    rows = [reading.step for reading in read_trace(guard.trace.path)[0]]
    weights = [param.detach().clone() for param in outcome.model.parameters()]
    return outcome.events, outcome.noticed, outcome.stopped, str(outcome.losses), watcher.healthy, rows, weights


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize(("phase", "log_every"), [(0, 50), (1, 0), (2, 50), (3, 7), (4, 50)])
def test_a_run_is_the_same_whether_the_rules_look_at_every_step_or_not(tmp_path, phase, log_every, gate):
    each, fifth = (everything_seen(every, 140 + phase, gate, log_every, tmp_path) for every in (1, 5))
    assert {event.kind for event in each[0]} >= {"nonfinite", "sick_weights", "divergence"}
    assert each[:-1] == fifth[:-1]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(each[-1], fifth[-1], strict=True))


def test_readings_wait_for_each_other_where_nothing_is_going_on():
    guard = LionGuard()
    watcher = Watcher(guard)
    train(1, guard, [NaNBatch([32])], steps=50, callbacks_after=[watcher], log_every_n_steps=0)
    waiting = [count for (count,) in watcher.unread]
    assert waiting[:30] == [1, 2, 3, 4, 5] * 6
    assert waiting[30:38] == [1, 2, 3, 1, 1, 2, 3, 4], "step 33 is not finite: step 34 looks, and 35 as one was not"


def test_a_rule_that_waits_for_fewer_steps_is_not_kept_waiting():
    limits = Thresholds(poison_steps=2, look_every=50)
    outcome = train(1, LionGuard(thresholds=limits, gate=False), [Outlier(60, 1e5)], steps=100)
    event, noticed = outcome.first("poison")
    assert noticed == event.step + 1
    assert [event.kind for event in outcome.events].count("poison") == 1


class BreaksAt(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("the disk is full")


def test_a_run_that_breaks_leaves_the_readings_of_all_its_steps(tmp_path):
    guard = LionGuard(trace=tmp_path / "guard.csv")
    with pytest.raises(RuntimeError, match="the disk is full"):
        train(1, guard, [NaNBatch([35]), BreaksAt(38)], steps=60)
    assert [reading.step for reading in read_trace(tmp_path / "guard.csv")[0]] == list(range(1, 39))
    assert [(event.step, event.kind) for event in guard.events] == [(36, "nonfinite")]


class TwoOptimizers(pl.LightningModule):
    """The first steps three times in every tenth batch, the second once in every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.automatic_optimization = nn.Linear(4, 1), nn.Linear(4, 1), False

    def configure_optimizers(self) -> list[Lion]:
        return [Lion(self.first.parameters(), lr=1e-3), Lion(self.second.parameters(), lr=1e-3)]

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()
        for layer, optimizer, times in (
            (self.first, first, 0 if batch_idx % 10 else 3),
            (self.second, second, 1),
        ):
            for _ in range(times):
                optimizer.zero_grad()
                self.manual_backward(layer(batch[0]).square().mean())
                optimizer.step()


def test_an_optimizer_that_steps_often_does_not_wait_for_one_that_seldom_does():
    guard = LionGuard(warmup_steps=0)
    watcher = Watcher(guard)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[guard, watcher], log_every_n_steps=0,
    )  # fmt: skip
    trainer.fit(TwoOptimizers(), DataLoader(TensorDataset(torch.randn(240, 4)), batch_size=4))
    assert max(first for first, _ in watcher.unread) <= 5
    # A look is made where the first has stepped, so at its next step at the latest.
    assert max(second for _, second in watcher.unread) <= 10


@pytest.mark.parametrize("value", [0, 2.5])
def test_a_count_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match=r"thresholds\.look_every must be (above 0|a whole number)"):
        Thresholds(look_every=value)
