"""The guard's eyes and hands on one optimizer: it measures a step on the device and gates it there."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lion_lightning.guard.gate import OutlierGate, Verdict
from lion_lightning.guard.monitors import Monitors, Poison
from lion_lightning.guard.readings import FACTS, SUMS, VERDICT, Mailbox, Reading
from lion_lightning.guard.sampling import SampledCoordinates
from lion_lightning.guard.thresholds import Thresholds
from lion_lightning.guard.warmup import LinearWarmup, WarmupHook
from lion_lightning.optim import Lion, views

Reduce = Callable[[Tensor], Tensor]


class Losses:
    """Loss sums of the micro-batches since the last reading; device tensors, read by nobody on the way."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.samples = 0
        self.nonfinite: Tensor | float = 0.0
        self.share = 0.0
        self.backward: Tensor | float = math.nan
        self.micro_square: Tensor | float = math.nan

    def add(self, loss: Tensor, samples: int) -> None:
        self.total = self.total + loss.detach().float().mean() * samples
        self.samples += samples

    def before_backward(self, loss: Tensor, judged: bool, accumulate: int = 1) -> None:
        """Takes in what backward is called on.

        Args:
            judged: whether its size may be compared from step to step.
            accumulate: what Lightning divided it by; also where a step at the end of an epoch has fewer micro-batches.
        """
        loss = loss.detach().float().mean()
        self.share += 1 / accumulate
        self.nonfinite = self.nonfinite + (~loss.isfinite()).float()
        if judged:
            first = isinstance(self.backward, float)
            self.backward = loss if first else self.backward + loss

    def state_dict(self) -> dict[str, float]:
        return {name: float(value) for name, value in vars(self).items()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        vars(self).update(state)


class OptimizerWatch:
    """Everything the guard keeps about one optimizer.

    Args:
        optimizer: of torch or ours.
        thresholds: of the rules.
        warmup: its own, though all of a run go alike.
        rank, world_size: of this process.
        acts: whether the gate's verdicts are carried out.
        scaled: whether a GradScaler steps the optimizer: it then owns `grad_scale` and `found_inf` of fused ones.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        thresholds: Thresholds,
        warmup: LinearWarmup,
        rank: int = 0,
        world_size: int = 1,
        acts: bool = True,
        scaled: bool = False,
    ) -> None:
        self.optimizer, self.rank, self.world_size, self.acts = optimizer, rank, world_size, acts
        self._scaled = scaled
        self.warmup = WarmupHook(optimizer, warmup)
        self.gate, self.monitors, self.mailbox = OutlierGate(thresholds), Monitors(thresholds), Mailbox()
        self.sample = SampledCoordinates(optimizer) if isinstance(optimizer, Lion) else None
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        self._takes_scalars = (isinstance(optimizer, Lion) or fused) and not (fused and scaled)
        self.measures_noise = not scaled and not any(views.is_sharded(param) for param in self._params())
        self._clear = optimizer.register_step_post_hook(lambda *_: self._forget_verdict())

    def remove(self) -> None:
        """Leaves the optimizer as it was found."""
        self.warmup.remove()
        self._clear.remove()
        self._forget_verdict()

    @torch.no_grad()
    def before_step(self, losses: Losses, reduce: Reduce, clip_val: float | None, facts: Sequence[float]) -> bool:
        """Measures the final gradients, adds up over ranks, judges, and gates the coming step.

        Args:
            losses: of the micro-batches since the last reading.
            reduce: sums a vector over all ranks; the one communication of the step.
            clip_val: norm that the Trainer clips to afterwards.
            facts: by the names of `readings.FACTS`.

        Returns:
            Whether there were gradients to judge.
        """
        grads = [(param, views.local_grad(param.grad, param)) for param in self._params() if param.grad is not None]
        device = grads[0][1].device if grads else views.local(next(iter(self._params()))).device
        vector = reduce(self._sums(grads, losses, device))
        norm = vector[SUMS.index("squares")].sqrt()
        # The clamp would hide an infinite norm.
        judged = norm if clip_val is None else torch.where(norm.isfinite(), norm.clamp(max=clip_val), norm)
        verdict = self.gate.judge(judged, vector[SUMS.index("backward_loss")])
        judgement = torch.stack([norm, verdict.factor, verdict.skip, verdict.norm_z, verdict.loss_z])
        self.mailbox.post(torch.cat([vector, judgement]), facts)
        if grads and self.acts:
            self._gate(verdict, norm / judged)
        return bool(grads)

    def read(self, flush: bool = False) -> Reading | None:
        """The reading of the step before the latest, if it was not read yet; with `flush` also the latest."""
        values = self.mailbox.take(flush)
        return None if values is None else Reading.unpack(values, self.world_size)

    @torch.no_grad()
    def zero_momentum(self) -> None:
        for param in self._params():
            for key, value in self.optimizer.state.get(param, {}).items():
                if key in ("exp_avg", "exp_avg_scale"):
                    views.local(value).zero_()
        self.monitors.poison.recovered()

    def rebaseline(self, kind: str) -> None:
        """Starts the history of the rule that saw `kind` afresh."""
        if kind == "poison":
            self.monitors.poison = Poison(self.monitors.thresholds)
        else:
            self.gate.forget()

    def is_suspicious(self, ignore_divergence: bool) -> bool:
        """Whether a rule is on its way to a verdict, or the latest step, of which no rule knows yet, was not finite."""
        latest = self.mailbox.latest()
        reading = None if latest is None else Reading.unpack(latest, self.world_size)
        if reading is not None and not reading.is_finite:
            return True
        return self.monitors.is_suspicious(ignore_divergence)

    @torch.no_grad()
    def is_finite(self) -> Tensor:
        """Whether every weight and all optimizer state of this process is finite; bool of shape ()."""
        state = (value for param in self._params() for value in self.optimizer.state.get(param, {}).values())
        floats = [*self._params(), *(value for value in state if isinstance(value, Tensor))]
        tensors = [views.local(tensor) for tensor in floats if tensor.is_floating_point()]
        return torch.stack([tensor.isfinite().all().cpu() for tensor in tensors]).all()

    def squared_norm(self) -> Tensor:
        """Of the gradients of this process as they are now, shape ()."""
        return _squares([views.local(param.grad) for param in self._params() if param.grad is not None])

    def _params(self) -> Iterable[Tensor]:
        return (param for group in self.optimizer.param_groups for param in group["params"])

    def _sums(self, grads: list[tuple[Tensor, Tensor]], losses: Losses, device: torch.device) -> Tensor:
        sharded = [grad for param, grad in grads if views.is_sharded(param)]
        whole = [grad for param, grad in grads if not views.is_sharded(param)]
        squares = torch.zeros((), device=device)
        if sharded:
            squares = squares + _squares(sharded)
        if whole:  # every rank has them
            squares = squares + _squares(whole) / self.world_size
        sampled = self.sample.measure() if self.sample is not None else {}
        zero = torch.zeros((), device=device)
        share = losses.share or 1.0
        # Gradients of a tail are divided by more than there is: nothing to compare with that of one micro-batch.
        micro = losses.micro_square / self.world_size if share > 0.999 else math.nan
        parts = {"loss": losses.total, "samples": losses.samples, "squares": squares, "micro_squares": micro, **sampled}
        parts["backward_loss"] = losses.backward / (share * self.world_size)
        sums = [_scalar(parts.get(name, zero), device) for name in SUMS]
        bad = [zero] * self.world_size
        bad[self.rank] = _scalar(losses.nonfinite, device)
        return torch.stack([*sums, *bad])

    def _gate(self, verdict: Verdict, still_to_clip: Tensor) -> None:
        """Hands the verdict to the optimizer, or carries it out on gradients that the Trainer has yet to clip."""
        factor = verdict.factor
        if self._takes_scalars:
            self.optimizer.found_inf = verdict.skip  # type: ignore[attr-defined]
            # Where reading is free, a step that is taken as it is costs torch's fused kernels no extra write.
            if factor.device.type != "cpu" or float(factor) != 1:
                self.optimizer.grad_scale = factor  # type: ignore[attr-defined]
            return
        if float(verdict.skip):  # an optimizer without such inputs: on a GPU this waits for the device
            for param in () if self._scaled else self._params():  # a GradScaler skips by itself, and must see why
                param.grad = None
        elif float(factor) != 1:
            grads = [param.grad for param in self._params() if param.grad is not None]
            torch._foreach_div_(grads, factor * still_to_clip)

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
            self.mailbox.load_state_dict(state["mail"])  # else from another number of ranks: one reading is lost
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


def _squares(grads: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm(grads, 2.0)
    return torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]).square().sum()


def _scalar(value: Tensor | float, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(device, torch.float32)
    return torch.full((), float(value), device=device)
