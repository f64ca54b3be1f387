"""Healthy trainings whose target moves: adversaries, bootstrapped values, queues, teachers, mined negatives."""

import copy
from typing import cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, normalize, softplus

from tests.healthy.data_mixes import Classifier, test_cross_entropy
from tests.healthy.kind import (
    CLASSIFICATION_TEACHER,
    HELD_OUT_SEED,
    INPUTS,
    Batch,
    HealthyModule,
    Kind,
    constant,
    dice,
    labelled,
    labelled_batches,
    mlp,
)

# --- two kinds of GAN -----------------------------------------------------------------------------------------------


def ring_samples(generator: torch.Generator, count: int) -> Tensor:
    """Points (count, 2) of eight Gaussians on a ring of radius 2."""
    angle = torch.randint(8, (count,), generator=generator) * (torch.pi / 4)
    return 2 * torch.stack([angle.cos(), angle.sin()], 1) + 0.15 * torch.randn(count, 2, generator=generator)


def ring_batches(seed: int, steps: int) -> list[Tensor]:
    return list(ring_samples(dice(seed), 128 * steps).split(128))


class AutomaticGAN(HealthyModule):
    """One optimizer over both networks: the critic's batch, then the generator's, with its larger, rising loss."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = mlp(8, 64, 64, 2), mlp(2, 64, 64, 1)

    def samples(self, count: int) -> Tensor:
        return self.generator(torch.randn(count, 8))

    def critic_loss(self, real: Tensor) -> Tensor:
        return (softplus(-self.critic(real)) + softplus(self.critic(self.samples(len(real)).detach()))).mean()

    def generator_loss(self, count: int) -> Tensor:
        return softplus(-self.critic(self.samples(count))).mean()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        turn = batch_idx % 2
        self.critic.requires_grad_(turn == 0)
        return self.critic_loss(batch) if turn == 0 else self.generator_loss(len(batch))


class ManualGAN(AutomaticGAN):
    """Two optimizers, stepped by the module; every 16th step of the critic has a lazy R1 penalty."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        critic_optimizer, generator_optimizer = cast(list[LightningOptimizer], self.optimizers())
        loss = self.critic_loss(batch)
        if batch_idx % 16 == 15:
            real = batch.clone().requires_grad_()
            (slopes,) = torch.autograd.grad(self.critic(real).sum(), real, create_graph=True)
            loss = loss + 16 * 0.05 * (slopes**2).sum(1).mean()
        self.toggle_optimizer(critic_optimizer)
        critic_optimizer.zero_grad()
        self.manual_backward(loss)
        critic_optimizer.step()
        self.untoggle_optimizer(critic_optimizer)
        self.toggle_optimizer(generator_optimizer)
        generator_optimizer.zero_grad()
        self.manual_backward(self.generator_loss(len(batch)))
        generator_optimizer.step()
        self.untoggle_optimizer(generator_optimizer)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return [self.make_optimizer(self.critic.parameters()), self.make_optimizer(self.generator.parameters())]


def sliced_distance(samples: Tensor) -> float:
    """Sliced Wasserstein distance of samples (count, 2) to the ring."""
    real = ring_samples(dice(HELD_OUT_SEED), len(samples))
    angles = torch.arange(32) * (torch.pi / 32)
    directions = torch.stack([angles.cos(), angles.sin()])
    return float(((samples @ directions).sort(0).values - (real @ directions).sort(0).values).abs().mean())


def gan_distance(module: AutomaticGAN) -> float:
    return sliced_distance(module.samples(8192))


# --- an energy-based model ------------------------------------------------------------------------------------------


class Energy(HealthyModule):
    """Contrastive divergence: the loss is a difference of energies, about 0 and of either sign."""

    chains: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
        self.register_buffer("chains", torch.empty(512, 2).uniform_(-3, 3))

    def langevin(self, points: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            with torch.enable_grad():
                points = points.detach().requires_grad_()
                (slopes,) = torch.autograd.grad(self.net(points).sum(), points)
            points = (points - 0.02 * slopes.clamp(-5, 5) + 0.2 * torch.randn_like(points)).detach()
        return points.clamp(-4, 4)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        chosen = torch.randint(512, (len(batch),))
        negatives = self.langevin(self.chains[chosen], 8)
        self.chains[chosen] = negatives
        positive, negative = self.net(batch), self.net(negatives)
        return (positive - negative).mean() + 0.02 * (positive**2 + negative**2).mean()


def energy_distance(module: Energy) -> float:
    return sliced_distance(module.langevin(torch.empty(2048, 2).uniform_(-3, 3), 300))


# --- reinforcement learning -----------------------------------------------------------------------------------------


class CartPole:
    """The classic cart with a pole, many at once; an episode ends when the pole falls or after `limit` steps."""

    def __init__(self, count: int, limit: int = 200) -> None:
        self.state, self.age, self.limit = torch.empty(count, 4).uniform_(-0.05, 0.05), torch.zeros(count), limit

    def step(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Takes actions (count,) of 0 and 1; returns rewards (count,) and which episodes have ended (count,)."""
        _, speed, angle, spin = self.state.unbind(1)
        force = 20.0 * action - 10.0
        sine, cosine = angle.sin(), angle.cos()
        shared = (force + 0.05 * spin**2 * sine) / 1.1
        twist = (9.8 * sine - cosine * shared) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
        push = shared - 0.05 * twist * cosine / 1.1
        changes = torch.stack([speed, push, spin, twist], 1)
        self.state = self.state + 0.02 * changes
        self.age += 1
        ended = (self.state[:, 0].abs() > 2.4) | (self.state[:, 2].abs() > 0.2095) | (self.age >= self.limit)
        if ended.any():
            self.state = torch.where(ended[:, None], torch.empty_like(self.state).uniform_(-0.05, 0.05), self.state)
            self.age = torch.where(ended, 0.0, self.age)
        return torch.ones(len(action)), ended


class ActorCritic(HealthyModule):
    """Advantage actor-critic on 16 cart-poles, 8 steps each: the value loss rises as episodes become longer."""

    def __init__(self) -> None:
        super().__init__()
        self.actor, self.critic, self.world = mlp(4, 64, 2), mlp(4, 64, 1), CartPole(16)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        states, actions, rewards, ends = [], [], [], []
        with torch.no_grad():
            for _ in range(8):
                states.append(self.world.state)
                actions.append(torch.multinomial(self.actor(self.world.state).softmax(1), 1).squeeze(1))
                reward, ended = self.world.step(actions[-1])
                rewards.append(reward)
                ends.append(ended.float())
            value = self.critic(self.world.state).squeeze(1)
            returns: list[Tensor] = []
            for reward, end in zip(rewards[::-1], ends[::-1], strict=True):
                value = reward + 0.98 * value * (1 - end)
                returns.append(value)
        seen, goal = torch.cat(states), torch.cat(returns[::-1])
        values = self.critic(seen).squeeze(1)
        logs = self.actor(seen).log_softmax(1)
        chosen = logs.gather(1, torch.cat(actions)[:, None]).squeeze(1)
        entropy = -(logs.exp() * logs).sum(1).mean()
        return -(chosen * (goal - values).detach()).mean() + 0.5 * mse_loss(values, goal) - 0.01 * entropy


def episode_length(module: ActorCritic) -> float:
    """Mean steps of 128 episodes of the learned policy, at most 200."""
    world, alive, total = CartPole(128, limit=201), torch.ones(128), torch.zeros(128)
    for _ in range(200):
        _, ended = world.step(torch.multinomial(module.actor(world.state).softmax(1), 1).squeeze(1))
        total += alive
        alive = alive * (1 - ended.float())
    return float(total.mean())


def ticks(seed: int, steps: int) -> list[Tensor]:
    """Batches for a module that makes its own data: the numbers of the steps."""
    return [torch.full((16,), number) for number in range(steps)]


STATES, ACTIONS, DISCOUNT = 60, 4, 0.8
_FEATURES = torch.randn(STATES, 24, generator=dice(71))
_MOVES = (4 * torch.randn(STATES, ACTIONS, STATES, generator=dice(72))).softmax(2)
_REWARDS = torch.randn(STATES, ACTIONS, generator=dice(73))


def _optimal_values() -> Tensor:
    values = torch.zeros(STATES, ACTIONS)
    for _ in range(400):
        values = _REWARDS + DISCOUNT * _MOVES @ values.max(1).values
    return values


def transitions(seed: int, steps: int) -> list[Batch]:
    generator = dice(seed)
    state = torch.randint(STATES, (64 * steps,), generator=generator)
    action = torch.randint(ACTIONS, (64 * steps,), generator=generator)
    following = torch.multinomial(_MOVES[state, action], 1, generator=generator).squeeze(1)
    return list(zip(*(column.split(64) for column in (state, action, following)), strict=True))


class QLearning(HealthyModule):
    """Q-learning with a target network that is copied every 40 steps: the loss jumps at each copy, values grow."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(24, 64, ACTIONS)
        self.target = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        state, action, following = batch
        if batch_idx % 40 == 0:
            self.target.load_state_dict(self.net.state_dict())
        values = self.net(_FEATURES[state]).gather(1, action[:, None]).squeeze(1)
        goal = _REWARDS[state, action] + DISCOUNT * self.target(_FEATURES[following]).max(1).values
        return mse_loss(values, goal)


def value_error(module: QLearning) -> float:
    truth = _optimal_values()
    return float((module.net(_FEATURES) - truth).norm() / (truth - truth.mean()).norm())


# --- contrastive learning -------------------------------------------------------------------------------------------

_CENTERS = 1.2 * torch.randn(40, INPUTS, generator=dice(74))


def cluster_samples(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Two views (count, 2, 16) of samples from 40 clusters, and the clusters (count,)."""
    cluster = torch.randint(len(_CENTERS), (count,), generator=generator)
    sample = _CENTERS[cluster] + 0.7 * torch.randn(count, INPUTS, generator=generator)
    return sample[:, None] + 0.7 * torch.randn(count, 2, INPUTS, generator=generator), cluster


def cluster_batches(seed: int, steps: int) -> list[Batch]:
    views, clusters = cluster_samples(dice(seed), 64 * steps)
    return list(zip(views.split(64), clusters.split(64), strict=True))


class MomentumContrast(HealthyModule):
    """MoCo with a queue that fills in the first half: with each batch there are more negatives and a larger loss."""

    queue: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encoder = mlp(INPUTS, 64, 16)
        self.momentum_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.register_buffer("queue", torch.empty(0, 16))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        first, second = batch[0].unbind(1)
        query = normalize(self.encoder(first))
        with torch.no_grad():
            for slow, fast in zip(self.momentum_encoder.parameters(), self.encoder.parameters(), strict=True):
                slow.lerp_(fast, 0.02)
            key = normalize(self.momentum_encoder(second))
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ self.queue.T], 1) / 0.2
        if batch_idx % 8 == 0:
            self.queue = torch.cat([key, self.queue])[:2048]
        return cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64))


class MinedTriplets(HealthyModule):
    """Metric learning with random negatives, then with the hardest of each batch: the loss is several times as high."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = mlp(INPUTS, 64, 16)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        views, clusters = batch
        anchor, positive = normalize(self.encoder(views), dim=2).unbind(1)
        distances = torch.cdist(anchor, positive)
        strangers = clusters[:, None] != clusters[None]
        if self.progress < 0.4:
            chosen = torch.multinomial(strangers.float(), 1)
        else:
            chosen = torch.where(strangers, distances, torch.inf).argmin(1, keepdim=True)
        return (distances.diag() - distances.gather(1, chosen).squeeze(1) + 0.3).relu().mean()


def retrieval(module: MomentumContrast | MinedTriplets) -> float:
    """Share of held-out samples whose nearest neighbour belongs to their cluster."""
    views, clusters = cluster_samples(dice(HELD_OUT_SEED), 1500)
    embedded = normalize(module.encoder(views[:, 0]))
    near = (embedded @ embedded.T).fill_diagonal_(-2).argmax(1)
    return float((clusters[near] == clusters).float().mean())


# --- teachers -------------------------------------------------------------------------------------------------------


class MeanTeacher(Classifier):
    """8 labelled samples a batch and a consistency term towards an average of the weights, ramped up to weight 20."""

    def __init__(self) -> None:
        super().__init__()
        self.average = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, labels = batch
        with torch.no_grad():
            for slow, fast in zip(self.average.parameters(), self.net.parameters(), strict=True):
                slow.lerp_(fast, 0.02)
            goal = self.average(inputs + 0.3 * torch.randn_like(inputs)).softmax(1)
        logits = self.net(inputs + 0.3 * torch.randn_like(inputs))
        consistency = ((logits.softmax(1) - goal) ** 2).sum(1).mean()
        return cross_entropy(logits[:8], labels[:8]) + 20 * min(1.0, 2 * self.progress) * consistency


class Distillation(Classifier):
    """Cross entropy at first; then a term towards a teacher's logits at temperature 4 with the usual factor of 16."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, labels = batch
        logits = self.net(inputs)
        loss = cross_entropy(logits, labels)
        if self.progress < 0.3:
            return loss
        chances = (3 * CLASSIFICATION_TEACHER(inputs) / 4).softmax(1)
        return 0.1 * loss + 16 * cross_entropy(logits / 4, chances)


# --- attacks and mining ---------------------------------------------------------------------------------------------


class AdversarialTraining(Classifier):
    """Inputs are attacked (FGSM) from 40 % of the run on: the loss doubles at once."""

    def attacked(self, inputs: Tensor, labels: Tensor) -> Tensor:
        with torch.enable_grad():
            inputs = inputs.clone().requires_grad_()
            (slopes,) = torch.autograd.grad(cross_entropy(self.net(inputs), labels), inputs)
        return (inputs + 0.25 * slopes.sign()).detach()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, labels = batch
        if self.progress >= 0.4:
            inputs = self.attacked(inputs, labels)
        return cross_entropy(self.net(inputs), labels)


def attacked_cross_entropy(module: AdversarialTraining) -> float:
    inputs, labels = labelled(dice(HELD_OUT_SEED), 8192)
    return float(cross_entropy(module.net(module.attacked(inputs, labels)), labels))


class HardExamples(Classifier):
    """From half of the run on only the hardest quarter of a batch counts: the loss triples at once."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, labels = batch
        losses = cross_entropy(self.net(inputs), labels, reduction="none")
        return losses.mean() if self.progress < 0.5 else losses.topk(len(losses) // 4).values.mean()


def accuracy(module: Classifier) -> float:
    inputs, labels = labelled(dice(HELD_OUT_SEED), 8192)
    return float((module.net(inputs).argmax(1) == labels).float().mean())


KINDS = [
    Kind(
        "GAN, two optimizers",
        "the generator's loss rises, R1 comes every 16 steps, two losses behind one callback",
        ManualGAN,
        ring_batches,
        gan_distance,
        "distance",
        steps=700,
        lion_lr=3e-4,
        adamw_lr=1e-3,
        lion_betas=(0.5, 0.9),
    ),
    Kind(
        "GAN, alternating batches",
        "losses and gradients of two networks alternate, and the generator's loss rises",
        AutomaticGAN,
        ring_batches,
        gan_distance,
        "distance",
        steps=1200,
        lion_lr=3e-4,
        adamw_lr=1e-3,
        lion_betas=(0.5, 0.9),
    ),
    Kind(
        "energy-based model",
        "the loss is about 0 and of either sign",
        Energy,
        ring_batches,
        energy_distance,
        "distance",
        steps=300,
        lion_lr=3e-4,
        adamw_lr=1e-3,
    ),
    Kind(
        "actor-critic",
        "the loss grows with the return",
        ActorCritic,
        ticks,
        episode_length,
        "episode length",
        higher_is_better=True,
        steps=500,
        lion_lr=5e-4,
        adamw_lr=3e-3,
        schedule=constant,
    ),
    Kind(
        "Q-learning",
        "the loss jumps at each copy of the target network",
        QLearning,
        transitions,
        value_error,
        "value error",
        steps=800,
        adamw_lr=3e-3,
    ),
    Kind(
        "contrastive with a queue",
        "the loss rises while the queue fills",
        MomentumContrast,
        cluster_batches,
        retrieval,
        "retrieval",
        higher_is_better=True,
    ),
    Kind(
        "hard negatives",
        "the loss is several times as large once the hardest negatives are mined",
        MinedTriplets,
        cluster_batches,
        retrieval,
        "retrieval",
        higher_is_better=True,
    ),
    Kind(
        "mean teacher",
        "the loss rises with the weight of consistency",
        MeanTeacher,
        labelled_batches,
        test_cross_entropy,
        "cross entropy",
    ),
    Kind(
        "distillation",
        "the loss is ten times as large once the teacher is asked",
        Distillation,
        labelled_batches,
        test_cross_entropy,
        "cross entropy",
    ),
    Kind(
        "adversarial training",
        "the loss doubles when attacks begin",
        AdversarialTraining,
        labelled_batches,
        attacked_cross_entropy,
        "cross entropy under attack",
    ),
    Kind(
        "hard examples alone",
        "the loss triples at half of the run",
        HardExamples,
        labelled_batches,
        accuracy,
        "accuracy",
        higher_is_better=True,
    ),
]
