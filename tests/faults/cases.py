"""Which fault is injected where, and what the guard is expected to do about it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Callback
from torch import Tensor
from torch.optim import AdamW, Optimizer

from lion_lightning import Lion
from tests.faults.injected import InfElement, LabelNoise, NaNBatch, NaNMomentum, Outlier, every

HIT = 600
"""The step that is hit, from 0 on: late enough that a run no longer forgets."""

MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]


def propagating_lion(params: Iterable[Tensor]) -> Lion:
    """Lion as others write it: what is not finite reaches weights and momentum."""
    return Lion(params, lr=5e-4, weight_decay=0.1, nonfinite="propagate")


def adamw(params: Iterable[Tensor]) -> AdamW:
    return AdamW(params, lr=1e-3, weight_decay=0.01)


@dataclass(frozen=True)
class Case:
    """One row of the report.

    Attributes:
        inject: makes the callbacks, new for each run.
        seen_as: the kind of event that is to name it.
        guard: options of the guard beside the defaults.
        optimizer: None for the task's Lion.
        hurts: least ratio of the final loss, without the guard, to that of the clean run.
        ends_within: largest ratio with it.
    """

    name: str
    inject: Callable[[], Sequence[Callback]]
    seen_as: str
    hurts: float
    ends_within: float = 1.03
    guard: dict[str, Any] = field(default_factory=dict)
    optimizer: MakeOptimizer | None = None


RECIPES: dict[str, Any] = {"on_bad_loss": "skip", "on_divergence": "recover"}
"""What conf/guard asks for."""

CASES = [
    Case("NaN batch, AdamW", lambda: [NaNBatch([HIT])], "nonfinite", 2.0, optimizer=adamw),
    Case("NaN batch, Lion that propagates", lambda: [NaNBatch([HIT])], "nonfinite", 2.0, optimizer=propagating_lion),
    Case(
        "Inf in one element, AdamW",
        lambda: [InfElement(HIT)],
        "nonfinite",
        2.0,
        optimizer=adamw,
    ),
    Case("NaN in the momentum", lambda: [NaNMomentum(HIT)], "sick_weights", 2.0, guard=RECIPES),
    Case("gradient x1e3", lambda: [Outlier(HIT, 1e3)], "outlier", 1.1),
    Case("gradient x1e5", lambda: [Outlier(HIT, 1e5)], "outlier", 1.1),
    Case("gradient x1e3, gate off", lambda: [Outlier(HIT, 1e3)], "poison", 1.1, guard={"gate": False}),
    Case("gradient x1e5, gate off", lambda: [Outlier(HIT, 1e5)], "poison", 1.1, guard={"gate": False}),
    # What recurs is data: the first of the ten steps is skipped.
    Case(
        "wrong labels for 10 steps", lambda: [LabelNoise(range(HIT, HIT + 10))], "bad_loss", 1.03, 1.08, guard=RECIPES
    ),
]
"""Faults that a run can outlive."""

FOR_EVER = Case("wrong labels from then on", lambda: [LabelNoise(every(HIT))], "divergence", 2.0, guard=RECIPES)
"""The guard cannot mend data: it reports that the task has changed."""
