"""Healthy trainings with losses that come every few steps: second tasks, lazy penalties, physics, sums over tokens."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from tests.healthy.data_mixes import Classifier, test_cross_entropy
from tests.healthy.kind import (
    CLASSES,
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

# --- a task every fifth batch ---------------------------------------------------------------------------------------

_REGRESSION = teacher(61, INPUTS, 32, 1)
TARGET_SCALE = 6.0


def two_tasks(seed: int, steps: int) -> list[Batch]:
    """Four batches of classification, then one of a regression with targets of size 6."""
    generator, batches = dice(seed), []
    for number in range(steps):
        inputs, labels = labelled(generator, 64)
        noise = torch.randn(64, 1, generator=generator)
        targets = TARGET_SCALE * (_REGRESSION(inputs) + 0.3 * noise)
        batches.append((inputs, targets if number % 5 == 4 else labels))
    return batches


class TwoTasks(HealthyModule):
    """One trunk, two heads, and the task of a batch is told by its targets."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.classify, self.regress = mlp(INPUTS, 64, 64), nn.Linear(64, CLASSES), nn.Linear(64, 1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, targets = batch
        hidden = self.trunk(inputs).relu()
        if targets.is_floating_point():
            return mse_loss(self.regress(hidden), targets)
        return cross_entropy(self.classify(hidden), targets)


def loss_of_both_tasks(module: TwoTasks) -> float:
    """Cross entropy of the one, plus the share of variance that is left of the other."""
    batches = two_tasks(HELD_OUT_SEED, 100)
    losses = [float(module.training_step(batch, 0)) for batch in batches]
    regression, variance = losses[4::5], float(torch.cat([targets for _, targets in batches[4::5]]).var())
    classification = [loss for number, loss in enumerate(losses) if number % 5 != 4]
    return sum(classification) / len(classification) + sum(regression) / len(regression) / variance


# --- lazy penalties -------------------------------------------------------------------------------------------------


class LazyGradientPenalty(Classifier):
    """Every 16th step adds 16 times the squared norm of the gradient at the inputs (lazy R1)."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, labels = batch
        if batch_idx % 16 != 15:
            return cross_entropy(self.net(inputs), labels)
        inputs = inputs.clone().requires_grad_()
        logits = self.net(inputs)
        (slopes,) = torch.autograd.grad(logits.logsumexp(1).sum(), inputs, create_graph=True)
        return cross_entropy(logits, labels) + 16 * 0.3 * (slopes**2).sum(1).mean()


class LazyPathLength(HealthyModule):
    """A generator fits a fixed map; every 16th step adds a path-length penalty towards its running mean."""

    mean_length: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 64, 64, 24)
        self.register_buffer("mean_length", torch.zeros(()))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        hidden, targets = batch
        error = mse_loss(self.net(hidden), targets)
        if batch_idx % 16 != 15:
            return error
        hidden = hidden.clone().requires_grad_()
        noise = torch.randn(len(hidden), 24) / 24**0.5
        (slopes,) = torch.autograd.grad((self.net(hidden) * noise).sum(), hidden, create_graph=True)
        lengths = (slopes**2).sum(1).sqrt()
        self.mean_length.lerp_(lengths.detach().mean(), 0.1)
        return error + 16 * 2.0 * ((lengths - self.mean_length) ** 2).mean()


_MAP = teacher(62, 4, 32, 24)


def map_batches(seed: int, steps: int) -> list[Batch]:
    generator, batches = dice(seed), []
    for _ in range(steps):
        hidden = torch.randn(64, 4, generator=generator)
        batches.append((hidden, _MAP(hidden) + 0.1 * torch.randn(64, 24, generator=generator)))
    return batches


def map_error(module: LazyPathLength) -> float:
    hidden, targets = (torch.cat(column) for column in zip(*map_batches(HELD_OUT_SEED, 64), strict=True))
    return float(mse_loss(module.net(hidden), targets))


# --- an auxiliary loss once in a while ------------------------------------------------------------------------------


class RareAuxiliary(Classifier):
    """Every 64th batch also decorrelates the hidden features, with a weight that makes it the larger loss."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, labels = batch
        loss = cross_entropy(self.net(inputs), labels)
        if batch_idx % 64 != 63:
            return loss
        features = self.net[:3](inputs)
        normal = (features - features.mean(0)) / (features.std(0) + 1e-3)
        return loss + 0.02 * ((normal.T @ normal / len(inputs) - torch.eye(64)) ** 2).sum()


# --- a physics-informed loss ----------------------------------------------------------------------------------------


def collocation_points(seed: int, steps: int) -> list[Tensor]:
    generator = dice(seed)
    return [torch.rand(128, 1, generator=generator) for _ in range(steps)]


class Poisson(HealthyModule):
    """u'' = f on [0, 1] with u = 0 at the ends and solution sin(3 pi x) + x (1 - x); residuals span six decades."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 1))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        points = batch.clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.net(points).sum(), points, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), points, create_graph=True)
        pulse = 3 * torch.pi
        residual = curvature + pulse**2 * (pulse * points.detach()).sin() + 2
        return (residual**2).mean() + 500 * (self.net(torch.tensor([[0.0], [1.0]])) ** 2).mean()


def solution_error(module: Poisson) -> float:
    points = torch.linspace(0, 1, 1001)[:, None]
    truth = (3 * torch.pi * points).sin() + points * (1 - points)
    return float((module.net(points) - truth).norm() / truth.norm())


# --- sums over sequences of any length ------------------------------------------------------------------------------

SYMBOLS = 24
_FOLLOWERS = (2.5 * torch.randn(SYMBOLS, SYMBOLS, generator=dice(63))).softmax(1)


def ragged_batches(seed: int, steps: int) -> list[Tensor]:
    """Markov chains (8, length) with log-normal lengths from 4 to 400, the longest of a batch deciding."""
    generator, batches = dice(seed), []
    for _ in range(steps):
        length = int(torch.empty(()).log_normal_(3.3, 1.0, generator=generator).clamp(4, 400))
        tokens = [torch.randint(SYMBOLS, (8,), generator=generator)]
        uniform = torch.rand(length, 8, 1, generator=generator)
        for place in range(1, length):
            tokens.append((_CUMULATIVE[tokens[-1]] < uniform[place]).sum(1).clamp(max=SYMBOLS - 1))
        batches.append(torch.stack(tokens, 1))
    return batches


_CUMULATIVE = _FOLLOWERS.cumsum(1)


class SumOfTokens(HealthyModule):
    """A bigram model whose loss is the sum over all tokens of a batch: it varies by a factor of 100."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.net = nn.Embedding(SYMBOLS, 16), mlp(16, 64, SYMBOLS)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self.net(self.embedding(batch[:, :-1]))
        return cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="sum")


def bigram_cross_entropy(module: SumOfTokens) -> float:
    batches = ragged_batches(HELD_OUT_SEED, 40)
    total = sum(float(module.training_step(batch, 0)) for batch in batches)
    return total / sum(batch[:, 1:].numel() for batch in batches)


KINDS = [
    Kind(
        "a task every fifth batch",
        "every fifth loss is tens of times as large",
        TwoTasks,
        two_tasks,
        loss_of_both_tasks,
        "loss of both tasks",
        steps=1000,
        lion_lr=2e-3,
        adamw_lr=5e-3,
    ),
    Kind(
        "lazy gradient penalty",
        "every 16th loss and gradient are several times as large",
        LazyGradientPenalty,
        labelled_batches,
        test_cross_entropy,
        "cross entropy",
    ),
    Kind(
        "lazy path length",
        "every 16th gradient is many times as large",
        LazyPathLength,
        map_batches,
        map_error,
        "squared error",
    ),
    Kind(
        "rare auxiliary loss",
        "every 64th loss and gradient are far out of line",
        RareAuxiliary,
        labelled_batches,
        test_cross_entropy,
        "cross entropy",
    ),
    Kind(
        "physics-informed",
        "the loss spans six decades and has spikes",
        Poisson,
        collocation_points,
        solution_error,
        "relative error",
        steps=800,
        lion_lr=1e-3,
        adamw_lr=5e-3,
    ),
    Kind(
        "sums over ragged sequences",
        "loss and gradient norm have log-normal tails",
        SumOfTokens,
        ragged_batches,
        bigram_cross_entropy,
        "cross entropy",
        steps=500,
    ),
]
