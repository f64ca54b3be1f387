"""What is known of one optimizer step, and the order in which its numbers travel from the device to the host."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class Reading:
    """The measurements of one optimizer step, over all ranks. NaN stands for what was not measured.

    Attributes:
        loss: mean over the samples of the micro-batches that have ended since the step before.
        grad_norm: of the gradient before any clipping.
        factor: the gate's verdict: divide the gradients by it. Carried out unless the gate is off or only watches.
        skipped: its verdict on whether the step may change nothing.
        norm_z, loss_z: robust z of the log norm and of the loss of the same step.
        backward_loss: argument of backward, summed over the step's micro-batches, mean over ranks.
        flip_rate: share of sampled coordinates whose update changed its sign since the step before.
        cosine: between update and gradient, over the sampled coordinates.
        dead: share of sampled coordinates that move though their gradient is exactly 0.
        bad_ranks: ranks whose loss was not finite.
        step: number of the step, from 1 on.
        batch_size: samples of the step.
        micro_norm: gradient norm of its first micro-batch alone, of `micro_batch_size` samples.
        rate: the largest learning rate of the groups as scheduled, before any warm-up of the guard.
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
    rate: float = math.nan

    @property
    def level(self) -> float:
        """The loss of this step where its size compares from step to step, else that of the micro-batches before."""
        return self.backward_loss if math.isfinite(self.backward_loss) else self.loss

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.grad_norm) and not self.bad_ranks


SUMS = ("loss", "samples", "squares", "micro_squares", "backward_loss")
UPDATE_SUMS = ("flips", "signs", "projection", "update_squares", "grad_squares", "dead")
VERDICT = ("norm", "factor", "skipped", "norm_z", "loss_z")
FACTS = ("step", "batch_size", "micro_batch_size")


def unpack(values: Sequence[float], world_size: int) -> Reading:
    """The reading of a step from its numbers.

    Args:
        values: those of `SUMS` and `UPDATE_SUMS`, added up over ranks; one count of non-finite losses for each rank;
            those of `VERDICT`; those of `FACTS`, which the host knows from the start, and perhaps the rate.
        world_size: number of ranks.
    """
    sums, rest = values[: len(SUMS) + len(UPDATE_SUMS)], values[len(SUMS) + len(UPDATE_SUMS) :]
    loss, samples, _, micro_squares, backward_loss = sums[: len(SUMS)]
    flips, signs, projection, update_squares, grad_squares, dead = sums[len(SUMS) :]
    norm, factor, skipped, norm_z, loss_z, step, batch_size, micro_batch_size, *rate = rest[world_size:]
    return Reading(
        loss=_share(loss, samples),
        grad_norm=norm,
        factor=factor,
        skipped=skipped != 0,
        norm_z=norm_z,
        loss_z=loss_z,
        backward_loss=backward_loss,
        flip_rate=_share(flips, signs),
        cosine=_share(projection, math.sqrt(max(0.0, update_squares * grad_squares))),
        dead=_share(dead, update_squares),
        bad_ranks=tuple(rank for rank, count in enumerate(rest[:world_size]) if count > 0),
        step=int(step),
        batch_size=int(batch_size),
        micro_norm=math.sqrt(micro_squares) if micro_squares >= 0 else math.nan,
        micro_batch_size=int(micro_batch_size),
        rate=rate[0] if rate else math.nan,
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan
