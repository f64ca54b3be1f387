"""What the guard knows of one optimizer step, and how it gets from the device to the host without a wait."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lion_lightning.optim.kernels.measures import MEASURES

SUMS = ("loss", "samples", "squares", "micro_squares", "backward_loss", *MEASURES)
"""What ranks add up; after these comes one count of non-finite losses for each rank."""
VERDICT = ("norm", "factor", "skipped", "norm_z", "loss_z")
"""What the gate made of the sums, the same on every rank."""
FACTS = ("step", "batch_size", "micro_batch_size")
"""What the host knows from the start."""


@dataclass(slots=True)  # made in every step: a frozen one takes three times as long
class Reading:
    """One optimizer step, over all ranks. NaN stands for what was not measured.

    Attributes:
        loss: mean over the samples of the micro-batches that have ended since the step before.
        grad_norm: of the gradient as it was.
        skipped: whether the gate let the step change nothing.
        factor: the gradients were divided by it.
        norm_z, loss_z: robust z of the log norm and of the loss of the same step.
        backward_loss: what backward was called on, summed over the step's micro-batches, mean over ranks.
        flip_rate: share of sampled coordinates whose update changed its sign since the step before.
        cosine: between update and gradient, over the sampled coordinates.
        dead: share of sampled coordinates that move though their gradient is exactly 0.
        bad_ranks: those that had a loss that is not finite.
        step: number of the step, from 1 on.
        batch_size: samples that went into it.
        micro_norm: norm of the gradient of its first micro-batch alone, of `micro_batch_size` samples.
    """

    loss: float = math.nan
    grad_norm: float = math.nan
    factor: float = 1.0
    skipped: bool = False
    norm_z: float = math.nan
    loss_z: float = math.nan
    backward_loss: float = math.nan
    flip_rate: float = math.nan
    cosine: float = math.nan
    dead: float = math.nan
    bad_ranks: tuple[int, ...] = ()
    step: int = 0
    batch_size: int = 0
    micro_norm: float = math.nan
    micro_batch_size: int = 0

    @property
    def level(self) -> float:
        """The loss of this step if backward was called on one that compares, else that of the micro-batches before."""
        return self.backward_loss if math.isfinite(self.backward_loss) else self.loss

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.grad_norm) and not self.bad_ranks

    @classmethod
    def unpack(cls, values: Sequence[float], world_size: int) -> "Reading":
        """From the numbers of `SUMS`, of each rank, of `VERDICT` and of `FACTS`, in that order."""
        loss, samples, _, micro_squares, backward_loss, *measured = values[: len(SUMS)]
        flips, signs, projection, update_squares, grad_squares, dead = measured
        bad, rest = values[len(SUMS) :][:world_size], values[len(SUMS) + world_size :]
        norm, factor, skipped, norm_z, loss_z, step, batch_size, micro_batch_size = rest
        scale = math.sqrt(max(0.0, update_squares * grad_squares))
        return cls(
            loss=_share(loss, samples),
            grad_norm=norm,
            factor=factor,
            skipped=skipped != 0,
            norm_z=norm_z,
            loss_z=loss_z,
            backward_loss=backward_loss,
            flip_rate=_share(flips, signs),
            cosine=_share(projection, scale),
            dead=_share(dead, update_squares),
            bad_ranks=tuple(rank for rank, count in enumerate(bad) if count > 0) if any(bad) else (),
            step=int(step),
            batch_size=int(batch_size),
            micro_norm=math.sqrt(micro_squares) if micro_squares >= 0 else math.nan,
            micro_batch_size=int(micro_batch_size),
        )


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


class _Post(NamedTuple):
    """A vector on its way, and the event after which it is there."""

    vector: Tensor | list[float]
    event: "torch.cuda.Event | None"
    facts: list[float]
    urgent: bool

    def arrived(self) -> list[float]:
        """Its numbers and then the facts; waits for the device if it has to."""
        if self.event is not None:
            self.event.synchronize()
        return [*(self.vector if isinstance(self.vector, list) else self.vector.tolist()), *self.facts]


class Mailbox:
    """Hands device vectors to the host a step late or later: by then they are computed, and nobody waits for them."""

    def __init__(self) -> None:
        self._posts: deque[_Post] = deque()
        self._is_urgent = False
        """Whether an urgent vector may be taken."""

    def post(self, vector: Tensor | list[float], facts: Sequence[float] = (), urgent: bool = False) -> None:
        """Starts a vector on its way.

        Args:
            facts: what the host knows; appended to the vector on arrival.
            urgent: whether it should be taken as soon as it can be.
        """
        self._is_urgent |= bool(self._posts) and self._posts[-1].urgent
        if isinstance(vector, list) or vector.device.type != "cuda":
            self._posts.append(_Post(vector, None, list(facts), urgent))
            return
        host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
        host.copy_(vector, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._posts.append(_Post(host, event, list(facts), urgent))

    def take(self, flush: bool = False) -> list[float] | None:
        """The oldest vector, if there is a newer one or if `flush`; else None."""
        if len(self._posts) < (1 if flush else 2):
            return None
        self._is_urgent &= len(self._posts) > 2
        return self._posts.popleft().arrived()

    def waiting(self) -> list[list[float]]:
        """All vectors, oldest first, which stay; waits for the newest."""
        return [post.arrived() for post in self._posts]

    def __len__(self) -> int:
        return len(self._posts)

    def should_be_read(self, count: int) -> bool:
        """Whether `count` vectors may be taken, or an urgent one."""
        return self._is_urgent or len(self._posts) > count

    def clear(self) -> None:
        """Forgets what is on its way."""
        self._posts.clear()
        self._is_urgent = False

    def state_dict(self) -> list[list[float]]:
        """What is still on its way; waits for it."""
        return self.waiting()

    def load_state_dict(self, state: list[list[float]]) -> None:
        self._posts = deque(_Post(list(values), None, [], urgent=True) for values in state)
        self._is_urgent = len(self._posts) > 1
