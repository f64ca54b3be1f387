"""Measures and gates the steps of one optimizer, on the device; the host reads the values one step later."""

import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lion_lightning.guard.gate import Gate, Verdict
from lion_lightning.guard.lr_warmup import LinearWarmup, WarmupHook, with_closure
from lion_lightning.guard.reading import FACTS, SUMS, UPDATE_SUMS, VERDICT, Reading, unpack
from lion_lightning.guard.rules import RuleSet, Thresholds
from lion_lightning.guard.sampled_coordinates import SampledCoordinates
from lion_lightning.guard.snapshots import nonfinite
from lion_lightning.optim import Lion, layout

Reduce = Callable[[Tensor], Tensor]
SQUARES, BACKWARD_LOSS = SUMS.index("squares"), SUMS.index("backward_loss")


class AsyncReadback:
    """Hands device vectors to the host one step late: by then they are computed, and reading them does not wait."""

    def __init__(self) -> None:
        self._queue: deque[Callable[[], list[float]]] = deque()

    def post(self, vector: Tensor, facts: Sequence[float] = ()) -> None:
        """Starts a copy to the host.

        Args:
            vector: on any device, shape (n,).
            facts: numbers that the host knows; appended to the vector on arrival.
        """
        event = None
        if vector.device.type == "cuda":
            pinned = torch.empty(vector.shape, dtype=vector.dtype, device="cpu", pin_memory=True)
            vector = pinned.copy_(vector, non_blocking=True)
            event = torch.cuda.Event()
            event.record()

        def arrived() -> list[float]:
            if event is not None:
                event.synchronize()
            return [*vector.tolist(), *facts]

        self._queue.append(arrived)

    def take(self, flush: bool = False) -> list[float] | None:
        """Removes and returns the oldest vector, if there is a newer one or if `flush`; else None."""
        return self._queue.popleft()() if len(self._queue) >= (1 if flush else 2) else None

    def state_dict(self) -> list[list[float]]:
        """All vectors, oldest first, which stay in the queue; waits for the newest."""
        return [arrived() for arrived in self._queue]

    def load_state_dict(self, state: list[list[float]]) -> None:
        self._queue.clear()
        for values in state:
            self.post(torch.tensor(values, dtype=torch.float64, device="cpu"))


@dataclass(slots=True)
class Losses:
    """Loss sums of the micro-batches since the last reading, accumulated on the device without synchronising.

    Attributes:
        total, samples: sum of the losses that `training_step` returned, weighted by samples, and the samples.
        nonfinite: micro-batches with a loss that is not finite.
        share: micro-batches seen, as a share of those that Lightning averages over.
        backward: sum of the losses that backward was called on; NaN where their size does not compare.
        micro_square: squared gradient norm of the first micro-batch alone; NaN where it was not measured.
    """

    total: Tensor | float = 0.0
    samples: int = 0
    nonfinite: Tensor | float = 0.0
    share: float = 0.0
    backward: Tensor | float = math.nan
    micro_square: Tensor | float = math.nan

    def add(self, loss: Tensor, samples: int) -> None:
        """Takes in the loss that `training_step` returned for a micro-batch of `samples`."""
        self.total = self.total + _mean(loss) * samples
        self.samples += samples

    def before_backward(self, loss: Tensor, comparable: bool, accumulate: int = 1) -> None:
        """Takes in the argument of backward.

        Args:
            loss: any shape; its mean is taken.
            comparable: whether its size may be compared from step to step.
            accumulate: what Lightning divided the loss by, also in a shorter last step of an epoch.
        """
        value = _mean(loss)
        if comparable:
            self.backward = self.backward + value if self.share else value
        self.share += 1 / accumulate
        self.nonfinite = self.nonfinite + (~value.isfinite()).float()

    def state_dict(self) -> dict[str, float]:
        return {field.name: float(getattr(self, field.name)) for field in fields(self)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        for field in fields(self):
            setattr(self, field.name, float(state[field.name]))


class GatedRules:
    """Gate, rules and unread readings of one optimizer: what a run and a replay of it have in common.

    Args:
        thresholds: of gate and rules.
        world_size: number of ranks that add up a reading.
        skips_bad_losses, disabled: see `Gate`.
    """

    scaled = False
    """Whether a GradScaler steps the optimizer, which then skips steps whose gradients have overflowed."""

    def __init__(
        self,
        thresholds: Thresholds,
        world_size: int = 1,
        skips_bad_losses: bool = False,
        disabled: Collection[str] = frozenset(),
    ) -> None:
        self.world_size = world_size
        self.gate = Gate(thresholds, skips_bad_losses, disabled)
        self.rules, self.readback = RuleSet(thresholds), AsyncReadback()
        self.rate = LinearWarmup(0)
        self.sample: SampledCoordinates | None = None

    def judge(self, vector: Tensor, clip_val: float | None, facts: Sequence[float]) -> tuple[Verdict, Tensor]:
        """Judges a step and posts its reading.

        Args:
            vector: sums over all ranks in the order of `reading.unpack`, float64.
            clip_val: norm that the Trainer clips to afterwards.
            facts: in the order of `reading.FACTS`, and perhaps the rate.

        Returns:
            The verdict, and the factor by which the Trainer has yet to clip.
        """
        norm = vector[SQUARES].sqrt()
        judged = norm if clip_val is None else torch.where(norm.isfinite(), norm.clamp(max=clip_val), norm)
        verdict = self.gate.judge(judged, vector[BACKWARD_LOSS])
        values = [norm, verdict.factor, verdict.skip, verdict.norm_z, verdict.loss_z]
        self.readback.post(torch.cat([vector, torch.stack([value.to(vector.dtype) for value in values])]), facts)
        return verdict, norm / judged

    def read(self, flush: bool = False) -> Reading | None:
        """The reading of the step before the latest, if it was not read yet; with `flush` also the latest."""
        values = self.readback.take(flush)
        return None if values is None else unpack(values, self.world_size)

    def unread(self) -> list[Reading]:
        """Readings that `read` has yet to return; waits for the latest."""
        return [unpack(values, self.world_size) for values in self.readback.state_dict()]

    def is_latest_finite(self) -> bool:
        """Whether the latest step was finite; waits for it."""
        return all(reading.is_finite for reading in self.unread()[-1:])

    def is_finite(self) -> bool:
        """Whether weights and optimizer state are finite; there are none in a replay."""
        return True

    def zero_momentum(self) -> None:
        self.rules.stuck_momentum.low_steps = 0

    def rules_state(self) -> dict[str, Any]:
        """State of gate and rules, as a snapshot keeps it."""
        return {"gate": self.gate.state_dict(), "rules": self.rules.state_dict()}

    def load_rules_state(self, state: dict[str, Any]) -> None:
        self.gate.load_state_dict(state["gate"])
        self.rules.load_state_dict(state["rules"])

    def return_to(self, rules: dict[str, Any]) -> None:
        """Restores the rules' state of a snapshot, as `rules_state` gave it, and drops the measurements made since."""
        self.load_rules_state(rules)
        self.readback.load_state_dict([])
        if self.sample is not None:
            self.sample.forget()


class StepMonitor(GatedRules):
    """Measures the steps of one optimizer, gates them, and warms up its learning rate.

    Our Lion and torch's fused optimizers take the gate's verdict as device scalars (`grad_scale`, `found_inf`). For
    others gradients are divided in place, and a step is skipped by hiding the gradients from the optimizer while it
    steps; that waits for the device on a GPU.

    Args:
        optimizer: of torch or ours.
        thresholds: of gate and rules.
        warmup: of this optimizer alone; all optimizers of a run warm up over the same number of steps.
        rank, world_size: of this process.
        reduce: sums a vector over all ranks; the one communication of a step.
        acts: whether the gate's verdicts are carried out.
        scaled: whether a GradScaler steps the optimizer: it then owns `grad_scale` and `found_inf` of fused ones.
        skips_bad_losses, disabled: see `Gate`.
        contains_errors: whether an error in a hook on the optimizer's step is kept in `failure`, and the step goes on.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        thresholds: Thresholds,
        warmup: LinearWarmup,
        rank: int = 0,
        world_size: int = 1,
        reduce: Reduce | None = None,
        acts: bool = True,
        scaled: bool = False,
        skips_bad_losses: bool = False,
        disabled: Collection[str] = frozenset(),
        contains_errors: bool = False,
    ) -> None:
        super().__init__(thresholds, world_size, skips_bad_losses, disabled)
        self.optimizer, self.rank, self.acts, self.scaled = optimizer, rank, acts, scaled
        self._reduce, self._contains_errors = reduce, contains_errors
        self.failure: str | None = None
        """What a hook on the optimizer's step has met; the hooks do nothing from then on."""
        self.is_measured = False
        """Whether the step under way has been measured: further closures of the same step are not."""
        self.defers = False
        """Whether gradients are measured inside the optimizer's step: the module changes them before it."""
        self._deferred: tuple[Losses, Sequence[float]] | None = None
        self._is_in_step = False
        """Between the first hook before a step and the first one after it. torch before 2.13 runs both twice for an
        optimizer whose `step` calls that of its base class."""
        self.steps_unseen = 0
        """Optimizer steps that were not announced by `before_step`."""
        self._handles = [optimizer.register_step_pre_hook(self._safely(self._begin_step))]
        self.warmup = WarmupHook(optimizer, warmup, self._safely)
        self._handles.append(optimizer.register_step_post_hook(self._safely(self._end_step)))
        self._device = layout.local(self._params()[0]).device
        self._dtype = torch.float32 if self._device.type == "mps" else torch.float64
        self.rate, self.sample = warmup, SampledCoordinates(optimizer) if isinstance(optimizer, Lion) else None
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        self._takes_scalars = (isinstance(optimizer, Lion) or fused) and not (fused and scaled)
        self.measures_noise = not scaled and not any(layout.is_sharded(param) for param in self._params())
        self._skips = False
        self._hidden: dict[Tensor, Tensor] = {}

    def begin_batch(self) -> None:
        """Forgets a step that an exception ended in an earlier batch."""
        self.is_measured = self._is_in_step = False
        self._deferred = None

    def remove(self, but_warmup: bool = False) -> None:
        """Leaves the optimizer as it was found; with `but_warmup` the warm-up goes on."""
        if not but_warmup:
            self.warmup.remove()
        for handle in self._handles:
            handle.remove()
        self._clean_up()

    def scheduled_rate(self) -> float:
        """The largest learning rate of the groups, without the guard's warm-up; NaN where the host has none."""
        rates: list[Any] = [group.get("lr") for group in self.optimizer.param_groups]
        on_host = [rate for rate in rates if not isinstance(rate, Tensor) or rate.device.type == "cpu"]
        return max((float(rate) for rate in on_host if rate is not None), default=math.nan)

    @torch.no_grad()
    def before_step(self, losses: Losses, clip_val: float | None, facts: Sequence[float]) -> bool:
        """Measures the gradients, adds up over ranks, judges, and gates the coming step; if `defers`, in that step.

        Args:
            losses: of the micro-batches since the last reading.
            clip_val: norm that the Trainer clips to afterwards.
            facts: in the order of `reading.FACTS`, and perhaps the rate.

        Returns:
            Whether there were gradients.
        """
        self.is_measured = not self.scaled  # a GradScaler may make no step at all, and takes no further closures
        if self.defers:
            # The trainer may clip before the step, which a norm of the first micro-batch does not compare with.
            self._deferred = replace(losses, micro_square=math.nan), facts
            return any(param.grad is not None for param in self._params())
        return self._measure(losses, clip_val, facts)

    def _measure(self, losses: Losses, clip_val: float | None, facts: Sequence[float]) -> bool:
        grads = [param.grad for param in self._params() if param.grad is not None]
        update_sums = self.sample.measure() if self.sample is not None else ()
        vector = torch.stack([self._scalar(value) for value in self._sums(losses, update_sums, bool(grads))])
        vector = vector if self._reduce is None else self._reduce(vector)
        verdict, still_to_clip = self.judge(vector, clip_val, facts)
        if grads and self.acts:
            self._gate(verdict, still_to_clip, grads)
        return bool(grads)

    def _sums(self, losses: Losses, update_sums: Sequence[Tensor], has_gradients: bool) -> list[Tensor | float]:
        """Scalars in the order of `reading.unpack`."""
        bad: list[Tensor | float] = [0.0] * self.world_size
        bad[self.rank] = losses.nonfinite
        no_sums: list[Tensor | float] = [0.0] * len(UPDATE_SUMS)
        share = losses.share or 1.0
        return [
            losses.total,
            losses.samples,
            self.squared_norm(shared_by=self.world_size),
            # Gradients of a tail are divided by more than there is and do not compare with those of one micro-batch.
            losses.micro_square / self.world_size if share > 0.999 else math.nan,
            # Without gradients there is no step to gate: divergence then goes by the losses of `training_step`.
            losses.backward / (share * self.world_size) if has_gradients else math.nan,
            *(update_sums or no_sums),
            *bad,
        ]

    def _scalar(self, value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(self._device, self._dtype)
        return torch.full((), float(value), dtype=self._dtype, device=self._device)

    def squared_norm(self, shared_by: int = 1) -> Tensor:
        """Sum of squares of the gradients of this process as they are now, of shape ().

        Args:
            shared_by: ranks that hold the same gradients, where these are not sharded.
        """
        whole: list[Tensor] = []
        sharded: list[Tensor] = []
        for param in self._params():
            if param.grad is not None:
                parts = sharded if layout.is_sharded(param) else whole
                grad = param.grad.coalesce().values() if param.grad.is_sparse else param.grad
                parts.append(layout.local_grad(grad, param))
        squares = _sum_of_squares(whole, self._device, self._dtype) / shared_by
        return squares + _sum_of_squares(sharded, self._device, self._dtype) if sharded else squares

    def _gate(self, verdict: Verdict, still_to_clip: Tensor, grads: list[Tensor]) -> None:
        """Passes the verdict to the optimizer, or carries it out on gradients that the Trainer has yet to clip."""
        self._skips = False  # still set if a GradScaler left out the last step
        if self._takes_scalars:
            self.optimizer.found_inf = verdict.skip  # type: ignore[attr-defined]
            self.optimizer.grad_scale = verdict.factor  # type: ignore[attr-defined]
        elif verdict.skip:
            self._skips = True
        elif float(verdict.factor) != 1:
            for grad in grads:
                grad.div_(float(verdict.factor * still_to_clip))

    def _safely(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """The hook, whose errors are kept in `failure`. Hooks cannot be removed while torch runs through them."""

        def call(*args: Any) -> Any:
            if self.failure is not None:
                return None
            try:
                return hook(*args)
            except Exception as error:
                if not self._contains_errors:
                    raise
                self.failure = f"{hook.__name__}: {type(error).__name__}: {error}"
                return None

        return call

    def _begin_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Settles a step before it and after its closure, which may make the gradients."""
        if not self._is_in_step:
            self.is_measured, self._is_in_step = False, True
        self._settle()
        return None if self._takes_scalars and not self.defers else with_closure(args, kwargs, self._settling)

    def _settling(self, closure: Callable[[], Any]) -> Any:
        loss = closure()
        self._safely(self._settle)()
        return loss

    @torch.no_grad()
    def _settle(self) -> None:
        """Makes a measurement that was deferred, and hides the gradients of a step that is to be skipped."""
        if self._deferred is not None:
            (losses, facts), self._deferred = self._deferred, None
            self._measure(losses, None, facts)
        if not self._skips:
            return
        for param in self._params():
            if param.grad is not None:
                self._hidden[param], param.grad = param.grad, None

    def _end_step(self, *_: Any) -> None:
        if self._is_in_step:
            self.steps_unseen += not self.is_measured and not self.scaled
            self.is_measured = self._is_in_step = False
            self._clean_up()

    def _clean_up(self) -> None:
        """Takes the verdict off the optimizer and returns hidden gradients."""
        if self._takes_scalars:
            self.optimizer.grad_scale = self.optimizer.found_inf = None  # type: ignore[attr-defined]
        for param, grad in self._hidden.items():
            param.grad = grad
        self._skips, self._hidden = False, {}

    @torch.no_grad()
    def zero_momentum(self) -> None:
        for param in self._params():
            for key, value in self.optimizer.state.get(param, {}).items():
                if key in ("exp_avg", "exp_avg_scale"):
                    layout.local(value).zero_()
        super().zero_momentum()

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether every weight and all optimizer state of this process is finite; waits for the device."""
        state = (value for param in self._params() for value in self.optimizer.state.get(param, {}).values())
        tensors = [layout.local(value) for value in (*self._params(), *state) if isinstance(value, Tensor)]
        return all(nonfinite(tensor) is None for tensor in tensors)

    def _params(self) -> list[Tensor]:
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        return {
            "warmup": self.rate.state_dict(),
            **self.rules_state(),
            "unread": self.readback.state_dict(),
            "signs": None if self.sample is None else self.sample.state_dict(),
            "defers": self.defers,
            "clips_outliers": self.gate.clips_outliers,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rate.load_state_dict(state["warmup"])
        self.load_rules_state(state)
        length = len(SUMS) + len(UPDATE_SUMS) + self.world_size + len(VERDICT) + len(FACTS)
        if all(len(values) in (length, length + 1) for values in state["unread"]):
            self.readback.load_state_dict(state["unread"])  # those of another number of ranks are dropped
            self.unread()  # raises for what is not a reading
        if self.sample is not None:
            self.sample.load_state_dict(state["signs"])
        self.defers = bool(state.get("defers", False)) and not self.scaled
        self.gate.clips_outliers &= bool(state.get("clips_outliers", True))


def _mean(loss: Tensor) -> Tensor:
    """The whole of a loss, float32 of shape (); with tensor parallelism it may be a DTensor."""
    loss = loss.detach()
    whole: Tensor = loss.full_tensor() if layout.is_sharded(loss) else loss  # type: ignore[attr-defined]
    return whole.float().mean()


def _sum_of_squares(grads: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Over all elements of all tensors, `dtype` of shape () on `device`."""
    low_precision = [grad for grad in grads if grad.dtype in (torch.bfloat16, torch.float16)]
    others = [grad for grad in grads if grad.dtype not in (torch.bfloat16, torch.float16)]
    norms = [*torch._foreach_norm(others, 2.0)] if others else []
    norms += torch._foreach_norm(low_precision, 2.0, dtype=torch.float32) if low_precision else []
    if not norms:
        return torch.zeros((), device=device, dtype=dtype)
    each = torch.stack([norm.to(device, dtype) for norm in norms])
    if device.type == "cpu" and not each.isfinite().all():  # squares of large fp32 values overflow
        wide = [grad.to(torch.complex128 if grad.is_complex() else torch.float64) for grad in grads]
        each = torch.stack([torch.linalg.vector_norm(grad) for grad in wide])
    return each.square().sum()
