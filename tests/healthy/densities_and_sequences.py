"""Healthy trainings with unusual losses: negative ones, heavy tails, noise of all scales, recurrent networks."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from tests.healthy.kind import HELD_OUT_SEED, INPUTS, Batch, HealthyModule, Kind, dice, mlp, teacher
from tests.healthy.moving_targets import ring_batches, ring_samples

# --- heavy tails ----------------------------------------------------------------------------------------------------

_SIGNAL = teacher(91, INPUTS, 32, 1)


def heavy_tailed_batches(seed: int, steps: int) -> list[Batch]:
    """Targets with noise of a Student distribution with two degrees of freedom: its variance is infinite."""
    generator, batches = dice(seed), []
    for _ in range(steps):
        inputs = torch.randn(64, INPUTS, generator=generator)
        normal = torch.randn(64, 3, generator=generator)
        noise = normal[:, :1] / (normal[:, 1:] ** 2).mean(1, keepdim=True).sqrt()
        batches.append((inputs, _SIGNAL(inputs) + 0.5 * noise))
    return batches


class HeavyTailed(HealthyModule):
    """Squared error under heavy-tailed noise: losses and gradients have no typical size."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(INPUTS, 64, 64, 1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return mse_loss(self.net(batch[0]), batch[1])


def signal_error(module: HeavyTailed) -> float:
    """Squared error against the signal without noise, over its variance."""
    inputs = torch.randn(8192, INPUTS, generator=dice(HELD_OUT_SEED))
    truth = _SIGNAL(inputs)
    return float(mse_loss(module.net(inputs), truth) / truth.var())


def claim_batches(seed: int, steps: int) -> list[Batch]:
    """Counts of a Poisson process whose rate is log-normal: mostly 0, at times hundreds."""
    generator, batches = dice(seed), []
    for _ in range(steps):
        inputs = torch.randn(64, INPUTS, generator=generator)
        rate = (1.5 * _SIGNAL(inputs) - 1).clamp(max=6).exp()
        batches.append((inputs, torch.poisson(rate, generator=generator)))
    return batches


class Counts(HealthyModule):
    """Poisson regression with an exponential link: single batches have gradients 30 times as large as others."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(INPUTS, 64, 64, 1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return nn.functional.poisson_nll_loss(self.net(batch[0]).clamp(max=8), batch[1])


def count_loss(module: Counts) -> float:
    """Mean deviance: twice the log-likelihood that is missing."""
    inputs, counts = (torch.cat(column) for column in zip(*claim_batches(HELD_OUT_SEED, 128), strict=True))
    logs = module.net(inputs).clamp(max=8)
    best = torch.xlogy(counts, counts) - counts
    return float(2 * (best - counts * logs + logs.exp()).mean())


# --- negative losses ------------------------------------------------------------------------------------------------


def thin_batches(seed: int, steps: int) -> list[Tensor]:
    """Points (128, 4) near a curved surface of dimension 2."""
    generator, batches = dice(seed), []
    for _ in range(steps):
        flat = torch.randn(128, 2, generator=generator)
        lift = torch.stack([flat[:, 0] ** 2 - 1, (2 * flat[:, 1]).sin() + flat[:, 0]], 1)
        batches.append(torch.cat([flat, lift + 0.05 * torch.randn(128, 2, generator=generator)], 1))
    return batches


class Flow(HealthyModule):
    """A coupling flow: its loss, a negative log-likelihood, passes through 0 and ends far below."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(mlp(2, 64, 4) for _ in range(6))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        first, second = batch.chunk(2, 1)
        volume = torch.zeros(len(batch))
        for block in self.blocks:
            scale, shift = block(first).chunk(2, 1)
            scale = 2 * scale.tanh()
            first, second = (second + shift) * scale.exp(), first
            volume = volume + scale.sum(1)
        return (0.5 * (first**2 + second**2).sum(1) - volume).mean()


def negative_log_likelihood(module: Flow) -> float:
    return sum(float(module.training_step(batch, 0)) for batch in thin_batches(HELD_OUT_SEED, 64)) / 64


def spread_batches(seed: int, steps: int) -> list[Batch]:
    """Targets (64, 1) whose noise depends on the input, from 0.01 to 1."""
    generator, batches = dice(seed), []
    for _ in range(steps):
        inputs = torch.randn(64, INPUTS, generator=generator)
        noise = torch.randn(64, 1, generator=generator) * (inputs[:, :1] * 1.2 - 2).clamp(-4.6, 0).exp()
        batches.append((inputs, 0.3 * _SIGNAL(inputs) + noise))
    return batches


class Heteroscedastic(HealthyModule):
    """Mean and deviation of a Gaussian: the loss becomes negative, and a target that was thought sure costs much."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(INPUTS, 64, 64, 2)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        mean, log_scale = self.net(batch[0]).chunk(2, 1)
        log_scale = log_scale.clamp(-5, 3)
        return (0.5 * ((batch[1] - mean) / log_scale.exp()) ** 2 + log_scale).mean()


def gaussian_loss(module: Heteroscedastic) -> float:
    return sum(float(module.training_step(batch, 0)) for batch in spread_batches(HELD_OUT_SEED, 128)) / 128


# --- score matching -------------------------------------------------------------------------------------------------


class Score(HealthyModule):
    """Denoising score matching, one noise scale a batch: losses differ by a factor of 10,000 from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3, 64, 64, 2)

    def error(self, points: Tensor, scale: Tensor) -> Tensor:
        """Squared error (count,) of the predicted noise."""
        noise = torch.randn_like(points)
        level = scale.log().expand(len(points), 1)
        return ((self.net(torch.cat([points + scale * noise, level], 1)) - noise) ** 2).sum(1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        scale = torch.exp(torch.empty(()).uniform_(-3.5, 1.1))
        return (self.error(batch, scale) / scale**2).mean()


def denoising_error(module: Score) -> float:
    points = ring_samples(dice(HELD_OUT_SEED), 4096)
    scales = torch.tensor([0.03, 0.1, 0.3, 1.0, 3.0])
    return sum(float(module.error(points, scale).mean()) for scale in scales) / len(scales)


# --- recurrent networks ---------------------------------------------------------------------------------------------


def adding_batches(seed: int, steps: int) -> list[Batch]:
    """The adding problem: sequences (32, 16, 2) of numbers and two marks, targets (32, 1) the sum of the marked."""
    generator, batches = dice(seed), []
    for _ in range(steps):
        numbers = torch.rand(32, 16, generator=generator)
        marks = torch.zeros(32, 16)
        for half in (0, 8):
            marks.scatter_(1, torch.randint(half, half + 8, (32, 1), generator=generator), 1.0)
        batches.append((torch.stack([numbers, marks], 2), (numbers * marks).sum(1, keepdim=True)))
    return batches


class Adding(HealthyModule):
    """A GRU over 16 steps, with the Trainer clipping its gradients: a long plateau, then a sudden fall with spikes."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.last = nn.GRU(2, 32, batch_first=True), nn.Linear(32, 1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return mse_loss(self.last(self.net(batch[0])[0][:, -1]), batch[1])


def adding_error(module: Adding) -> float:
    return sum(float(module.training_step(batch, 0)) for batch in adding_batches(HELD_OUT_SEED, 32)) / 32


def scheduled_batches(seed: int, steps: int) -> list[Tensor]:
    """Rows (64, 12) of values of a noisy oscillator."""
    generator, batches = dice(seed), []
    for _ in range(steps):
        phase, pace = 6.3 * torch.rand(64, 1, generator=generator), 0.3 + torch.rand(64, 1, generator=generator)
        times = torch.arange(12)
        batches.append((phase + pace * times).sin() + 0.05 * torch.randn(64, 12, generator=generator))
    return batches


class ScheduledSampling(HealthyModule):
    """A recurrent forecaster that is fed its own predictions ever more often: its loss rises through the run."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last = nn.GRUCell(1, 32), nn.Linear(32, 1)

    def forecast_error(self, batch: Tensor, own: float) -> Tensor:
        hidden, value, error = torch.zeros(len(batch), 32), batch[:, :1], torch.zeros(())
        for place in range(1, batch.shape[1]):
            hidden = self.cell(value, hidden)
            forecast = self.last(hidden)
            error = error + mse_loss(forecast, batch[:, place : place + 1])
            free = place >= 4 and float(torch.rand(())) < own
            value = forecast if free else batch[:, place : place + 1]
        return error / (batch.shape[1] - 1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.forecast_error(batch, own=max(0.0, 1.5 * self.progress - 0.5))


def free_running_error(module: ScheduledSampling) -> float:
    return sum(float(module.forecast_error(batch, own=1.0)) for batch in scheduled_batches(HELD_OUT_SEED, 32)) / 32


class Attention(HealthyModule):
    """A small transformer block that finds a marked token: nothing for hundreds of steps, then a sudden fall."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(16, 32), nn.Parameter(0.02 * torch.randn(9, 32))
        self.block = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.last = nn.Linear(32, 16)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        tokens, answers = batch
        return cross_entropy(self.last(self.block(self.embedding(tokens) + self.places)[:, -1]), answers)


def lookup_batches(seed: int, steps: int) -> list[Batch]:
    """Tokens (64, 9): four pairs of key and value and then a key; answers (64,) are its value."""
    generator, batches = dice(seed), []
    for _ in range(steps):
        keys = torch.rand(64, 16, generator=generator).argsort(1)[:, :4]
        values = torch.randint(16, (64, 4), generator=generator)
        asked = torch.randint(4, (64, 1), generator=generator)
        pairs = torch.stack([keys, values], 2).flatten(1)
        batches.append((torch.cat([pairs, keys.gather(1, asked)], 1), values.gather(1, asked).squeeze(1)))
    return batches


def lookup_loss(module: Attention) -> float:
    return sum(float(module.training_step(batch, 0)) for batch in lookup_batches(HELD_OUT_SEED, 32)) / 32


KINDS = [
    Kind(
        "heavy-tailed noise",
        "losses of infinite variance",
        HeavyTailed,
        heavy_tailed_batches,
        signal_error,
        "relative error",
        steps=700,
    ),
    Kind(
        "counts with a log link",
        "single batches have gradients 30 times as large",
        Counts,
        claim_batches,
        count_loss,
        "deviance",
        steps=700,
    ),
    Kind(
        "normalising flow",
        "the loss passes through 0 and becomes negative, with spikes",
        Flow,
        thin_batches,
        negative_log_likelihood,
        "negative log-likelihood",
        lion_lr=1e-3,
        adamw_lr=5e-3,
    ),
    Kind(
        "heteroscedastic regression",
        "the loss becomes negative, with large losses at times",
        Heteroscedastic,
        spread_batches,
        gaussian_loss,
        "negative log-likelihood",
        steps=700,
    ),
    Kind(
        "score matching",
        "losses and gradients of neighbouring batches differ by a factor of 10,000",
        Score,
        ring_batches,
        denoising_error,
        "error",
        steps=700,
        lion_lr=1e-3,
        adamw_lr=5e-3,
    ),
    Kind(
        "recurrent, long sequences",
        "a plateau, then a sudden fall with spikes of the gradient",
        Adding,
        adding_batches,
        adding_error,
        "squared error",
        steps=400,
        lion_lr=1e-3,
        adamw_lr=5e-3,
        trainer={"gradient_clip_val": 1.0},
    ),
    Kind(
        "scheduled sampling",
        "the loss rises as the model is fed its own predictions",
        ScheduledSampling,
        scheduled_batches,
        free_running_error,
        "squared error",
        steps=400,
    ),
    Kind(
        "attention that learns late",
        "a plateau, then a sudden fall with large gradients",
        Attention,
        lookup_batches,
        lookup_loss,
        "cross entropy",
        steps=700,
        lion_lr=1e-3,
        adamw_lr=3e-3,
    ),
]
