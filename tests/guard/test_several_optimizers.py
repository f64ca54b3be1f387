"""LionGuard beside two optimizers that step by hand: together, one of them alone, and after a resume."""

import math

import pytest
import torch
from torch import nn

from lion_lightning import Lion, LionGuard
from tests.guard.regression import Regression, trainer_with


class Two(Regression):
    """Trains the nets in `trained`, each with an optimizer of its own."""

    automatic_optimization = False

    def __init__(self, trained=(0, 1)):
        super().__init__()
        self.other, self.trained, self.seen = nn.Linear(4, 1), trained, []

    def configure_optimizers(self):
        return [Lion(net.parameters(), lr=0.1) for net in (self.net, self.other)]

    def training_step(self, batch, batch_idx):
        for number in self.trained:
            optimizer, net = self.optimizers()[number], (self.net, self.other)[number]
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(batch[0]), batch[1])
            self.manual_backward(loss)
            if batch_idx == 5:
                for param in net.parameters():
                    param.grad.fill_(math.nan)
            optimizer.step()
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append((self.trainer.callbacks[0], float(outputs["loss"])))


def guard(**options):
    return LionGuard(disabled=["settings", "batch_size"], **options)


def test_after_a_resume_without_a_state_none_warms_up_again(tmp_path):
    trainer = trainer_with(LionGuard(dry_run=True), tmp_path)
    trainer.fit(Two())
    checkpoint = tmp_path / "two.ckpt"
    trainer.save_checkpoint(checkpoint)
    kept = torch.load(checkpoint, weights_only=True)
    kept["callbacks"] = {}
    torch.save(kept, checkpoint)
    warming = guard(warmup_steps=10)
    rates = []

    class Watched(Two):
        def on_train_batch_end(self, *_):
            rates.append([monitor.warmup.applied[0] for monitor in warming.monitors])

    trainer_with(warming, tmp_path, max_epochs=2).fit(Watched(), ckpt_path=checkpoint, weights_only=True)
    assert rates
    assert all(rate == [0.1, 0.1] for rate in rates)


@pytest.mark.parametrize("number", [0, 1])
def test_one_that_steps_alone_is_watched_while_it_does(tmp_path, number):
    watching, waiting = guard(), []

    class Watched(Two):
        def on_train_batch_end(self, *_):
            waiting.append(len(watching.monitors[number].readback.state_dict()))

    trainer_with(watching, tmp_path).fit(Watched(trained=(number,)))
    assert max(waiting) <= 1
    assert "nonfinite" in [event.kind for event in watching.events]


def test_the_loss_of_one_that_steps_alone_is_that_of_its_step(tmp_path):
    watching, shown, losses = guard(), [], []

    class Watched(Two):
        def on_train_batch_end(self, outputs, *_):
            shown.append(watching._latest.loss)
            losses.append(float(outputs["loss"]))

    trainer_with(watching, tmp_path).fit(Watched(trained=(0,)))
    assert len(shown) > 4
    assert shown[2:] == pytest.approx(losses[:-2], abs=1e-5), "read a step late, when the next one has begun"
    assert shown[-1] < shown[2]
