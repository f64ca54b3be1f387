"""Random text over a small vocabulary, whose first ids are those of special tokens, and what is hidden of it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lion_lightning.recipes.bert_mlm.masking import IGNORED, MaskedBatch, Masking, mask_tokens

MASK, FIRST = 4, 5  # ids of [MASK] and of the first token of the text
SIGMAS = 5.0  # one false alarm in two million


@dataclass(frozen=True)
class Vocabulary:
    """`size` ids; `starts_word` is needed where words or spans are hidden."""

    size: int
    starts_word: Tensor | None = None

    def text(self, batch: int, length: int) -> Tensor:
        return torch.randint(FIRST, self.size, (batch, length), generator=torch.Generator().manual_seed(0))

    def mask(
        self, input_ids: Tensor, sample: Tensor | None = None, seed: int = 1, **masking: float | str
    ) -> MaskedBatch:
        return mask_tokens(
            input_ids,
            torch.arange(len(input_ids)) if sample is None else sample,
            masking=Masking(**masking),  # type: ignore[arg-type]
            seed=seed,
            mask_id=MASK,
            special_tokens=torch.arange(self.size) < FIRST,
            replacement_ids=torch.arange(FIRST, self.size),
            starts_word=self.starts_word,
        )


def hidden_map(batch: MaskedBatch) -> Tensor:
    """Which tokens the loss is computed on: bool (batch, length)."""
    return torch.zeros_like(batch.input_ids).scatter(1, batch.positions, (batch.targets != IGNORED).long()).bool()
