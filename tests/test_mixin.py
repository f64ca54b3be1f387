"""LionMixin in modules that are not ours."""

from functools import partial
from types import MethodType

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lion_lightning import Lion, LionMixin, from_adamw
from lion_lightning.hyperparams import linear, lion_amos, parameter_groups
from lion_lightning.optim.muon import MuonWithLion


class Regression(LightningModule):
    """Somebody's module: a linear map to be found again."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return nn.functional.mse_loss(self.net(inputs), targets)


class WithDefaults(LionMixin, Regression):
    pass


class WithAdamSettings(LionMixin, Regression):
    optimizer_factory = partial(Lion, **from_adamw(lr=1e-2, weight_decay=0.1))
    schedule = staticmethod(partial(linear, final=0.5))


class WithALargeRate(LionMixin, Regression):
    optimizer_factory = partial(Lion, lr=3e-2)


class WithTorchOptimizer(LionMixin, Regression):
    optimizer_factory = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.3)


def loader(samples=64, batch_size=8):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, 8, generator=generator)
    return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=batch_size)


def fit(module, tmp_path, **options):
    torch.manual_seed(1)
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 5, **options},
    )
    trainer.fit(module, loader())
    return trainer


def test_a_foreign_module_gets_lion_with_named_groups(tmp_path):
    (optimizer,) = fit(WithDefaults(), tmp_path).optimizers
    assert type(optimizer) is Lion
    assert [group["name"] for group in optimizer.param_groups] == ["decay", "no_decay"]


def test_a_foreign_module_learns(tmp_path):
    module = WithALargeRate()
    inputs, targets = loader().dataset.tensors
    before = nn.functional.mse_loss(module.net(inputs), targets).item()
    fit(module, tmp_path, max_epochs=30)
    assert nn.functional.mse_loss(module.net(inputs), targets).item() < 0.05 * before


def test_decay_of_the_factory_goes_to_the_decay_group_alone(tmp_path):
    (lion,) = fit(WithAdamSettings(), tmp_path).optimizers
    assert [group["weight_decay"] for group in lion.param_groups] == [1.0, 0.0]
    (adamw,) = fit(WithTorchOptimizer(), tmp_path).optimizers
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.3, 0.0]


def test_a_function_as_factory_keeps_the_decay_that_it_gives(tmp_path):
    class WithAMethod(LionMixin, Regression):
        def optimizer_factory(self, groups):
            return Lion(groups, lr=1e-3, weight_decay=0.7)

    class WithALambda(LionMixin, Regression):
        def __init__(self):
            super().__init__()
            self.optimizer_factory = lambda groups: torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.3)

    class WithAFunction(LionMixin, Regression):
        def optimizer_factory(groups, **options):
            return Lion(groups, lr=1e-3, weight_decay=0.5, **options)

    for module, decay in ((WithAMethod(), 0.7), (WithALambda(), 0.3), (WithAFunction(), 0.5)):
        (optimizer,) = fit(module, tmp_path, max_epochs=1).optimizers
        assert [(group["name"], group["weight_decay"]) for group in optimizer.param_groups] == [
            ("decay", decay), ("no_decay", 0.0)
        ]  # fmt: skip


def test_a_partial_of_the_class_is_not_taken_for_a_method(tmp_path):
    """As Python takes it from 3.14 on; a partial that is a descriptor stands for one there."""

    class Bound(partial):
        def __get__(self, instance, owner=None):
            return self if instance is None else MethodType(self, instance)

    class Later(LionMixin, Regression):
        optimizer_factory = Bound(Lion, lr=1e-3, weight_decay=0.5)
        schedule = Bound(linear, final=0.5)

    (optimizer,) = fit(Later(), tmp_path).optimizers
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5e-3)


def test_without_a_trainer_the_rate_stays(caplog):
    module = WithAdamSettings()
    optimizer = module.configure_optimizers()["optimizer"]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    assert "the length of this run is not known" in caplog.text
    fabric = Fabric(accelerator="cpu", devices=1)
    wrapped, _ = fabric.setup(module, optimizer)
    assert type(wrapped.module.configure_optimizers()["optimizer"]) is Lion


def test_matrices_of_lazy_modules_decay_and_their_vectors_do_not():
    model = nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.Linear(5, 1))
    names = {group["name"]: [name for name, _ in group["params"]] for group in parameter_groups(model, 0.1)}
    assert names == {"decay": ["0.weight", "2.weight"], "no_decay": ["0.bias", "1.weight", "1.bias", "2.bias"]}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_schedule_spans_the_optimizer_steps_of_the_run(tmp_path, accumulate):
    trainer = fit(WithAdamSettings(), tmp_path, accumulate_grad_batches=accumulate)
    assert trainer.global_step == 40 // accumulate
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    assert rates == pytest.approx([0.5e-3, 0.5e-3])
    halfway = fit(WithAdamSettings(), tmp_path, accumulate_grad_batches=accumulate, limit_train_batches=4)
    assert halfway.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5e-3)


class WithATimescale(LionMixin, Regression):
    optimizer_factory = partial(Lion, lr=1e-3, weight_decay=0.5)
    weight_decay_timescale = 0.5


class WithDecayThatFollows(LionMixin, Regression):
    optimizer_factory = partial(Lion, lr=1e-3, weight_decay=0.5)
    schedule = linear
    decay_follows_rate = True


def test_decay_may_be_a_share_of_the_run(tmp_path):
    trainer = fit(WithATimescale(), tmp_path)
    decays = {group["name"]: group["weight_decay"] for group in trainer.optimizers[0].param_groups}
    assert decays == {"decay": pytest.approx(1 / (1e-3 * 20)), "no_decay": 0.0}  # half of 40 steps


@pytest.mark.parametrize("factory", [partial(MuonWithLion, lr=1e-3), lion_amos])
def test_the_share_of_the_run_reaches_groups_that_the_factory_splits(factory, tmp_path):
    class Module(WithATimescale):
        optimizer_factory = staticmethod(factory)

    for group in fit(Module(), tmp_path).optimizers[0].param_groups:
        decays = group["name"].startswith("decay/")
        assert group["weight_decay"] == pytest.approx(1 / (group["initial_lr"] * 20) if decays else 0.0)


def test_decay_may_follow_the_rate(tmp_path):
    seen = []

    class Seen(WithDecayThatFollows):
        def on_before_optimizer_step(self, optimizer):
            group = optimizer.param_groups[0]
            seen.append((group["lr"], group["weight_decay"]))

    fit(Seen(), tmp_path, max_epochs=1)
    assert seen == [(pytest.approx(1e-3 * (1 - step / 8)), pytest.approx(0.5 * (1 - step / 8))) for step in range(8)]


class TwoParts(LionMixin, LightningModule):
    """A backbone and a head, as `BackboneFinetuning` wants them."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.head(self.backbone(batch[0])), batch[1])


@pytest.mark.parametrize("follows", [False, True])
@pytest.mark.parametrize("factory", [partial(Lion, lr=1e-3), partial(torch.optim.AdamW, lr=1e-3)])
def test_parameters_that_a_callback_adds_during_training_are_trained_on_the_same_schedule(factory, follows):
    class Module(TwoParts):
        optimizer_factory, decay_follows_rate, schedule = factory, follows, staticmethod(partial(linear, final=0.5))

    module, rates = Module(), []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=2, lambda_func=lambda epoch: 1.0)
    before = module.backbone[0].weight.clone()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    data = DataLoader(TensorDataset(torch.randn(64, 8), torch.randn(64, 1)), batch_size=8)
    Trainer(accelerator="cpu", max_epochs=4, callbacks=[finetuning, Watch()], **quiet).fit(module, data)
    assert [len(found) for found in rates] == [2, 2, 3, 3]
    assert rates[3][2] / rates[2][2] == pytest.approx(rates[3][0] / rates[2][0])
    assert not torch.equal(before, module.backbone[0].weight)


def test_data_that_are_made_when_training_starts_leave_the_length_unknown(tmp_path, caplog):
    class OwnData(LionMixin, Regression):
        def on_fit_start(self):
            self.data = loader()

        def train_dataloader(self):
            return self.data

    trainer = Trainer(
        max_epochs=1, default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(OwnData())
    assert trainer.global_step == 8
    assert "the length of this run is not known" in caplog.text


def test_a_decay_as_a_share_of_a_run_of_unknown_length_is_named():
    module = WithDefaults()
    module.weight_decay_timescale = 0.1
    with pytest.raises(ValueError, match=r"weight_decay_timescale=0.1 is a share of the run, whose length is not"):
        module.configure_optimizers()


class Falling:
    """A schedule that is an object with values of its own, which a scheduler saves."""

    def __init__(self, steps):
        self.steps = steps

    def __call__(self, step):
        return 1 - step / (2 * self.steps)


@pytest.mark.parametrize("factory", [partial(Lion, lr=1e-3), partial(MuonWithLion, lr=1e-3)])
@pytest.mark.parametrize("schedule", [staticmethod(linear), Falling])
def test_a_run_that_has_unfrozen_a_part_resumes(tmp_path, factory, schedule):
    class Unfrozen(LionMixin, Regression):
        optimizer_factory = factory

        def __init__(self):
            super().__init__()
            self.backbone = nn.Linear(8, 8)

        def training_step(self, batch, batch_idx):
            return super().training_step((self.backbone(batch[0]), batch[1]), batch_idx)

    Unfrozen.schedule = schedule
    whole = fit(Unfrozen(), tmp_path, max_epochs=3, callbacks=[BackboneFinetuning(1)])
    part = fit(Unfrozen(), tmp_path, max_epochs=3, callbacks=[BackboneFinetuning(1), StopAfter(2)])
    part.save_checkpoint(tmp_path / "part.ckpt")
    resumed = part_trainer(tmp_path, callbacks=[BackboneFinetuning(1)])
    resumed.fit(Unfrozen(), loader(), ckpt_path=tmp_path / "part.ckpt", weights_only=False)
    assert (part.global_step, resumed.global_step, whole.global_step) == (16, 24, 24)
    first, second = (trainer.optimizers[0].param_groups for trainer in (whole, resumed))
    assert [len(group["params"]) for group in first] == [len(group["params"]) for group in second]
    assert [first[number]["lr"] for number in (0, 1)] == [second[number]["lr"] for number in (0, 1)]


class StopAfter(Callback):
    """Ends a run early, as an interruption would."""

    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def part_trainer(tmp_path, **options):
    return Trainer(
        max_epochs=3, default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


def test_an_error_of_the_loaders_is_told_as_it_is(tmp_path):
    class Lost(LionMixin, Regression):
        weight_decay_timescale = 0.3

        def train_dataloader(self):
            raise FileNotFoundError("no such data")

    with pytest.raises(FileNotFoundError, match="no such data"):
        part_trainer(tmp_path).fit(Lost())
