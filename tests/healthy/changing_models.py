"""Healthy trainings whose model or precision of weights changes on the way, and fine-tuning at tiny rates."""

import copy
from collections.abc import Sequence
from functools import cache
from typing import cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.nn.utils import prune
from torch.optim import AdamW, Optimizer

from tests.healthy.data_mixes import Classifier, test_cross_entropy
from tests.healthy.kind import (
    CLASSES,
    HELD_OUT_SEED,
    INPUTS,
    Batch,
    HealthyModule,
    Kind,
    dice,
    labelled_batches,
    mlp,
    teacher,
)

# --- quantisation-aware training ------------------------------------------------------------------------------------


class QuantisedLinear(nn.Linear):
    """Weights are rounded to `bits` bits in the forward pass once `active`; the gradient passes straight through."""

    active, bits = False, 2

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.active:
            return super().forward(inputs)
        step = self.weight.detach().abs().amax(1, keepdim=True) / (2 ** (self.bits - 1) - 0.5)
        rounded = ((self.weight / step).floor() + 0.5) * step
        return linear(inputs, self.weight + (rounded - self.weight).detach(), self.bias)


class Quantised(Classifier):
    """Two-bit weights from 40 % of the run on: the loss jumps."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            QuantisedLinear(INPUTS, 96), nn.GELU(), QuantisedLinear(96, 96), nn.GELU(), QuantisedLinear(96, CLASSES)
        )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        for layer in self.net.modules():
            if isinstance(layer, QuantisedLinear):
                layer.active = self.progress >= 0.4


# --- pruning --------------------------------------------------------------------------------------------------------


class Pruned(Classifier):
    """Five times a third of the remaining weights is pruned, which also renames parameters and adds buffers."""

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if batch_idx in {self.steps * tenth // 10 for tenth in (3, 4, 5, 6, 7)}:
            for layer in (self.net[0], self.net[2]):
                prune.l1_unstructured(layer, "weight", amount=0.33)


# --- fine-tuning ----------------------------------------------------------------------------------------------------

_OTHER_TASK = teacher(81, INPUTS, 32, CLASSES)


def other_task_batches(seed: int, steps: int) -> list[Batch]:
    """Labels between those of the pre-training task and those of another."""
    generator, batches = dice(seed), []
    for inputs, labels in labelled_batches(seed, steps):
        other = torch.multinomial((3 * _OTHER_TASK(inputs)).softmax(-1), 1, generator=generator).squeeze(1)
        batches.append((inputs, torch.where(torch.rand(64, generator=generator) < 0.5, other, labels)))
    return batches


def other_task_cross_entropy(module: Classifier) -> float:
    batches = other_task_batches(HELD_OUT_SEED, 128)
    return sum(float(cross_entropy(module.net(inputs), labels)) for inputs, labels in batches) / len(batches)


@cache
def pretrained() -> nn.Sequential:
    """A classifier after 400 steps of plain training; the same for all runs."""
    with torch.random.fork_rng(devices=[]):  # the first run of a process draws what every later one draws
        torch.manual_seed(0)
        net = Classifier().net
    optimizer = AdamW(net.parameters(), lr=3e-3)
    for inputs, labels in labelled_batches(0, 400):
        optimizer.zero_grad()
        cross_entropy(net(inputs), labels).backward()
        optimizer.step()
    return net


class FineTuned(Classifier):
    """Goes on from pre-trained weights at a tiny rate."""

    def __init__(self) -> None:
        super().__init__()
        self.net = copy.deepcopy(pretrained())


class Unfreeze(BaseFinetuning):
    """Trains the head alone in the first epoch, then the layers below it in a parameter group of their own."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.net[:4])  # type: ignore[index]

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[:4], optimizer, initial_denom_lr=5)  # type: ignore[index]


class Unfrozen(FineTuned):
    """A new head on pre-trained layers, which join when the second of three epochs begins."""

    def __init__(self) -> None:
        super().__init__()
        self.net[4] = nn.Linear(64, CLASSES)

    def configure_optimizers(self) -> Optimizer:
        """Without a schedule: LambdaLR takes no further groups."""
        return self.make_optimizer(self.net[4].parameters())


def unfreeze() -> Sequence[Callback]:
    return [Unfreeze()]


# --- growth ---------------------------------------------------------------------------------------------------------


class Growing(HealthyModule):
    """Blocks fade in one after the other, as in progressive growing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(INPUTS, 64), nn.Linear(64, CLASSES)
        self.blocks = nn.ModuleList(mlp(64, 64, 64) for _ in range(3))

    def net(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        for number, block in enumerate(self.blocks):
            share = min(1.0, max(0.0, 8 * self.progress - 2 * number - 1))
            hidden = (1 - share) * hidden + share * block(hidden.relu()) if share else hidden
        return self.last(hidden)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, labels = batch
        return cross_entropy(self.net(inputs), labels)


class Reinitialised(Classifier):
    """The head is drawn anew twice (as in iterated learning, or when classes change): the loss returns to its start."""

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if batch_idx in (self.steps // 3, self.steps // 2):
            cast(nn.Linear, self.net[4]).reset_parameters()


class WeightAveraging(Callback):
    """Every 200 steps the weights are replaced by the mean of their values at steps since, as Lookahead and SWAP do."""

    def __init__(self) -> None:
        self.slow: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        params = list(pl_module.parameters())
        if not self.slow:
            self.slow = [param.detach().clone() for param in params]
        if trainer.global_step % 10 == 0:
            with torch.no_grad():
                for slow, param in zip(self.slow, params, strict=True):
                    slow.lerp_(param, 0.5)
                    param.copy_(slow)


def lookahead() -> Sequence[Callback]:
    return [WeightAveraging()]


KINDS = [
    Kind(
        "quantisation switched on",
        "the loss jumps when weights are rounded to two bits",
        Quantised,
        labelled_batches,
        test_cross_entropy,
        "cross entropy",
        steps=700,
    ),
    Kind(
        "gradual pruning",
        "the loss jumps at each cut, parameters change their names",
        Pruned,
        labelled_batches,
        test_cross_entropy,
        "cross entropy",
        steps=700,
    ),
    Kind(
        "fine-tuning",
        "weights hardly move and gradients are small and noisy",
        FineTuned,
        other_task_batches,
        other_task_cross_entropy,
        "cross entropy",
        lion_lr=2e-5,
        adamw_lr=1e-4,
    ),
    Kind(
        "unfreezing",
        "a parameter group is added and the gradient norm jumps",
        Unfrozen,
        other_task_batches,
        other_task_cross_entropy,
        "cross entropy",
        steps=600,
        epochs=3,
        lion_lr=2e-4,
        adamw_lr=1e-3,
        callbacks=unfreeze,
    ),
    Kind(
        "progressive growing",
        "the loss rises while each new block fades in",
        Growing,
        labelled_batches,
        test_cross_entropy,
        "cross entropy",
        steps=700,
    ),
    Kind(
        "head drawn anew",
        "the loss returns to its start twice",
        Reinitialised,
        labelled_batches,
        test_cross_entropy,
        "cross entropy",
        steps=700,
    ),
    Kind(
        "lookahead",
        "weights are moved outside the optimizer every 10 steps",
        Classifier,
        labelled_batches,
        test_cross_entropy,
        "cross entropy",
        callbacks=lookahead,
    ),
]
