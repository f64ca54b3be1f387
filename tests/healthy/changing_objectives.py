"""Healthy trainings whose loss changes on purpose: weights, ramps, curricula, regularisation, tasks, learning rates."""

import math
from collections.abc import Callable, Sequence

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from tests.healthy.data_mixes import Classifier, test_cross_entropy
from tests.healthy.kind import (
    CLASSES,
    CLASSIFICATION_TEACHER,
    HELD_OUT_SEED,
    INPUTS,
    Batch,
    HealthyModule,
    Kind,
    dice,
    labelled,
    labelled_batches,
    mlp,
    teacher,
)

# --- loss weight x10 ------------------------------------------------------------------------------------------------

_SECOND_TARGET = teacher(41, INPUTS, 32, 4)


def two_target_batches(seed: int, steps: int) -> list[Batch]:
    generator = dice(seed)
    noise = torch.randn(64 * steps, 4, generator=generator)
    inputs, labels = labelled(generator, 64 * steps)
    columns = inputs, labels, _SECOND_TARGET(inputs) + 0.5 * noise
    return list(zip(*(column.split(64) for column in columns), strict=True))


class LossWeight(HealthyModule):
    """Classification and regression on one trunk; at half of the run the regression weighs ten times as much."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head, self.second = mlp(INPUTS, 64, 64), nn.Linear(64, CLASSES), nn.Linear(64, 4)

    def loss(self, batch: Batch, weight: float) -> Tensor:
        inputs, labels, targets = batch
        hidden = self.trunk(inputs).relu()
        return cross_entropy(self.head(hidden), labels) + weight * mse_loss(self.second(hidden), targets)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(batch, 1.0 if self.progress < 0.5 else 10.0)


def weighted_loss(module: LossWeight) -> float:
    return sum(float(module.loss(batch, 10.0)) for batch in two_target_batches(HELD_OUT_SEED, 64)) / 64


# --- loss scale -----------------------------------------------------------------------------------------------------


class LossScale(Classifier):
    """The loss is a mean over samples at first, a sum over them in the second half: 64 times as large."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1 if self.progress < 0.5 else 64)


# --- VAE with a KL ramp ---------------------------------------------------------------------------------------------

_DECODER = teacher(42, 4, 32, 24)
NOISE = 0.3


def image_batches(seed: int, steps: int) -> list[Tensor]:
    """Observations (64, 24) of four hidden factors."""
    generator = dice(seed)
    return [
        _DECODER(0.5 * torch.randn(64, 4, generator=generator)) + NOISE * torch.randn(64, 24, generator=generator)
        for _ in range(steps)
    ]


class Autoencoder(HealthyModule):
    """A VAE whose KL term has weight 0 for half of the run and rises to 4 until three quarters: so does the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(24, 64, 16), mlp(8, 64, 24)

    def negative_elbo(self, inputs: Tensor, kl_weight: float) -> Tensor:
        mean, log_scale = self.encoder(inputs).chunk(2, 1)
        hidden = mean + log_scale.exp() * torch.randn_like(mean)
        error = ((self.decoder(hidden) - inputs) ** 2).sum(1) / (2 * NOISE**2)
        divergence = (0.5 * (mean**2 + (2 * log_scale).exp() - 1) - log_scale).sum(1)
        return (error + kl_weight * divergence).mean()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.negative_elbo(batch, 4 * min(1.0, max(0.0, 4 * self.progress - 2)))


def negative_elbo(module: Autoencoder) -> float:
    return sum(float(module.negative_elbo(batch, 4.0)) for batch in image_batches(HELD_OUT_SEED, 64)) / 64


# --- curricula ------------------------------------------------------------------------------------------------------

VOCABULARY = 12


def counting_batch(generator: torch.Generator, length: int, count: int = 32) -> Tensor:
    """Sequences (count, length) in which each token is the sum of the two before it, modulo 12, or at times random."""
    tokens = torch.randint(VOCABULARY, (count, length), generator=generator)
    random = torch.rand(count, length, generator=generator) < 0.1
    for place in range(2, length):
        following = (tokens[:, place - 1] + tokens[:, place - 2]) % VOCABULARY
        tokens[:, place] = torch.where(random[:, place], tokens[:, place], following)
    return tokens


def growing_sequences(seed: int, steps: int) -> list[Tensor]:
    """Lengths 4, 8, 16 and 32, a quarter of the run each; the loss is a sum over tokens."""
    generator = dice(seed)
    return [counting_batch(generator, 4 * 2 ** (4 * number // steps)) for number in range(steps)]


class NextToken(HealthyModule):
    """Predicts the next token from the last two; the loss is summed over a sequence and averaged over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.net = nn.Embedding(VOCABULARY, 16), mlp(32, 64, VOCABULARY)

    def losses(self, tokens: Tensor) -> Tensor:
        """Cross entropies (batch, length - 2)."""
        hidden = self.embedding(tokens)
        pairs = torch.cat([hidden[:, :-2], hidden[:, 1:-1]], 2)
        return cross_entropy(self.net(pairs).transpose(1, 2), tokens[:, 2:], reduction="none")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.losses(batch).sum(1).mean()


def token_cross_entropy(module: NextToken) -> float:
    generator = dice(HELD_OUT_SEED)
    return sum(float(module.losses(counting_batch(generator, 32)).mean()) for _ in range(64)) / 64


def harder_batches(seed: int, steps: int) -> list[Batch]:
    """Four stages; each has more samples from near the boundaries between classes."""
    generator, batches = dice(seed), []
    for number in range(steps):
        inputs, labels = labelled(generator, 256)
        margins = _margins(inputs)
        easiest = margins.argsort(descending=True)
        first = (4 * number // steps) * 64
        chosen = easiest[first : first + 64] if number < 3 * steps // 4 else torch.arange(64)
        batches.append((inputs[chosen], labels[chosen]))
    return batches


def _margins(inputs: Tensor) -> Tensor:
    highest = CLASSIFICATION_TEACHER(inputs).topk(2).values
    return highest[:, 0] - highest[:, 1]


# --- regularisation that ends, dropout that ramps -------------------------------------------------------------------


class MixupEnds(Classifier):
    """Mixup and label smoothing for four fifths of the run, plain cross entropy at the end."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, labels = batch
        if self.progress >= 0.8:
            return cross_entropy(self.net(inputs), labels)
        share = float(torch.rand(()))
        mixed = share * inputs + (1 - share) * inputs.flip(0)
        logits = self.net(mixed)
        first, second = (cross_entropy(logits, targets, label_smoothing=0.1) for targets in (labels, labels.flip(0)))
        return share * first + (1 - share) * second


class DropoutRamp(HealthyModule):
    """Dropout rises from 0 to 0.5 and stochastic depth drops ever more blocks: the training loss rises with them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(INPUTS, 64), nn.Linear(64, CLASSES)
        self.blocks = nn.ModuleList(mlp(64, 64, 64) for _ in range(3))

    def net(self, inputs: Tensor) -> Tensor:
        rate = 0.5 * max(0.0, min(1.0, 2 * self.progress - 0.5)) if self.training else 0.0
        hidden = self.first(inputs)
        for block in self.blocks:
            branch = nn.functional.dropout(block(hidden), rate)
            hidden = hidden + branch * float(torch.rand(()) >= rate)
        return self.last(hidden)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, labels = batch
        return cross_entropy(self.net(inputs), labels)


# --- continual learning ---------------------------------------------------------------------------------------------

_TASKS = [teacher(seed, INPUTS, 32, CLASSES) for seed in (51, 52, 53)]


def task_batches(seed: int, steps: int) -> list[Batch]:
    """Three tasks one after the other, each with labels of another teacher."""
    generator, batches = dice(seed), []
    for number in range(steps):
        inputs = torch.randn(64, INPUTS, generator=generator)
        logits = 3 * _TASKS[3 * number // steps](inputs)
        batches.append((inputs, torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)))
    return batches


def cross_entropy_of_the_last_task(module: Classifier) -> float:
    batches = task_batches(HELD_OUT_SEED, 300)[200:]
    return sum(float(cross_entropy(module.net(inputs), labels)) for inputs, labels in batches) / len(batches)


# --- learning rates that return -------------------------------------------------------------------------------------


def warm_restarts(steps: int) -> Callable[[int], float]:
    """Four cosines from 1 to 0.01."""
    length = steps // 4
    return lambda step: 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * (step % length) / length))


def triangles(steps: int) -> Callable[[int], float]:
    """Four triangles from 0.05 up to 3 and down again, the last two of half the height."""
    length = steps // 4
    return lambda step: (0.05 + 2.95 * (1 - abs(2 * (step % length) / length - 1))) * (1 if step < steps // 2 else 0.5)


def accumulation_grows() -> Sequence[Callback]:
    return [GradientAccumulationScheduler({1: 4, 3: 2})]


KINDS = [
    Kind(
        "loss weight x10",
        "the loss jumps by a factor of 5 and stays there",
        LossWeight,
        two_target_batches,
        weighted_loss,
        "weighted loss",
        steps=800,
    ),
    Kind(
        "loss scale x64",
        "loss and gradient norm jump by a factor of 64 and stay there",
        LossScale,
        labelled_batches,
        test_cross_entropy,
        "cross entropy",
    ),
    Kind(
        "VAE with a KL ramp",
        "the loss rises for a quarter of the run and stays there",
        Autoencoder,
        image_batches,
        negative_elbo,
        "negative ELBO, KL weight 4",
        steps=800,
    ),
    Kind(
        "sequence length curriculum",
        "the summed loss doubles three times",
        NextToken,
        growing_sequences,
        token_cross_entropy,
        "cross entropy",
    ),
    Kind(
        "difficulty curriculum",
        "the loss rises at each of four stages",
        Classifier,
        harder_batches,
        test_cross_entropy,
        "cross entropy",
    ),
    Kind(
        "mixup ends",
        "the loss falls at once, and its spread with it",
        MixupEnds,
        labelled_batches,
        test_cross_entropy,
        "cross entropy",
    ),
    Kind(
        "dropout and depth ramp",
        "the loss rises from a quarter to three quarters of the run",
        DropoutRamp,
        labelled_batches,
        test_cross_entropy,
        "cross entropy",
    ),
    Kind(
        "continual learning",
        "the loss jumps above its start at each new task",
        Classifier,
        task_batches,
        cross_entropy_of_the_last_task,
        "cross entropy",
        steps=900,
    ),
    Kind(
        "warm restarts",
        "the loss rises at each restart of the learning rate",
        Classifier,
        labelled_batches,
        test_cross_entropy,
        "cross entropy",
        lion_lr=2e-3,
        adamw_lr=8e-3,
        schedule=warm_restarts,
    ),
    Kind(
        "cyclic learning rate",
        "the loss rises with the learning rate four times",
        Classifier,
        labelled_batches,
        test_cross_entropy,
        "cross entropy",
        lion_lr=5e-4,
        adamw_lr=2e-3,
        schedule=triangles,
    ),
    Kind(
        "accumulation changes",
        "the gradient norm halves, then rises again",
        Classifier,
        labelled_batches,
        test_cross_entropy,
        "cross entropy",
        steps=1200,
        epochs=4,
        callbacks=accumulation_grows,
    ),
]
