"""A split for choosing settings: the validation set is left to the comparison of what was chosen."""

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import numpy as np
from torch.utils.data import Dataset

from lion_lightning.errors import ConfigError
from lion_lightning.recipes.bert_mlm.data import BlockDataset, TextBlocks

HELD_OUT_EVERY, NEIGHBOURS = 20, 50
FEW_SAMPLES, HELD_OUT_OF_FEW = 4_000, 5  # a twentieth of fewer is too small to tell settings apart


class Picked(Dataset):
    """Some samples of a recipe's data set.

    Args:
        whole: Takes lists of (position in the run, index).
        indices: int64 (samples,) of those in this one.
    """

    def __init__(self, whole: Any, indices: np.ndarray) -> None:
        self.whole, self.indices = whole, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, pairs: list[tuple[int, int]]) -> Any:
        return self.whole.__getitems__([(position, int(self.indices[index])) for position, index in pairs])


class SearchSplit(pl.Callback):
    """Trains on 19 of 20 training samples and validates on the others; the validation set is left to comparisons.

    Of fewer than 4,000 samples it validates on one in five. Blocks of text are held out in rows of `NEIGHBOURS`, since
    a block shares its document with those beside it.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        count = len(data.train_set)
        is_text = isinstance(data, TextBlocks)
        every = HELD_OUT_OF_FEW if count < FEW_SAMPLES else HELD_OUT_EVERY
        groups = np.arange(count) // (min(NEIGHBOURS, max(1, count // every)) if is_text else 1)
        is_held = groups % every == every - 1
        if is_text:
            if len(data.ready.rows) > 1:
                raise ConfigError("settings are chosen on one source of text; data.sources has several")
            train = data.ready.train
            kept = train[~is_held]
            data.blocks = replace(data.ready, train=kept, val=train[is_held], rows=(len(kept),))
            data.train_set, data.val_set = BlockDataset(data.blocks.train), BlockDataset(data.blocks.val)
        else:
            whole = data.train_set
            data.train_set, data.val_set = (Picked(whole, np.flatnonzero(part)) for part in (~is_held, is_held))
