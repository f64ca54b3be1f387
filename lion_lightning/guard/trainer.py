"""What the guard reads off a Trainer and sets on it."""

import math

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

from lion_lightning.guard.batch_size import OnSmallBatch, accumulation
from lion_lightning.guard.preflight import RunSettings
from lion_lightning.optim import Lion

WARMUP_SHARE, MAX_WARMUP_SHARE = 0.01, 0.1  # of the run's optimizer steps
LION_BETA2 = 0.99


def warmup_length(given: float | None, optimizers: list[Optimizer], total_steps: float) -> int:
    """Optimizer steps of warm-up.

    Args:
        given: a number of steps, below 1 a share of the run, None for `default_warmup_steps`.
        optimizers: of the run.
        total_steps: of the run, infinite if nobody knows: then there is no share of it, and the default is taken.
    """
    if given is None or (0 < given < 1 and not math.isfinite(total_steps)):
        return default_warmup_steps(optimizers, total_steps)
    return round(given * total_steps if given < 1 else given)


def default_warmup_steps(optimizers: list[Optimizer], total_steps: float) -> int:
    """Steps for Lion's momentum to fill, or 1 % of the run if that is more; at most 10 % of the run.

    An optimizer that is not Lion gets what Lion would get at its default beta2: a control run is treated alike.
    """
    beta2 = max(
        (group["betas"][1] for o in optimizers if isinstance(o, Lion) for group in o.param_groups), default=None
    )
    fill = 2.0 / max(1e-6, 1.0 - (LION_BETA2 if beta2 is None else beta2))
    if not math.isfinite(total_steps):
        return round(fill)
    return round(min(max(fill, WARMUP_SHARE * total_steps), MAX_WARMUP_SHARE * total_steps))


def batch_size(trainer: Trainer) -> int | None:
    """Samples of an optimizer step by the settings, if the data module or its loader says how many a batch has."""
    given = getattr(trainer.fit_loop, "_data_source", None)  # before the loaders are set up
    sources = (getattr(trainer, "datamodule", None), trainer.train_dataloader, getattr(given, "instance", None))
    size = next((size for source in sources if (size := getattr(source, "batch_size", None))), None)
    return size * trainer.accumulate_grad_batches * trainer.world_size if isinstance(size, int) else None


def settle_batch(trainer: Trainer, on_small_batch: OnSmallBatch, least: int) -> str | None:
    """Raises the accumulation so that a step has `least` samples, before anything is made from it.

    Returns:
        A line that says so, or None where nothing had to be done.

    Raises:
        ValueError: with "error", if the batch is too small; or nobody knows how large it is; or the module itself
            decides when to step.
    """
    size, before = batch_size(trainer), trainer.accumulate_grad_batches
    if size is None:
        raise ValueError(
            f"on_small_batch={on_small_batch!r} needs the batch size before training: give the data module a "
            "batch_size, or use on_small_batch='warn'"
        )
    if size >= least:
        return None
    if on_small_batch == "error":
        raise ValueError(
            f"the effective batch is {size} samples, below min_batch_size={least} (on_small_batch='error')"
        )
    if not trainer.lightning_module.automatic_optimization:
        raise ValueError("on_small_batch='accumulate' cannot act under manual optimization: use 'warn' or 'error'")
    trainer.accumulate_grad_batches = accumulation(size // before, before, least)
    if isinstance(trainer.val_check_interval, int):  # counted in micro-batches
        trainer.val_check_interval = trainer.val_check_interval * trainer.accumulate_grad_batches // before
    return f"accumulate_grad_batches is {trainer.accumulate_grad_batches}, not {before}, for {least} samples a step"


def run_settings(trainer: Trainer, warmup_steps: int, gate: bool, min_batch_size: int) -> RunSettings:
    """For preflight."""
    return RunSettings(
        total_steps=trainer.estimated_stepping_batches,
        warmup_steps=warmup_steps,
        batch_size=batch_size(trainer),
        gradient_clip_val=trainer.gradient_clip_val,
        gate=gate,
        min_batch_size=min_batch_size,
    )


def sees_final_gradients(trainer: Trainer, guard: Callback) -> bool:
    """Whether nobody may change gradients between the guard's `on_before_optimizer_step` and the step."""
    later = trainer.callbacks[trainer.callbacks.index(guard) + 1 :]  # type: ignore[attr-defined]
    module, hook = trainer.lightning_module, "on_before_optimizer_step"
    touched = is_overridden(hook, module) or is_overridden("configure_gradient_clipping", module)
    return not (trainer.gradient_clip_val or touched or any(is_overridden(hook, other, Callback) for other in later))


def clip_norm(trainer: Trainer) -> float | None:
    """The norm that the Trainer clips gradients to after the guard has seen them."""
    by_norm = trainer.gradient_clip_algorithm in (None, "norm")
    return float(trainer.gradient_clip_val) if trainer.gradient_clip_val and by_norm else None
