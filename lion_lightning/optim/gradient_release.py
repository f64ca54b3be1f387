"""Gradient release: each parameter steps inside backward, and its gradient is freed before the next one is made.

An iteration then holds at its peak the weights, the optimizer's state, the activations and the gradients of one layer.
Idea: Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources" (LOMO), arXiv:2306.09782;
torch's tutorial on `register_post_accumulate_grad_hook`.
"""

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType, TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, distributed, nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import _global_optimizer_pre_hooks
from typing_extensions import Self

from lion_lightning.optim.lion import Lion

Closure: TypeAlias = Callable[[], Any]


def release_gradients(model: nn.Module, optimizer: Optimizer, *, clip_value: float | None = None) -> "Release":
    """Makes `backward` step each parameter as soon as its gradient is complete, and free the gradient.

    The training loop is unchanged, with one `backward` and one `optimizer.step()` per iteration, and its result is the
    same bit for bit. `optimizer.step()` finds no gradients, ends the iteration (step number, step hooks, the counter of
    a scheduler) and steps parameters outside the model. Step pre-hooks, such as a warm-up, run before the first
    gradient of the iteration. The learning rate must therefore be set before `backward`.

    Clipping by the norm over all gradients is impossible, because they never exist together: in a training loop with
    release, `torch.nn.utils.clip_grad_norm_` finds no gradients and clips nothing. Leave it out (a step of Lion is
    bounded by lr) or use `clip_value`.

    If backward raises, the next forward starts the iteration again; parameters that had stepped step a second time.

    DDP: pass the wrapper; a parameter steps when its bucket has been reduced. DDP keeps its buckets, which are as large
    as the gradients, so little memory is saved there. FSDP2 works on each rank's shards.

    Args:
        model: its parameters step in backward, each once, tied or not. Those without a gradient do not change.
        optimizer: Lion, or any optimizer that steps each parameter independently (SGD, AdamW, Adafactor; not LBFGS).
        clip_value: gradients are clamped to [-clip_value, clip_value] before the step, as `clip_grad_value_` does.

    Returns:
        The handle: `remove()` it, or use it in a `with` statement.

    Raises:
        ValueError: no parameter of the model is in the optimizer, or one of the two does not support release.
        RuntimeError: later, while training: a second backward before `step` (accumulation), a GradScaler, or a learning
            rate that changed between backward and step.

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
        if not isinstance(model, nn.Module) or not isinstance(optimizer, Optimizer):
            kinds = f"{type(model).__name__} and {type(optimizer).__name__}"
            raise ValueError(
                f"release_gradients got {kinds}, not allowed: use a torch.nn.Module and a torch.optim.Optimizer"
            )
        if not hasattr(optimizer, "_optimizer_step_pre_hooks"):  # as Accelerate's, which has none of Optimizer's state
            raise ValueError(
                f"optimizer={type(optimizer).__name__} is not allowed in release_gradients, because it wraps another: "
                "use the one that it wraps, its attribute `optimizer`"
            )
        if "_release" in vars(optimizer):
            raise ValueError("optimizer is released already, which is not allowed: remove() the first handle")
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                "optimizer=LBFGS is not allowed in release_gradients: its step needs all gradients at once; use an "
                "optimizer that steps each parameter by itself, like Lion, SGD or AdamW"
            )
        own = set(model.parameters())
        pairs = ((number, p) for number, group in enumerate(optimizer.param_groups) for p in group["params"])
        self._groups = {param: number for number, param in pairs if param in own}
        if not any(param.requires_grad for param in self._groups):
            raise ValueError(
                "optimizer holds no trainable parameter of model, which is not allowed in release_gradients: make the "
                "optimizer from model.parameters(), after the model has been sharded"
            )
        self._optimizer, self._clip_value = optimizer, clip_value
        self._stepped: set[Tensor] = set()
        self._rates: list[float | None] = []
        self._begun = self._in_backward = False
        self._hooked: set[Tensor] = set()
        self._lock = threading.RLock()
        self.active = True
        """Whether it has not been removed."""
        self._pre_hooks = optimizer._optimizer_step_pre_hooks
        self._replace_step()
        self._handles: list[Any]
        if isinstance(model, DistributedDataParallel):
            self._handles = [_step_in_buckets(model, self)]
        else:
            self._handles = [model.register_forward_pre_hook(self._before_forward)]
            self._hook_trainable()

    def remove(self) -> None:
        """Returns to ordinary steps; the next `optimizer.step()` ends an iteration that has begun."""
        if not self.active:
            return
        self.active = False
        for handle in self._handles:
            handle.remove()
        attributes = vars(self._optimizer)
        for name in ("_release", "_step_supports_amp_scaling"):
            del attributes[name]
        attributes.update(self._attributes)
        if attributes.get("step") is self._released_step:  # otherwise a scheduler has wrapped it, and passes calls on
            attributes["step"] = self._ordinary_step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None) -> None:
        self.remove()

    def begin(self) -> None:
        """Starts an iteration, if none has begun: step pre-hooks run now, not at `optimizer.step`."""
        with self._lock:
            if self._begun:
                return
            self._begun = True
            for hook in [*_global_optimizer_pre_hooks.values(), *self._pre_hooks.values()]:
                hook(self._optimizer, (self._optimizer,), {})
            self._rates = [_known_rate(group) for group in self._optimizer.param_groups]

    @torch.no_grad()
    def step(self, param: Tensor) -> None:
        """Steps one parameter with its gradient; parameters outside the model are ignored."""
        if param not in self._groups:
            return
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
            if isinstance(self._optimizer, Lion):
                self._optimizer.step_param(param)
            else:
                _step_alone(self._optimizer, self._groups[param], param)

    def free_gradients(self) -> None:
        """Frees the gradients of the parameters that have stepped."""
        for param in self._stepped:
            param.grad = None

    def _before_forward(self, model: nn.Module, _: Any) -> None:
        if DistributedDataParallel._get_active_ddp_module() is not None:
            raise RuntimeError(
                "model is wrapped in DistributedDataParallel, and release_gradients got the module inside: it would "
                "step on gradients that are not yet reduced; pass the wrapper"
            )
        if self._in_backward:  # it has raised: the iteration begins again
            self._stepped.clear()
            self._in_backward = False
        self._hook_trainable()

    def _hook_trainable(self) -> None:
        """Hooks the trainable parameters, which may have been unfrozen since the last forward."""
        for param in self._groups:
            if param.requires_grad and param not in self._hooked:
                self._hooked.add(param)
                self._handles.append(param.register_post_accumulate_grad_hook(self._on_gradient))

    def _on_gradient(self, param: Tensor) -> None:
        if not self._in_backward:
            self._in_backward = True
            Variable._execution_engine.queue_callback(self._end_backward)
        self.step(param)
        param.grad = None

    def _end_backward(self) -> None:
        """Runs when backward has ended without an exception."""
        self._in_backward = False

    def _replace_step(self) -> None:
        """Replaces the optimizer's step by `_end`, as a method, so that schedulers made later can wrap it."""

        def step(optimizer: Optimizer, closure: Closure | None = None, *, grad_scaler: Any = None) -> Any:
            return self._end(closure, grad_scaler)

        self._ordinary_step = self._optimizer.step
        marks = vars(getattr(self._ordinary_step, "__func__", self._ordinary_step))  # schedulers leave marks there
        vars(step).update({key: value for key, value in marks.items() if key != "__wrapped__"})
        self._released_step = MethodType(step, self._optimizer)
        attributes = vars(self._optimizer)
        self._attributes = {key: attributes[key] for key in ("_step_supports_amp_scaling",) if key in attributes}
        # With the flag, GradScaler passes itself to the step, which can then explain why it cannot work.
        attributes.update(step=self._released_step, _release=self, _step_supports_amp_scaling=True)

    def _end(self, closure: Closure | None, grad_scaler: Any) -> Any:
        """Ends the iteration by the optimizer's own step, in which no parameter of the model has a gradient."""
        hidden: list[tuple[dict[int, Any], dict[int, Any]]] = []
        try:
            loss = None
            if closure is not None:  # its backward begins the iteration, and steps
                with torch.enable_grad():
                    loss = closure()
            if self._begun:
                self._refuse_changes(grad_scaler)
                # The pre-hooks ran when the iteration began. Handles refer to their dicts, which are emptied therefore.
                hidden = [(hooks, dict(hooks)) for hooks in (_global_optimizer_pre_hooks, self._pre_hooks)]
                for hooks, _ in hidden:
                    hooks.clear()
            result = self._ordinary_step()
            return result if closure is None else loss
        finally:
            for hooks, kept in hidden:
                hooks.update(kept)
            self._begun = False
            self._stepped.clear()

    def _refuse_changes(self, grad_scaler: Any) -> None:
        """Refuses a GradScaler, and options that changed after backward."""
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


def _known_rate(group: dict[str, Any]) -> float | None:
    """The learning rate, or None if reading it would synchronise a device."""
    rate = group["lr"]
    return None if isinstance(rate, Tensor) and rate.device.type != "cpu" else float(rate)


def _step_alone(optimizer: Optimizer, number: int, param: Tensor) -> None:
    """Runs the step of an optimizer other than Lion with one parameter in its groups, and without its step hooks.

    Raises:
        RuntimeError: the optimizer keeps state in its groups.
    """
    groups = optimizer.param_groups
    alone = {**groups[number], "params": [param]}
    step: Any = type(optimizer).step
    optimizer.param_groups = [alone]
    try:
        (step.__wrapped__ if hasattr(step, "hooked") else step)(optimizer)
    finally:
        optimizer.param_groups = groups
    changed = [key for key, value in alone.items() if key != "params" and value is not groups[number].get(key)]
    if changed:
        raise RuntimeError(
            f"{type(optimizer).__name__} keeps state in its parameter groups ({', '.join(changed)}), so that it "
            "cannot step one parameter at a time: do not use release_gradients with it"
        )


@dataclass
class _Buckets:
    """The state of the communication hook of one DDP wrapper; DDP allows one hook, for the wrapper's lifetime."""

    group: distributed.ProcessGroup
    release: Release | None = None

    def remove(self) -> None:
        """Returns to plain averaging."""
        self.release = None


_hooked: "weakref.WeakKeyDictionary[DistributedDataParallel, _Buckets]" = weakref.WeakKeyDictionary()


def _step_in_buckets(model: DistributedDataParallel, release: Release) -> _Buckets:
    """Makes parameters step when the bucket that holds their gradient has been reduced.

    Raises:
        ValueError: the wrapper reports zeros for parameters without a gradient, or reduces in another dtype.
    """
    for option in ("find_unused_parameters", "static_graph", "mixed_precision"):
        if getattr(model, option, None):
            raise ValueError(
                f"DistributedDataParallel({option}={getattr(model, option)}) is not allowed in release_gradients: "
                "leave it at its default"
            )
    if model not in _hooked:
        _hooked[model] = _Buckets(model.process_group)
        model.register_comm_hook(_hooked[model], _reduce_and_step)
    _hooked[model].release = release
    return _hooked[model]


def _reduce_and_step(state: _Buckets, bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Averages a bucket over the ranks, then steps its parameters while other buckets are being reduced."""
    buffer, release = bucket.buffer().div_(state.group.size()), state.release
    future = distributed.all_reduce(buffer, group=state.group, async_op=True).get_future()
    if release is None:
        return future.then(lambda reduced: reduced.value()[0])
    release.begin()  # step hooks run here, in the thread of backward
    # DDP puts the reduced gradients in place in a callback at the end of backward; gradients are freed after it.
    queue = Variable._execution_engine.queue_callback
    queue(lambda: queue(release.free_gradients))

    def step(reduced: torch.futures.Future[list[Tensor]]) -> Tensor:
        result = reduced.value()[0]
        for param, grad in zip(bucket.parameters(), bucket.gradients(), strict=True):
            own, param.grad = param.grad, grad
            release.step(param)
            param.grad = own  # DDP still needs it
        return result

    return future.then(step)
