"""The Lightning switch for gradient release: same weights, and one clear error for what cannot work."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from lion_lightning.guard.callback import LionGuard
from lion_lightning.lightning import GradientRelease, check
from lion_lightning.optim import Lion
from tests.guard.memory_logger import MemoryLogger


class Regression(LightningModule):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 1))
        self.options = {"lr": 1e-3, "weight_decay": 0.1, **options}

    def training_step(self, batch: Any, index: int) -> Tensor:
        return (self.net(batch[0]).float() - batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = Lion(self.parameters(), **self.options)
        schedule = LambdaLR(optimizer, lambda step: 1 - step / 20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class GradientsSeen(Callback):
    """How many parameters still have a gradient after each backward."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.counts.append(sum(param.grad is not None for param in pl_module.parameters()))


def fit(module: LightningModule, folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(64, 64, generator=generator), torch.randn(64, 1, generator=generator))
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    where = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder}
    trainer = Trainer(max_epochs=2, callbacks=[*callbacks], **{**where, **quiet, **options})
    trainer.fit(module, DataLoader(data, batch_size=8))
    return trainer


@pytest.mark.parametrize(
    ("trainer", "optimizer"),
    [
        ({}, {}),
        ({"precision": "bf16-true"}, {"weight_bits": 16, "momentum_dtype": "int8"}),
        ({"precision": "bf16-mixed", "gradient_clip_val": 1e-2, "gradient_clip_algorithm": "value"}, {}),
    ],
)
def test_a_fit_with_release_ends_at_the_same_weights(
    trainer: dict[str, Any], optimizer: dict[str, Any], tmp_path: Path
) -> None:
    plain, released, seen = Regression(**optimizer), Regression(**optimizer), GradientsSeen()
    without = fit(plain, tmp_path, LionGuard(warmup_steps=5), **trainer)
    with_release = fit(released, tmp_path, LionGuard(warmup_steps=5), GradientRelease(), seen, **trainer)
    assert seen.counts == [0] * 16
    assert with_release.global_step == without.global_step == 16
    for mine, theirs in zip(plain.parameters(), released.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert with_release.optimizers[0].state_dict()["param_groups"] == without.optimizers[0].state_dict()["param_groups"]
    assert with_release.gradient_clip_val == trainer.get("gradient_clip_val")
    assert "_release" not in vars(with_release.optimizers[0])


class Manual(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Regression, {"accumulate_grad_batches": 2}, "accumulate_grad_batches=2 is not allowed"),
        (Regression, {"gradient_clip_val": 1.0}, "gradient_clip_val=1.0 by norm is not allowed"),
        (Regression, {"plugins": "scaler"}, "precision='16-mixed' is not allowed"),
        (Manual, {}, "automatic_optimization=False is not allowed"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(
    make: type[LightningModule], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if options.get("plugins") == "scaler":
        options = {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))}
    module = make()
    with pytest.raises(ValueError, match=message):
        fit(module, tmp_path, GradientRelease(), **options)


def test_an_accumulation_that_starts_later_is_refused(tmp_path: Path) -> None:
    scheduler = GradientAccumulationScheduler({1: 4})
    with pytest.raises(ValueError, match="accumulate_grad_batches=4 is not allowed"):
        fit(Regression(), tmp_path, scheduler, GradientRelease())


def test_several_optimizers_are_refused() -> None:
    """Lightning itself refuses them in automatic optimization, later."""
    trainer = SimpleNamespace(optimizers=[None, None])
    with pytest.raises(ValueError, match="2 optimizers are not allowed"):
        check(cast(Trainer, trainer), Regression())


def test_averaging_of_weights_in_an_epoch_without_steps_goes_on(tmp_path: Path) -> None:
    steps = []
    for release in ([], [GradientRelease()]):
        module = Regression()
        module.net.insert(1, nn.BatchNorm1d(80))
        steps.append(fit(module, tmp_path, StochasticWeightAveraging(1e-3), *release).global_step)
    assert steps[0] == steps[1]


def test_telemetry_beside_the_guard_is_of_its_step(tmp_path: Path) -> None:
    found = []
    for callbacks in ([], [GradientRelease()]):
        logger = MemoryLogger()
        guard = LionGuard(telemetry_every=3, disabled=["settings", "batch_size"])
        fit(Regression(), tmp_path, *callbacks, guard, logger=logger, log_every_n_steps=1)
        found.append([row.get("lion/momentum_rms") for row in logger.rows if "guard/events" in row])
    assert any(value is not None for value in found[0])
    assert found[0] == found[1]
