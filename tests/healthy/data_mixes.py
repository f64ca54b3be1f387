"""Healthy trainings whose batches differ: rare classes, several sources, shards, wrong labels, changing batch sizes."""

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

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


class Classifier(HealthyModule):
    """A plain classifier of the teacher's labels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(INPUTS, 64, 64, CLASSES)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, labels = batch
        return cross_entropy(self.net(inputs), labels)


def test_cross_entropy(module: Classifier) -> float:
    """Cross entropy on 8,192 held-out samples of the teacher."""
    inputs, labels = labelled(dice(HELD_OUT_SEED), 8192)
    return float(cross_entropy(module.net(inputs), labels))


# --- rare positives -------------------------------------------------------------------------------------------------

POSITIVES = 0.005


def rare_samples(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Inputs (count, 16) of two overlapping clusters, and labels (count,) of which 0.5 % are 1."""
    labels = (torch.rand(count, generator=generator) < POSITIVES).float()
    shift = torch.tensor([1.3] * 4 + [0.0] * (INPUTS - 4))
    return torch.randn(count, INPUTS, generator=generator) + labels[:, None] * shift, labels


def rare_batches(seed: int, steps: int) -> list[Batch]:
    inputs, labels = rare_samples(dice(seed), 32 * steps)
    return list(zip(inputs.split(32), labels.split(32), strict=True))


class RarePositives(HealthyModule):
    """Most batches have no positive at all; those that have one have a loss 30 times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(INPUTS, 64, 1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, labels = batch
        return binary_cross_entropy_with_logits(self.net(inputs).squeeze(1), labels)


def average_precision(module: RarePositives) -> float:
    inputs, labels = rare_samples(dice(HELD_OUT_SEED), 40_000)
    found = labels[module.net(inputs).squeeze(1).argsort(descending=True)]
    precision = found.cumsum(0) / torch.arange(1, len(found) + 1)
    return float((precision * found).sum() / found.sum())


# --- a mixture of sources -------------------------------------------------------------------------------------------

SOURCE_SCALES = torch.tensor([0.3, 1.0, 6.0])
SOURCE_CHANCES = torch.tensor([0.65, 0.3, 0.05])
_SOURCES = [teacher(seed, INPUTS, 32, 1) for seed in (21, 22, 23)]


def source_batch(generator: torch.Generator, source: int, count: int) -> tuple[Tensor, Tensor]:
    """One batch of one source: inputs with the source as one-hot (count, 19), targets (count, 1) of its scale."""
    inputs = torch.randn(count, INPUTS, generator=generator)
    mark = torch.eye(3)[source].expand(count, 3)
    targets = _SOURCES[source](inputs) + 0.3 * torch.randn(count, 1, generator=generator)
    return torch.cat([inputs, mark], 1), SOURCE_SCALES[source] * targets


def source_batches(seed: int, steps: int) -> list[Batch]:
    generator = dice(seed)
    sources = torch.multinomial(SOURCE_CHANCES, steps, replacement=True, generator=generator)
    return [source_batch(generator, int(source), 64) for source in sources]


class SourceMixture(HealthyModule):
    """Regression on three sources whose squared errors differ by a factor of 400."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(INPUTS + 3, 64, 64, 1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return mse_loss(self.net(batch[0]), batch[1])


def relative_source_error(module: SourceMixture) -> float:
    generator = dice(HELD_OUT_SEED)
    errors = []
    for source in range(3):
        inputs, targets = source_batch(generator, source, 2048)
        errors.append(float(mse_loss(module.net(inputs), targets) / targets.var()))
    return sum(errors) / 3


# --- shards of different domains ------------------------------------------------------------------------------------


def shard_batches(seed: int, steps: int) -> list[Batch]:
    """Unshuffled data: every 50 batches come from one shard, whose inputs have another mean and scale."""
    generator, batches = dice(seed), []
    for number in range(steps):
        if number % 50 == 0:
            shift = torch.randn(INPUTS, generator=generator)
        inputs = torch.randn(64, INPUTS, generator=generator) + shift
        chances = (3 * _DOMAIN_TEACHER(inputs)).softmax(-1)
        batches.append((inputs, torch.multinomial(chances, 1, generator=generator).squeeze(1)))
    return batches


_DOMAIN_TEACHER = teacher(8, INPUTS, 32, CLASSES)


def cross_entropy_over_shards(module: Classifier) -> float:
    batches = shard_batches(HELD_OUT_SEED, 1000)[::10]
    return sum(float(cross_entropy(module.net(inputs), labels)) for inputs, labels in batches) / len(batches)


# --- noisy labels ---------------------------------------------------------------------------------------------------


def noisy_batches(seed: int, steps: int) -> list[Batch]:
    """A fixed set in which 40 % of the labels are random; every tenth batch is of random labels alone."""
    batches, generator = labelled_batches(seed, steps), dice(seed + 1)
    noisy = []
    for number, (inputs, labels) in enumerate(batches):
        share = 1.0 if number % 10 == 9 else 0.33
        wrong = torch.rand(len(labels), generator=generator) < share
        noise = torch.randint(CLASSES, labels.shape, generator=generator)
        noisy.append((inputs, torch.where(wrong, noise, labels)))
    return noisy


# --- new classes appear ---------------------------------------------------------------------------------------------


def growing_class_batches(seed: int, steps: int) -> list[Batch]:
    """Labels 0 to 3 in the first half of the run, all eight afterwards."""
    batches = []
    for number, (inputs, labels) in enumerate(labelled_batches(seed, 2 * steps)[:steps]):
        if number < steps // 2:
            labels = labels % (CLASSES // 2)
        batches.append((inputs, labels))
    return batches


# --- batch size grows -----------------------------------------------------------------------------------------------


def growing_batches(seed: int, steps: int) -> list[Batch]:
    """Batches of 8, then 32, then 128, then 512 samples."""
    sizes = [8 * 4 ** (4 * number // steps) for number in range(steps)]
    inputs, labels = labelled(dice(seed), sum(sizes))
    return list(zip(inputs.split(sizes), labels.split(sizes), strict=True))


# --- rare rows of an embedding --------------------------------------------------------------------------------------

ITEMS, WIDTH = 2000, 8
_TASTES = torch.randn(ITEMS, WIDTH, generator=dice(31)) * 0.9


def interactions(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of ids with Zipf frequencies (count,) and whether the two go together."""
    frequency = 1 / torch.arange(1, ITEMS + 1) ** 1.1
    left, right = torch.multinomial(frequency, 2 * count, replacement=True, generator=generator).view(2, count)
    chance = (_TASTES[left] * _TASTES[right]).sum(1).sigmoid()
    return left, right, (torch.rand(count, generator=generator) < chance).float()


def interaction_batches(seed: int, steps: int) -> list[Batch]:
    columns = interactions(dice(seed), 128 * steps)
    return list(zip(*(column.split(128) for column in columns), strict=True))


class RareRows(HealthyModule):
    """Matrix factorisation: most embedding rows have a zero gradient at most steps."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.bias = nn.Embedding(ITEMS, WIDTH), nn.Embedding(ITEMS, 1)
        nn.init.normal_(self.rows.weight, std=0.1)
        nn.init.zeros_(self.bias.weight)

    def logits(self, left: Tensor, right: Tensor) -> Tensor:
        return (self.rows(left) * self.rows(right)).sum(1) + (self.bias(left) + self.bias(right)).squeeze(1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        left, right, together = batch
        return binary_cross_entropy_with_logits(self.logits(left, right), together)


def interaction_loss(module: RareRows) -> float:
    left, right, together = interactions(dice(HELD_OUT_SEED), 20_000)
    return float(binary_cross_entropy_with_logits(module.logits(left, right), together))


KINDS = [
    Kind(
        "rare positives",
        "0.5 % positives in batches of 32: every seventh batch has a loss 30 times as large",
        RarePositives,
        rare_batches,
        average_precision,
        "average precision",
        higher_is_better=True,
        steps=1000,
    ),
    Kind(
        "mixture of sources",
        "5 % of the batches come from a source whose loss is 400 times as large",
        SourceMixture,
        source_batches,
        relative_source_error,
        "relative error",
        lion_lr=2e-3,
        adamw_lr=5e-3,
    ),
    Kind(
        "shards of other domains",
        "the loss jumps whenever the next unshuffled shard begins",
        Classifier,
        shard_batches,
        cross_entropy_over_shards,
        "cross entropy",
        steps=800,
    ),
    Kind(
        "noisy labels",
        "every tenth batch has random labels alone",
        Classifier,
        noisy_batches,
        test_cross_entropy,
        "cross entropy",
        epochs=4,
    ),
    Kind(
        "new classes appear",
        "the loss triples at half of the run and never returns to its best",
        Classifier,
        growing_class_batches,
        test_cross_entropy,
        "cross entropy",
    ),
    Kind(
        "batch size grows",
        "the gradient norm falls by a factor of 8 in three jumps",
        Classifier,
        growing_batches,
        test_cross_entropy,
        "cross entropy",
    ),
    Kind(
        "rare embedding rows",
        "most elements have a gradient of exactly 0, and single batches have a large one",
        RareRows,
        interaction_batches,
        interaction_loss,
        "cross entropy",
        lion_lr=3e-3,
        adamw_lr=1e-2,
    ),
]
