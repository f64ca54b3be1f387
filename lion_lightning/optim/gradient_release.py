"""Gradient release: each parameter steps inside backward, and its gradient is freed before the next one is made.

What an iteration holds at its peak is then the weights, the optimizer's state, the activations and the gradients of one
layer. Idea: Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources" (LOMO),
arXiv:2306.09782; torch's tutorial on `register_post_accumulate_grad_hook`.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import MethodType, TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_pre_hooks
from typing_extensions import Self

from lion_lightning.optim import clipping
from lion_lightning.optim.buckets import step_buckets
from lion_lightning.optim.parameter_step import parameter_step, places

Closure: TypeAlias = Callable[[], Any]


def release_gradients(model: nn.Module, optimizer: Optimizer, *, clip_value: float | None = None) -> "Release":
    """Makes `backward` step each parameter as soon as its gradient is there, and free the gradient.

    The training loop stays as it is, one `backward` and one `optimizer.step()` an iteration, and its result is the
    same in every bit: `optimizer.step()` finds no gradients, ends the iteration (step number, step hooks, what a
    scheduler watches) and steps what lies outside the model. Step pre-hooks, such as a warm-up, run before the first
    gradient of the iteration. So the learning rate must be set before `backward`, not between it and `step`.

    DDP: give the wrapper; a parameter steps when its bucket has been reduced. DDP keeps its buckets, which are as large
    as the gradients, so little memory is saved there. FSDP2: works as it is, on each rank's shards.

    Args:
        model: whose parameters are to step in backward; each once, tied or not. Those without a gradient rest.
        optimizer: Lion, or any optimizer that steps each parameter by itself (SGD, AdamW, Adafactor; not LBFGS).
        clip_value: gradients are clamped to [-clip_value, clip_value] before the step, as `clip_grad_value_` does.
            A norm over all gradients cannot be had: they never exist together.

    Returns:
        The handle: `remove()` it, or use it in a `with` statement.

    Raises:
        ValueError: no parameter of the model is in the optimizer, or one of the two cannot work this way.
        RuntimeError: later, while training: a second backward before `step` (accumulation), `clip_grad_norm_`, a
            GradScaler, or a learning rate that changed between backward and step.

    Example:
        >>> with release_gradients(model, optimizer):  # doctest: +SKIP
        ...     for batch in batches:
        ...         model(batch).backward()
        ...         optimizer.step()
    """
    if clip_value is not None and not clip_value > 0:
        raise ValueError(f"clip_value={clip_value!r} is not allowed: use None or a number above 0")
    return Release(model, optimizer, clip_value)


class Release:
    """The handle of `release_gradients`: active until removed."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, clip_value: float | None) -> None:
        _check(model, optimizer)
        own = set(model.parameters())
        self.params = {param: place for param, place in places(optimizer).items() if param in own}
        if not any(param.requires_grad for param in self.params):
            raise ValueError(
                "optimizer holds no trainable parameter of model, which is not allowed in release_gradients: make the "
                "optimizer from model.parameters(), after the model has been sharded"
            )
        self._optimizer, self._clip_value = optimizer, clip_value
        self._steps = parameter_step(optimizer)
        self._stepped: set[Tensor] = set()
        self._rates: list[Any] = []
        self._begun = self._inside_step = False
        self._lock = threading.RLock()
        self._active = True
        self._replace_step()
        self._handles = self._register(model)
        clipping.forbid_norm(self)

    def remove(self) -> None:
        """Goes back to ordinary steps; an iteration under way is ended by the next `optimizer.step()`."""
        if not self._active:
            return
        self._active = False
        for handle in self._handles:
            handle.remove()
        clipping.allow_norm(self)
        self._steps.remove()
        attributes = vars(self._optimizer)
        for name in ("_release", "_step_supports_amp_scaling"):
            del attributes[name]
        attributes.update(self._attributes)
        if attributes.get("step") is self._released_step:  # else somebody wrapped it, and it passes calls on
            attributes["step"] = self._ordinary_step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None) -> None:
        self.remove()

    def begin(self) -> None:
        """Starts an iteration, if none is under way: step pre-hooks run now, not at `optimizer.step`."""
        with self._lock:
            if self._begun:
                return
            self._begun = True
            if not self._inside_step:  # else torch has just run them
                for hook in [*_global_optimizer_pre_hooks.values(), *self._pre_hooks.values()]:
                    hook(self._optimizer, (self._optimizer,), {})
            self._rates = [_known_rate(group) for group in self._optimizer.param_groups]
            self._steps.begin()

    @torch.no_grad()
    def step(self, param: Tensor) -> None:
        """Steps one parameter with the gradient that it has."""
        with self._lock:
            self.begin()
            if param in self._stepped:
                raise RuntimeError(
                    "a parameter got a second gradient before optimizer.step(): release_gradients cannot accumulate "
                    "gradients, because the first is gone; call optimizer.step() after each backward, or remove() it"
                )
            self._stepped.add(param)
            if self._clip_value is not None:
                nn.utils.clip_grad_value_(param, self._clip_value)
            self._steps.step(param, self.params[param])

    def release(self) -> None:
        """Frees the gradients of the parameters that have stepped."""
        for param in self._stepped:
            param.grad = None

    @property
    def active(self) -> bool:
        """Whether it has not been removed."""
        return self._active

    @property
    def _pre_hooks(self) -> dict[int, Any]:
        return self._optimizer._optimizer_step_pre_hooks

    def _register(self, model: nn.Module) -> list[Any]:
        if isinstance(model, DistributedDataParallel):
            return [step_buckets(model, self)]
        trainable = [param for param in self.params if param.requires_grad]
        hooks = [param.register_post_accumulate_grad_hook(self._on_gradient) for param in trainable]
        return [*hooks, model.register_forward_pre_hook(_refuse_hidden_wrapper)]

    def _on_gradient(self, param: Tensor) -> None:
        self.step(param)
        param.grad = None

    def _replace_step(self) -> None:
        """Puts `_end` before the optimizer's step, as a method: schedulers that come later wrap it."""

        def step(optimizer: Optimizer, closure: Closure | None = None, *, grad_scaler: Any = None) -> Any:
            return self._end(closure, grad_scaler)

        self._ordinary_step = self._optimizer.step
        marks = vars(getattr(self._ordinary_step, "__func__", self._ordinary_step))
        vars(step).update({key: value for key, value in marks.items() if key != "__wrapped__"})  # schedulers leave them
        self._released_step = MethodType(step, self._optimizer)
        attributes = vars(self._optimizer)
        self._attributes = {key: attributes[key] for key in ("_step_supports_amp_scaling",) if key in attributes}
        # With the flag GradScaler hands itself to the step, which can then say why it cannot work.
        attributes.update(step=self._released_step, _release=self, _step_supports_amp_scaling=True)

    def _end(self, closure: Closure | None, grad_scaler: Any) -> Any:
        """Ends the iteration by the optimizer's own step, which finds no gradient of ours."""
        try:
            if self._begun:
                self._refuse_changes(grad_scaler)
            self._inside_step = True
            with self._without_pre_hooks() if self._begun else contextlib.nullcontext():
                return self._ordinary_step() if closure is None else self._ordinary_step(closure)
        finally:
            self._begun = self._inside_step = False
            self._stepped.clear()

    def _refuse_changes(self, grad_scaler: Any) -> None:
        """What would have had to be known before backward."""
        if grad_scaler is not None:
            raise RuntimeError(
                "GradScaler is not allowed with release_gradients: the scaled gradients have been used and are gone; "
                "train in bfloat16, which needs no scaler"
            )
        if self._rates != [_known_rate(group) for group in self._optimizer.param_groups]:
            raise RuntimeError(
                "the learning rate changed between backward and optimizer.step(), but release_gradients has stepped "
                "inside backward: set the learning rate before backward"
            )

    @contextlib.contextmanager
    def _without_pre_hooks(self) -> Iterator[None]:
        """They ran when the iteration began. The dicts stay the same objects: the handles of hooks refer to them."""
        hidden = [(hooks, dict(hooks)) for hooks in (_global_optimizer_pre_hooks, self._pre_hooks)]
        for hooks, _ in hidden:
            hooks.clear()
        try:
            yield
        finally:
            for hooks, kept in hidden:
                hooks.update(kept)


def _check(model: nn.Module, optimizer: Optimizer) -> None:
    if not isinstance(model, nn.Module) or not isinstance(optimizer, Optimizer):
        kinds = f"{type(model).__name__} and {type(optimizer).__name__}"
        raise ValueError(
            f"release_gradients got {kinds}, not allowed: use a torch.nn.Module and a torch.optim.Optimizer"
        )
    if "_release" in vars(optimizer):
        raise ValueError("optimizer is released already, which is not allowed: remove() the first handle")


def _known_rate(group: dict[str, Any]) -> float | None:
    """The learning rate where it can be read without waiting for a device."""
    rate = group["lr"]
    return None if isinstance(rate, Tensor) and rate.device.type != "cpu" else float(rate)


def _refuse_hidden_wrapper(model: nn.Module, _: Any) -> None:
    if DistributedDataParallel._get_active_ddp_module() is not None:
        raise RuntimeError(
            "model is wrapped in DistributedDataParallel, and release_gradients got what is inside: it would step on "
            "gradients that are not yet reduced; give it the wrapper"
        )
