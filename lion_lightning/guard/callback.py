"""LionGuard: the Lightning callback. It gathers what the policies of this folder need, and acts on what they say."""

import logging
import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lion_lightning.guard.batch_size import MIN_BATCH_SIZE, EffectiveBatch
from lion_lightning.guard.warmup import LinearWarmup, WarmupHook
from lion_lightning.optim import Lion

log = logging.getLogger(__name__)
WARMUP_SHARE, MAX_WARMUP_SHARE = 0.01, 0.1  # of the run's optimizer steps
LION_BETA2 = 0.99


class TrainingStopped(RuntimeError):
    """The guard ended a run that could not go on. The message says what was seen and what to do.

    `train.py` exits with `exit_code` when it meets one.
    """

    exit_code = 42


class LionGuard(Callback):
    """Warm up, count the real batch, stop on a loss that is not a number, and log all of it.

    Works with any torch optimizer, so that a control run gets the same treatment::

        Trainer(callbacks=[LionGuard()])

    Args:
        warmup_steps: optimizer steps of linear warm-up. None: long enough for the momentum to fill, `2 / (1 - beta2)`
            of Lion, or 1 % of the run if that is more, but never more than 10 % of the run. The same for every
            optimizer.
        min_batch_size: an optimizer step on fewer samples is warned about, once.

    Raises:
        ValueError: a negative number.
        TrainingStopped: during training, when the loss is NaN or infinite.
    """

    def __init__(self, warmup_steps: int | None = None, min_batch_size: int = MIN_BATCH_SIZE) -> None:
        if min_batch_size < 0:
            raise ValueError(f"min_batch_size must be at least 0, got {min_batch_size}")
        self.warmup_steps = warmup_steps
        self.warmup = LinearWarmup(warmup_steps or 0)
        self.batch = EffectiveBatch(min_batch_size)
        self.events: list[dict[str, Any]] = []
        self._hooks: list[WarmupHook] = []
        self._restored = False
        self._last_loss: Tensor | None = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach()
        if not self._restored and self.warmup_steps is None:
            self.warmup = LinearWarmup(default_warmup_steps(trainer.optimizers, trainer.estimated_stepping_batches))
        # Several optimizers share one warm-up, driven by the first: it is the clock.
        followers = [LinearWarmup(self.warmup.warmup_steps) for _ in trainer.optimizers[1:]]
        for follower in followers:
            follower.step = self.warmup.step
        self._hooks = [
            WarmupHook(optimizer, warmup)
            for optimizer, warmup in zip(trainer.optimizers, [self.warmup, *followers], strict=True)
        ]
        if trainer.optimizers:
            self._clock = trainer.optimizers[0].register_step_post_hook(lambda *_: self.batch.close())

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batch.add(extract_batch_size(batch) * trainer.world_size)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # The loss of the step before: it has long been computed, so reading it does not make the device wait.
        self._check_loss(trainer)
        self._last_loss = _loss_of(outputs)
        self._warn_of_small_batch(trainer)
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._log(pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_loss(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    def _detach(self) -> None:
        if self._hooks:
            self._clock.remove()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _check_loss(self, trainer: Trainer) -> None:
        if self._last_loss is None:
            return
        finite = bool(torch.isfinite(self._last_loss).all())
        if trainer.world_size > 1:  # no rank stops alone
            finite = trainer.strategy.reduce_boolean_decision(finite, all=True)
        if not finite:
            message = (
                f"the training loss is {float(self._last_loss):g} at step {trainer.global_step}; lower the learning "
                "rate, warm up for longer (guard.warmup_steps), clip the gradients (trainer.gradient_clip_val), or "
                "look for bad samples; the last checkpoint was written before it"
            )
            self._record(trainer, "nonfinite_loss", message)
            raise TrainingStopped(message)

    def _warn_of_small_batch(self, trainer: Trainer) -> None:
        if self.batch.is_small and not any(event["kind"] == "small_batch" for event in self.events):
            self._record(trainer, "small_batch", self.batch.advice())

    def _record(self, trainer: Trainer, kind: str, message: str) -> None:
        self.events.append({"step": trainer.global_step, "kind": kind, "message": message})
        _warn(f"LionGuard: {message}")

    def _log(self, pl_module: LightningModule) -> None:
        pl_module.log_dict(
            {
                **learning_rates(self._hooks),
                "guard/warmup_factor": min(1.0, self.warmup.step / max(1, self.warmup.warmup_steps)),
                "guard/effective_batch_size": float(self.batch.last),
                "guard/events": float(len(self.events)),
            }
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "warmup": self.warmup.state_dict(),
            "batch": self.batch.state_dict(),
            "events": [dict(event) for event in self.events],
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.warmup.load_state_dict(state_dict["warmup"])
        self.batch.load_state_dict(state_dict["batch"])
        self.events = [dict(event) for event in state_dict["events"]]
        self._restored = True


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


def learning_rates(hooks: list[WarmupHook]) -> dict[str, float | Tensor]:
    """The rates the last step applied: `lr-<optimizer>/<group>`, with `-1` after the name of a second optimizer."""
    rates: dict[str, float | Tensor] = {}
    for number, hook in enumerate(hooks):
        label = f"lr-{type(hook.optimizer).__name__}" + (f"-{number}" if number else "")
        for index, (group, rate) in enumerate(zip(hook.optimizer.param_groups, hook.applied, strict=False)):
            rates[f"{label}/{group.get('name', index)}"] = rate
    return rates


def _loss_of(outputs: Any) -> Tensor | None:
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    return loss.detach() if isinstance(loss, Tensor) else None


@rank_zero_only
def _warn(message: str) -> None:
    log.warning(message)
