"""A split for choosing settings: the validation set is left to the comparison of what was chosen."""

from typing import Any

import lightning.pytorch as pl
import numpy as np

HELD_OUT_EVERY = 20
FEW_SAMPLES, HELD_OUT_OF_FEW = 4_000, 5  # a twentieth of fewer is too small to tell settings apart


class SearchSplit(pl.Callback):
    """Trains on 19 of 20 training samples and validates on the others; the validation set is left to comparisons.

    Of fewer than 4,000 samples it validates on one in five. What may belong together is held out together.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        count = len(data.train_set)
        every = HELD_OUT_OF_FEW if count < FEW_SAMPLES else HELD_OUT_EVERY
        groups = np.arange(count) // min(data.neighbours, max(1, count // every))
        data.hold_out(groups % every == every - 1)
