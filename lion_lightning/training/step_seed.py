"""Random numbers that a resumed run draws again: the generators are seeded anew for every micro-batch."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

SEED_STRIDE, BATCH_STRIDE, RANK_STRIDE = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # odd, 64 bits
MASK64 = 2**64 - 1


class StepSeed(Callback):
    """Seeds torch (CPU and accelerator) from (seed, number of the micro-batch in the run, rank) before each forward.

    Dropout and whatever else draws from torch's generators in `training_step` is then a function of the step alone:
    Lightning's checkpoints hold no generator state, so a resumed run would draw other numbers. Python's and numpy's
    generators are left alone; nothing in the recipes draws from them after the start.

    Args:
        seed: that of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(step_seed(self.seed, trainer.fit_loop.total_batch_idx, trainer.global_rank))


def step_seed(seed: int, micro_batch: int, rank: int) -> int:
    """63 bits that differ for any two of (seed, micro_batch, rank) one meets; mixed as in SplitMix64 (Steele, 2014)."""
    state = (seed * SEED_STRIDE + micro_batch * BATCH_STRIDE + rank * RANK_STRIDE) & MASK64
    state = ((state ^ (state >> 30)) * BATCH_STRIDE) & MASK64
    state = ((state ^ (state >> 27)) * RANK_STRIDE) & MASK64
    return (state ^ (state >> 31)) >> 1
