"""GradientRelease: the Lightning switch for stepping each parameter inside backward."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from lion_lightning.optim.gradient_release import Release, release_gradients


class GradientRelease(Callback):
    """Step each parameter inside backward and free its gradient, in any Trainer with automatic optimization.

    The weights end up the same in every bit as without it; see `release_gradients`::

        Trainer(callbacks=[GradientRelease()])

    `gradient_clip_val` with `gradient_clip_algorithm="value"` acts inside backward. Hooks of the module or of other
    callbacks that look at gradients (`on_after_backward`, `on_before_optimizer_step`) find none.

    Raises:
        ValueError: at the start of `fit`, for what would need all gradients at once: accumulation, clipping by norm, a
            GradScaler, several optimizers or manual optimization.
    """

    def __init__(self) -> None:
        self.release: Release | None = None
        self._clip_value: float | None = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove(trainer)
        check(trainer, pl_module)
        optimizer: Optimizer = trainer.optimizers[0]
        model = trainer.strategy.model
        assert model is not None
        self.release = release_gradients(model, optimizer, clip_value=trainer.gradient_clip_val or None)
        # torch's clip_grad_value_ raises when there are no gradients, so Lightning must not call it.
        self._clip_value, trainer.gradient_clip_val = trainer.gradient_clip_val, None

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
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
    if trainer.gradient_clip_val and _algorithm(trainer) != "value":
        raise ValueError(
            f"gradient_clip_val={trainer.gradient_clip_val} by norm is not allowed with GradientRelease, because the "
            'norm is unknown when the first parameter steps: use gradient_clip_algorithm="value" or None'
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(
            f"precision={trainer.precision!r} is not allowed with GradientRelease, because its GradScaler looks at all "
            'gradients before a step: use "bf16-mixed", "bf16-true" or "32-true"'
        )


def _algorithm(trainer: Trainer) -> str:
    algorithm: Any = trainer.gradient_clip_algorithm
    return "norm" if algorithm is None else str(getattr(algorithm, "value", algorithm)).lower()
