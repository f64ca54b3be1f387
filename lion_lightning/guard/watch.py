"""The guard's eyes and hands on one optimizer: it measures a step on the device and gates it there."""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lion_lightning.guard.gate import DeviceGate, HostGate, Verdict
from lion_lightning.guard.monitors import Monitors, Poison
from lion_lightning.guard.norms import Grads, SquareSum
from lion_lightning.guard.readings import FACTS, SUMS, VERDICT, Mailbox, Reading
from lion_lightning.guard.sampling import SampledCoordinates
from lion_lightning.guard.thresholds import Thresholds
from lion_lightning.guard.warmup import LinearWarmup, WarmupHook
from lion_lightning.optim import Lion, layout
from lion_lightning.optim.kernels.cpu import Tasks
from lion_lightning.optim.kernels.measures import NOTHING

Reduce = Callable[[Tensor], Tensor]
Judged = tuple[Verdict, Any]
"""The verdict, and by how much the Trainer is still to clip."""
SQUARES, BACKWARD_LOSS = SUMS.index("squares"), SUMS.index("backward_loss")


@dataclass(slots=True)
class Losses:
    """Loss sums of the micro-batches since the last reading; device tensors, read by nobody on the way."""

    total: Tensor | float = 0.0
    samples: int = 0
    nonfinite: Tensor | float = 0.0
    share: float = 0.0
    backward: Tensor | float = math.nan
    is_first: bool = True
    micro_square: Tensor | float = math.nan

    def add(self, loss: Tensor | float, samples: int) -> None:
        """Takes in what `training_step` returned."""
        self.total = self.total + _mean(loss) * samples
        self.samples += samples

    def before_backward(self, loss: Tensor, judged: bool, accumulate: int = 1) -> Tensor | float:
        """Takes in what backward is called on, and returns its mean, a number where reading it is free.

        Args:
            judged: whether its size may be compared from step to step.
            accumulate: what Lightning divided it by; also where a step at the end of an epoch has fewer micro-batches.
        """
        value = _mean(loss)
        self.share += 1 / accumulate
        if isinstance(value, Tensor):
            self.nonfinite = self.nonfinite + (~value.isfinite()).float()
        elif not math.isfinite(value):
            self.nonfinite += 1.0
        if judged:
            self.backward = value if self.is_first else self.backward + value
        self.is_first = False
        return value

    def state_dict(self) -> dict[str, float]:
        return {field.name: float(getattr(self, field.name)) for field in fields(self)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


class OptimizerWatch:
    """Everything the guard keeps about one optimizer.

    Args:
        optimizer: of torch or ours.
        thresholds: of the rules.
        warmup: its own, though all of a run go alike.
        rank, world_size: of this process.
        reduce: sums a vector over all ranks; the one communication of a step.
        acts: whether the gate's verdicts are carried out.
        scaled: whether a GradScaler steps the optimizer: it then owns `grad_scale` and `found_inf` of fused ones.
        joins_step: whether a Lion on a CPU may be judged inside its step: it has looked up all gradients there, which
            is most of the work in a small model. For a process that is alone with one optimizer, and does not clip.
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
        joins_step: bool = False,
    ) -> None:
        self.optimizer, self.rank, self.world_size, self.acts = optimizer, rank, world_size, acts
        self._scaled, self._reduce = scaled, reduce
        self.warmup = WarmupHook(optimizer, warmup)
        self._device = layout.local(self._params()[0]).device
        self.gate: Any = (HostGate if self._device.type == "cpu" else DeviceGate)(thresholds)
        self.monitors, self.mailbox = Monitors(thresholds), Mailbox()
        self.sample = SampledCoordinates(optimizer) if isinstance(optimizer, Lion) else None
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        self._takes_scalars = (isinstance(optimizer, Lion) or fused) and not (fused and scaled)
        self._sharded = {number for number, param in enumerate(self._params()) if layout.is_sharded(param)}
        self._whole_squares, self._sharded_squares = SquareSum(), SquareSum()
        self.measures_noise = not scaled and not self._sharded
        self._joins_step = joins_step and self.sample is not None and self._device.type == "cpu"
        self._witness = next((param for param in self._params() if param.requires_grad), self._params()[0])
        self._clear = self._clear_after_step()

    def _clear_after_step(self) -> Any:
        return self.optimizer.register_step_post_hook(lambda *_: self._forget_verdict())

    def attach(self) -> None:
        """Puts the hooks on the optimizer again after a `remove`."""
        self.warmup.attach()
        self._clear = self._clear_after_step()

    def remove(self) -> None:
        """Leaves the optimizer as it was found."""
        self.warmup.remove()
        self._clear.remove()
        self._forget_verdict()
        if self._joins_step:
            self.optimizer.before_update = None  # type: ignore[attr-defined]

    def before_step(self, losses: Losses, clip_val: float | None, facts: Sequence[float]) -> bool:
        """Measures the final gradients, adds up over ranks, judges, and gates the coming step; or sees to it that this
        is done inside the step.

        Args:
            losses: of the micro-batches since the last reading.
            clip_val: norm that the Trainer clips to afterwards.
            facts: by the names of `readings.FACTS`.

        Returns:
            Whether there were gradients to judge.
        """
        if self._joins_step and clip_val is None and self._will_look():
            self.optimizer.before_update = partial(self._judge_tasks, losses, facts)  # type: ignore[attr-defined]
            return True
        return self._judge_gradients(losses, clip_val, facts)[0]

    def _will_look(self) -> bool:
        """Whether the step is Lion's own, with gradients and momentum: not where they are released in backward."""
        own = "_update" not in vars(self.optimizer)
        return own and self._witness.grad is not None and bool(self.optimizer.state)

    def _judge_tasks(self, losses: Losses, facts: Sequence[float], tasks: Tasks | None) -> bool:
        """Whether the step is to be another one than it would have been."""
        surveyed = self.sample.survey(tasks) if tasks is not None and self.sample is not None else None
        if surveyed is None:
            return self._judge_gradients(losses, None, facts)[1]
        sums = self._sums(losses, surveyed[0], surveyed[1:], True)
        verdict, still_to_clip = self._judge_on_host(sums, None, facts)
        return self.acts and self._gate(verdict, still_to_clip)

    @torch.no_grad()
    def _judge_gradients(self, losses: Losses, clip_val: float | None, facts: Sequence[float]) -> tuple[bool, bool]:
        """Whether there were gradients to judge, and whether the step is to be another one than it would have been."""
        grads = self._grads()
        measured = self.sample.measure() if self.sample is not None else NOTHING
        sums = self._sums(losses, self._squares(grads), measured, bool(grads))
        judge = self._judge_on_host if isinstance(self.gate, HostGate) else self._judge_on_device
        verdict, still_to_clip = judge(sums, clip_val, facts)
        return bool(grads), bool(grads) and self.acts and self._gate(verdict, still_to_clip)

    def _judge_on_host(self, sums: list[Any], clip_val: float | None, facts: Sequence[float]) -> Judged:
        numbers = [float(value) for value in sums]
        if self._reduce is not None:
            numbers = self._reduce(torch.tensor(numbers, dtype=torch.float64)).tolist()
        norm = math.sqrt(numbers[SQUARES])
        # The clamp would hide an infinite norm.
        judged = min(norm, clip_val) if clip_val is not None and math.isfinite(norm) else norm
        verdict = self.gate.judge(judged, numbers[BACKWARD_LOSS])
        acted = verdict.skip != 0 or verdict.factor != 1 or any(numbers[len(SUMS) :])  # the last: bad losses
        self.mailbox.post([*numbers, norm, verdict.factor, verdict.skip, verdict.norm_z, verdict.loss_z], facts, acted)
        return verdict, norm / judged if judged else 1.0

    def _judge_on_device(self, sums: list[Any], clip_val: float | None, facts: Sequence[float]) -> Judged:
        vector = torch.stack([_scalar(value, self._device) for value in sums])
        vector = vector if self._reduce is None else self._reduce(vector)
        norm = vector[SQUARES].sqrt()
        judged = norm if clip_val is None else torch.where(norm.isfinite(), norm.clamp(max=clip_val), norm)
        verdict = self.gate.judge(judged, vector[BACKWARD_LOSS])
        judgement = torch.stack([norm, verdict.factor, verdict.skip, verdict.norm_z, verdict.loss_z])
        self.mailbox.post(torch.cat([vector, judgement]), facts)
        return verdict, norm / judged

    def read(self, flush: bool = False) -> Reading | None:
        """The reading of the step before the latest, if it was not read yet; with `flush` also the latest."""
        values = self.mailbox.take(flush)
        return None if values is None else Reading.unpack(values, self.world_size)

    def unread(self) -> list[Reading]:
        """Those that `read` has yet to give; waits for the latest."""
        return [Reading.unpack(values, self.world_size) for values in self.mailbox.waiting()]

    @torch.no_grad()
    def zero_momentum(self) -> None:
        for param in self._params():
            for key, value in self.optimizer.state.get(param, {}).items():
                if key in ("exp_avg", "exp_avg_scale"):
                    layout.local(value).zero_()
        self.monitors.poison.recovered()

    def rebaseline(self, kind: str) -> None:
        """Starts the history of the rule that saw `kind` afresh."""
        if kind == "poison":
            self.monitors.poison = Poison(self.monitors.thresholds)
        else:
            self.gate.forget()

    def is_suspicious(self, ignore_divergence: bool) -> bool:
        """Whether a rule is on its way to a verdict, or the latest step, of which no rule knows yet, was not finite."""
        unread = self.unread()
        if unread and not unread[-1].is_finite:
            return True
        monitors = self.monitors
        if len(unread) > 1:  # they arrive at the next look
            monitors = deepcopy(monitors)
            for reading in unread[:-1]:
                monitors.observe(reading)
        return monitors.is_suspicious(ignore_divergence)

    def is_latest_finite(self) -> bool:
        """Whether the latest step was finite; waits for it."""
        unread = self.unread()
        return not unread or unread[-1].is_finite

    @torch.no_grad()
    def is_finite(self) -> Tensor:
        """Whether every weight and all optimizer state of this process is finite; bool of shape ()."""
        state = (value for param in self._params() for value in self.optimizer.state.get(param, {}).values())
        floats = [*self._params(), *(value for value in state if isinstance(value, Tensor))]
        tensors = [layout.local(tensor) for tensor in floats if tensor.is_floating_point()]
        return torch.stack([tensor.isfinite().all().cpu() for tensor in tensors]).all()

    def squared_norm(self) -> Tensor | float:
        """Of the gradients of this process as they are now, a number or of shape ()."""
        return self._whole_squares(self._grads())

    def _params(self) -> list[Tensor]:
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def _grads(self) -> Grads:
        """Looked up once a step: in a small model that is what takes the time."""
        return {i: grad for i, param in enumerate(self._params()) if (grad := param.grad) is not None}

    def _squares(self, grads: Grads) -> Tensor | float:
        """Their sum is, over all ranks, the square of the norm."""
        whole, sharded = grads, Grads()
        if self._sharded:
            whole, params = {i: grad for i, grad in grads.items() if i not in self._sharded}, self._params()
            sharded = {i: layout.local_grad(grads[i], params[i]) for i in grads if i in self._sharded}
        # On a GPU a tensor tells the device where there are no gradients at all.
        squares: Tensor | float = 0.0 if isinstance(self.gate, HostGate) else torch.zeros((), device=self._device)
        if sharded:
            squares = squares + self._sharded_squares(sharded)
        if whole:  # every rank has it
            squares = squares + self._whole_squares(whole) / self.world_size
        return squares

    def _sums(self, losses: Losses, squares: Any, measured: Sequence[Any], has_gradients: bool) -> list[Any]:
        """Scalars, in the order of `readings.SUMS` and then one for each rank; numbers or tensors of shape ()."""
        share = losses.share or 1.0
        bad: list[Any] = [0.0] * self.world_size
        bad[self.rank] = losses.nonfinite
        return [
            losses.total,
            losses.samples,
            squares,
            # Gradients of a tail are divided by more than there is: nothing to compare with that of one micro-batch.
            losses.micro_square / self.world_size if share > 0.999 else math.nan,
            # Without gradients there is no step to gate: the loss of the step before is what divergence goes by.
            losses.backward / (share * self.world_size) if has_gradients else math.nan,
            *(measured if len(measured) else NOTHING),
            *bad,
        ]

    def _gate(self, verdict: Verdict, still_to_clip: Any) -> bool:
        """Hands the verdict to the optimizer, or carries it out on gradients that the Trainer has yet to clip.

        Returns:
            False where the step is known to be taken as it is.
        """
        self._forget_verdict()  # of a step that a GradScaler did not make
        on_host = not isinstance(verdict.factor, Tensor)
        if on_host and not verdict.skip and verdict.factor == 1:
            return False
        if self._takes_scalars:
            self.optimizer.found_inf = _scalar(verdict.skip, self._device)  # type: ignore[attr-defined]
            self.optimizer.grad_scale = _scalar(verdict.factor, self._device)  # type: ignore[attr-defined]
        elif float(verdict.skip):  # an optimizer without such inputs: on a GPU this waits for the device
            for param in () if self._scaled else self._params():  # a GradScaler skips by itself, and must see why
                param.grad = None
        elif float(verdict.factor) != 1:
            torch._foreach_div_(list(self._grads().values()), verdict.factor * still_to_clip)
        return True

    def _forget_verdict(self) -> None:
        if self._takes_scalars:
            self.optimizer.grad_scale = self.optimizer.found_inf = None  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        return {
            "warmup": self.warmup.warmup.state_dict(),
            "rules": self.rules_state(),
            "mail": self.mailbox.state_dict(),
            "signs": None if self.sample is None else self.sample.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.warmup.warmup.load_state_dict(state["warmup"])
        self.load_rules_state(state["rules"])
        if all(len(vector) == len(SUMS) + self.world_size + len(VERDICT) + len(FACTS) for vector in state["mail"]):
            self.mailbox.load_state_dict(state["mail"])  # else from another number of ranks: they are lost
        if self.sample is not None:
            self.sample.load_state_dict(state["signs"])

    def rules_state(self) -> dict[str, Any]:
        """Of gate and monitors; what a snapshot keeps."""
        return {"gate": self.gate.state_dict(), "monitors": self.monitors.state_dict()}

    def load_rules_state(self, state: dict[str, Any]) -> None:
        self.gate.load_state_dict(state["gate"])
        self.monitors.load_state_dict(state["monitors"])

    def put_back(self, rules: dict[str, Any]) -> None:
        """The run was rewound: the rules are as they were then, and what was measured since means nothing."""
        self.load_rules_state(rules)
        self.mailbox.clear()
        if self.sample is not None:
            self.sample.forget()


def _scalar(value: Tensor | float, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(device, torch.float32)
    return torch.full((), float(value), device=device)


def _mean(loss: Tensor | float) -> Tensor | float:
    """A number where reading it is free."""
    if isinstance(loss, float):
        return loss
    if loss.is_cpu and loss.numel() == 1:
        return loss.item()
    return loss.detach().float().mean()
