"""Lion in Lightning: `LionMixin` configures the optimizer, `GradientRelease` steps parameters inside backward."""

import inspect
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from lion_lightning.hyperparams import Schedule, cosine, decay_for_timescale, parameter_groups
from lion_lightning.optim import Lion
from lion_lightning.optim.gradient_release import Release, release_gradients

log = logging.getLogger(__name__)

OptimizerFactory: TypeAlias = Callable[..., Optimizer]


class LionMixin:
    """Gives a LightningModule Lion, named parameter groups and a schedule over the whole run.

    Put it before `LightningModule` in the bases. Set `optimizer_factory` and `schedule` where the defaults do not fit::

        class Classifier(LionMixin, LightningModule):
            optimizer_factory = partial(Lion, **from_adamw(lr=1e-3, weight_decay=0.1))

    Attributes:
        optimizer_factory: an optimizer class of torch or of this library, a `functools.partial` of one, or a function
            of the parameter groups. Its `weight_decay` applies to the `decay` group alone (see
            `hyperparams.parameter_groups`).
        schedule: from the number of optimizer steps of the run to a function that gives the factor of the learning rate
            at each step; see `hyperparams`. The number is `trainer.estimated_stepping_batches`; where it is not known,
            the rate stays as it is.
        weight_decay_timescale: instead of a weight decay, the optimizer steps over which weights forget, or below 1 a
            share of the run; see `hyperparams.decay_for_timescale`.
        decay_follows_rate: whether the decay is multiplied by the schedule's factor too, so that what a step takes off
            a weight is lr^2 / max_lr * decay (AdamC: Defazio, 2025, arXiv:2506.02285).
    """

    optimizer_factory: OptimizerFactory = Lion
    schedule: Schedule = staticmethod(cosine)
    weight_decay_timescale: float | None = None
    decay_follows_rate: bool = False

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        found = getattr(cls.configure_optimizers, "__qualname__", "")
        if found == LightningModule.configure_optimizers.__qualname__:  # also where it is pytorch_lightning's
            raise TypeError(f"{cls.__name__} has LightningModule before LionMixin: write LionMixin, LightningModule")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over named groups, and its schedule, which advances once an optimizer step."""
        module = cast(LightningModule, self)
        factory = self._given("optimizer_factory")
        if not callable(factory):
            raise TypeError(
                f"optimizer_factory is a {type(factory).__name__}, which is not allowed: use an optimizer's class, or "
                "partial(Lion, **from_adamw(lr=..., weight_decay=...))"
            )
        steps = total_steps(_trainer_of(module))
        decay = _weight_decay(factory)
        groups = parameter_groups(module, decay or 0.0)
        if decay is None:  # the factory's own
            for group in groups[: groups[0]["name"] == "decay"]:
                del group["weight_decay"]
        optimizer = factory(groups)
        if not isinstance(optimizer, Lion):  # torch's take no group without names beside groups with names
            for group in optimizer.param_groups:
                group.pop("param_names", None)
        if self.weight_decay_timescale is not None:
            if self.weight_decay_timescale < 1 and math.isinf(steps):
                if (trainer := _trainer_of(module)) is not None:
                    _ = trainer.estimated_stepping_batches  # an error of the loaders says more
                raise ValueError(
                    f"weight_decay_timescale={self.weight_decay_timescale} is a share of the run, whose length is not "
                    "known: use a number of optimizer steps"
                )
            timescale = self.weight_decay_timescale * (steps if self.weight_decay_timescale < 1 else 1)
            for group in optimizer.param_groups:
                if str(group.get("name")).split("/")[0] == "decay":  # MuonWithLion and lion_amos split it
                    group["weight_decay"] = decay_for_timescale(float(group["lr"]), timescale)
        if math.isinf(steps):
            log.warning("LionMixin: the length of this run is not known, so the learning rate stays as it is")
        factor = self._given("schedule")(int(steps)) if math.isfinite(steps) else lambda step: 1.0
        scheduler = (RateAndDecay if self.decay_follows_rate else Rate)(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 1}}

    def _given(self, name: str) -> Any:
        """An attribute; neither a function of one argument nor a `partial` (Python 3.14) is taken for a method."""
        static = inspect.getattr_static(self, name)
        if inspect.isfunction(static):
            positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            entries = [entry for entry in inspect.signature(static).parameters.values() if entry.kind in positional]
            return static if sum(entry.default is entry.empty for entry in entries) == 1 else getattr(self, name)
        return static if isinstance(static, partial) else getattr(self, name)


def _trainer_of(module: LightningModule) -> Trainer | None:
    """The Trainer of a module; None without one, and under Fabric, whose stand-in for it knows nothing."""
    try:
        return None if module.fabric is not None else module.trainer
    except RuntimeError:  # the module is not attached to a Trainer
        return None


def total_steps(trainer: Trainer | None) -> float:
    """Optimizer steps of the whole run; infinite if they are not known."""
    if trainer is None:
        return math.inf
    try:
        steps = float(trainer.estimated_stepping_batches)
    except Exception:  # of the loaders, which may have no data yet; Lightning asks them again when training starts
        return math.inf
    return steps if steps > 0 else math.inf


class Rate(LambdaLR):
    """Multiplies the learning rate of every group, also of those that are added during training.

    A group that was added, as by Lightning's `BackboneFinetuning`, goes on from the rate that it has then.
    """

    @override
    def step(self, epoch: int | None = None) -> None:
        for group in self.optimizer.param_groups[len(self.lr_lambdas) :]:
            self.lr_lambdas.append(self.lr_lambdas[0])
            if len(self.base_lrs) < len(self.lr_lambdas):  # a resumed run has it
                factor = self.lr_lambdas[0](self.last_epoch)
                self.base_lrs.append(float(group["lr"]) / factor if factor else float(group["lr"]))
        super().step(epoch)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.lr_lambdas += [self.lr_lambdas[0]] * (len(state_dict["lr_lambdas"]) - len(self.lr_lambdas))
        super().load_state_dict(state_dict)


class RateAndDecay(Rate):
    """Multiplies the weight decay of each group by the factor of its learning rate."""

    @override
    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        for group, factor in zip(self.optimizer.param_groups, self.lr_lambdas, strict=True):
            group.setdefault("initial_decay", group.get("weight_decay", 0.0))
            group["weight_decay"] = group["initial_decay"] * factor(self.last_epoch)


def _weight_decay(factory: OptimizerFactory) -> float | None:
    """The decay that the factory would use: the one given to it, else the optimizer's default; None if not known."""
    if isinstance(factory, partial) and "weight_decay" in factory.keywords:
        return float(factory.keywords["weight_decay"])
    optimizer = factory.func if isinstance(factory, partial) else factory
    default = inspect.signature(optimizer).parameters.get("weight_decay")
    return float(default.default) if default is not None and default.default is not default.empty else None


class GradientRelease(Callback):
    """Steps each parameter inside backward and frees its gradient, in any Trainer with automatic optimization.

    The weights end up the same, bit for bit, as without it; see `release_gradients`::

        Trainer(callbacks=[GradientRelease()])

    `gradient_clip_val` with `gradient_clip_algorithm="value"` acts inside backward. Hooks of the module or of other
    callbacks that read gradients (`on_after_backward`, `on_before_optimizer_step`) find none.

    Raises:
        ValueError: at the start of `fit`, for settings that need all gradients at once: accumulation, clipping by norm,
            a GradScaler, several optimizers or manual optimization.
    """

    def __init__(self) -> None:
        self.release: Release | None = None
        self._clip_value: float | None = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove(trainer)
        check(trainer, pl_module)
        model = trainer.strategy.model
        assert model is not None
        self.release = release_gradients(model, trainer.optimizers[0], clip_value=trainer.gradient_clip_val or None)
        # torch's clip_grad_value_ raises when there are no gradients, so Lightning must not call it.
        self._clip_value, trainer.gradient_clip_val = trainer.gradient_clip_val, None

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        check(trainer, pl_module)  # GradientAccumulationScheduler changes the Trainer at an epoch's start

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._remove(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove(trainer)

    def _remove(self, trainer: Trainer) -> None:
        if self.release is not None:
            self.release.remove()
            trainer.gradient_clip_val = self._clip_value
        self.release = None


def check(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuses a Trainer whose settings need all gradients at once.

    Args:
        trainer: about to fit with `GradientRelease`.
        pl_module: the module that it fits.

    Raises:
        ValueError: names the setting, its value and what is allowed.
    """
    if not pl_module.automatic_optimization:
        raise ValueError(
            "automatic_optimization=False is not allowed with GradientRelease: call release_gradients yourself in "
            "manual optimization"
        )
    if len(trainer.optimizers) != 1:
        raise ValueError(f"{len(trainer.optimizers)} optimizers are not allowed with GradientRelease: use one")
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} is not allowed with GradientRelease, because "
            "each gradient is gone before the next batch: use 1 and a larger batch"
        )
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm != "value":
        raise ValueError(
            f"gradient_clip_val={trainer.gradient_clip_val} by norm is not allowed with GradientRelease, because the "
            'norm is unknown when the first parameter steps: use gradient_clip_algorithm="value" or None'
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(
            f"precision={trainer.precision!r} is not allowed with GradientRelease, because its GradScaler reads all "
            'gradients before a step: use "bf16-mixed", "bf16-true" or "32-true"'
        )
