"""Text for masked language modelling, as a LightningDataModule."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lion_lightning.data.cache import cache_at
from lion_lightning.data.sampler import StepValues, StreamOrder
from lion_lightning.data.stream import StreamDataModule, read_schedule
from lion_lightning.errors import ConfigError

from ..files import check_fraction
from ..text.blocks import Blocks, BlockSettings, prepare_blocks
from ..text.corpus import Corpus, Mixture, Source, mixture_of
from ..text.tokenizer import MIN_SEQUENCE_LENGTH, check_text_settings, special_tokens, vocabulary_of

COUNTED_BLOCKS = 4096  # counted at once, since numpy makes a copy that takes eight bytes a token
SUB_BLOCK = 2**40  # added to a block's number for each further part: no whole block has so high a number


class BlockDataset(Dataset):
    """Packed blocks of tokens, a batch at a time.

    Args:
        blocks: integer (blocks, length).
        lengths: tokens per block at each position of the run, where it begins with shorter blocks; None for whole ones.
    """

    def __init__(self, blocks: np.ndarray, lengths: StepValues | None = None) -> None:
        self.blocks, self.lengths = blocks, lengths

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitems__(self, pairs: list[tuple[int, int]]) -> dict[str, Tensor]:
        """`input_ids` int64 (batch, length) and `sample` int64 (batch,), the number of each in the run."""
        positions, indices = zip(*pairs, strict=True)
        return as_batch(self.blocks[list(indices)], positions, self.lengths)


def as_batch(blocks: np.ndarray, positions: Sequence[int], lengths: StepValues | None = None) -> dict[str, Tensor]:
    """A batch of `blocks`, each whole or cut into parts of the length that `lengths` gives.

    A part begins with the token that its block begins with, `[CLS]`, which takes the place of one token of the text;
    so the number of tokens in a batch stays the same.
    """
    tokens, samples = torch.from_numpy(blocks.astype(np.int64)), torch.tensor(positions)
    length = tokens.shape[1] if lengths is None else lengths.at(positions[0])
    parts = tokens.shape[1] // length
    if parts > 1:
        start = tokens[:, :1].repeat_interleave(parts, 0)
        tokens = torch.cat([start, tokens.reshape(-1, length)[:, 1:]], 1)
        samples = (samples[:, None] + SUB_BLOCK * torch.arange(parts)).flatten()
    return {"input_ids": tokens, "sample": samples}


class TextBlocks(StreamDataModule):
    """Packed blocks of a corpus, tokenised once and cached.

    Args:
        corpus: where the documents come from.
        sources: several, in place of `corpus`: see `mixture_of`.
        sequence_length: tokens in a block, `[CLS]` included.
        vocab_size: size of the WordPiece vocabulary that is trained on the corpus.
        val_fraction: share of the documents held out, by their content.
        lowercase: whether the tokenizer folds case.
        tokenizer: folder or name on the hub of a tokenizer that is used in place of a trained one.
        length_schedule: (first optimizer step, tokens per block) from step 0 on, up to `sequence_length`: blocks are
            cut into shorter ones at the beginning of a run; None for whole blocks from the start.
        batch_size, num_workers, seed, limit_train_samples, batch_schedule: see `StreamDataModule`.
        cache_dir: where blocks are kept; None for `lion_lightning` in the user's cache folder.
        path: argument of the corpus.
    """

    neighbours = 50

    def __init__(
        self,
        corpus: Corpus | Mixture | None = None,
        *,
        batch_size: int,
        sources: Sequence[Mapping[str, Any]] | None = None,
        sequence_length: int = 128,
        vocab_size: int = 8192,
        val_fraction: float = 0.05,
        lowercase: bool = True,
        tokenizer: str | None = None,
        length_schedule: Sequence[Sequence[int]] | None = None,
        batch_schedule: Sequence[Sequence[int]] | None = None,
        num_workers: int = 0,
        seed: int = 1,
        limit_train_samples: int | None = None,
        cache_dir: str | None = None,
        path: str | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, limit_train_samples, batch_schedule)
        check_text_settings(sequence_length, vocab_size, lowercase)
        corpus = mixture_of(sources) if corpus is None else corpus
        self.sources = corpus.sources if isinstance(corpus, Mixture) else (Source("text", corpus, 1.0),)
        if limit_train_samples is not None and len(self.sources) > 1:
            raise ConfigError("data.limit_train_samples is for one source; with several, give them less text")
        self.length_schedule = read_schedule("length_schedule", length_schedule, "sequence_length", sequence_length)
        for _, length in self.length_schedule.changes:
            if length < MIN_SEQUENCE_LENGTH or sequence_length % length:
                raise ConfigError(
                    f"data.length_schedule: {length} must be at least {MIN_SEQUENCE_LENGTH} and divide "
                    f"data.sequence_length={sequence_length}"
                )
        self.settings = BlockSettings(sequence_length, vocab_size, check_fraction(val_fraction), lowercase, tokenizer)
        self.cache = cache_at(cache_dir)
        self.blocks: Blocks | None = None

    def prepare_data(self) -> None:
        self.setup("fit")

    @isolate_rng(include_cuda=False)  # only a first start prepares data, which must not change a run's random numbers
    def setup(self, stage: str) -> None:
        if self.blocks is None:
            corpora = [source.corpus for source in self.sources]
            self.blocks = prepare_blocks(corpora, self.settings, self.cache)
            self.train_set, self.val_set = BlockDataset(self.blocks.train), BlockDataset(self.blocks.val)

    @override
    def hold_out(self, is_held: np.ndarray) -> None:
        if len(self.sources) > 1:
            raise ConfigError("settings are chosen on one source of text; data.sources has several")
        train = self.ready.train
        kept = train[~is_held]
        self.blocks = replace(self.ready, train=kept, val=train[is_held], rows=(len(kept),))
        self.train_set, self.val_set = BlockDataset(self.blocks.train), BlockDataset(self.blocks.val)

    @override
    def samples_in(self, batch: dict[str, Tensor]) -> int:
        return batch["input_ids"].numel() // self.settings.sequence_length  # blocks that a schedule cuts up are one

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "vocabulary": vocabulary_of(self.ready.tokenizer)}

    def train_dataloader(self) -> Any:
        self.train_set = BlockDataset(self.ready.train, self._lengths())
        return super().train_dataloader()

    def _lengths(self) -> StepValues:
        """Tokens per block at each position of the run."""
        changes = self.length_schedule.changes
        return StepValues(tuple((self.samples_before(step), length) for step, length in changes))

    def _order(self) -> StreamOrder:
        if len(self.sources) == 1:
            return super()._order()
        return StreamOrder(self.ready.rows, self.seed, [source.weight for source in self.sources])

    @property
    def ready(self) -> Blocks:
        """The blocks; RuntimeError before `setup`."""
        if self.blocks is None:
            raise RuntimeError("call setup('fit') first")
        return self.blocks

    def describe(self) -> dict[str, str]:
        """Lines for the summary at the start of a run."""
        blocks = self.ready
        sample = blocks.tokenizer.decode(blocks.val[len(blocks.val) // 2][1:40].tolist(), skip_special_tokens=True)
        made = "from the cache" if blocks.reused else "tokenised just now"
        return {
            "tokens": f"{blocks.train.size:,} for training, {blocks.val.size:,} for validation ({made})",
            "documents": _account(blocks.counts),
            **self._files(),
            **self._shares(),
            "blocks": f"{len(blocks.train):,} + {len(blocks.val):,} of {self.settings.sequence_length} tokens",
            "vocabulary": f"{len(blocks.tokenizer):,} {'tokens' if self.settings.tokenizer else 'WordPieces'}",
            "a sample": f"{sample[:120]} ...",
            "unigram entropy": f"{self.unigram_entropy():.3f} nats, which val/loss has to fall below",
        }

    def _files(self) -> dict[str, str]:
        """One line for each source with files, which accounts for all of them."""
        lines = {source.label: account for source in self.sources if (account := source.corpus.account())}
        return {"files" if len(self.sources) == 1 else f"files of {label}": line for label, line in lines.items()}

    def _shares(self) -> dict[str, str]:
        if len(self.sources) == 1:
            return {}
        total = sum(source.weight for source in self.sources)
        pairs = zip(self.sources, self.ready.rows, strict=True)
        parts = (f"{source.weight / total:.1%} of the tokens from {source.label} ({rows:,})" for source, rows in pairs)
        return {"sources (blocks)": ", ".join(parts)}

    def unigram_entropy(self) -> float:
        """Entropy of the validation tokens in nats: the loss of the best model without context."""
        counts = self._text_counts(self.ready.val)
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())

    def log_unigram_shares(self) -> Tensor:
        """Logarithm of each token's share of the training text, one occurrence added to each: float32 (vocabulary,)."""
        counts = self._text_counts(self.ready.train)
        return torch.from_numpy(np.log((counts + 1) / (counts + 1).sum())).float()

    def _text_counts(self, blocks: np.ndarray) -> np.ndarray:
        """How often each token occurs, special tokens excluded: float64 (vocabulary,)."""
        counts = token_counts(blocks, len(self.ready.tokenizer)).astype(np.float64)
        counts[special_tokens(self.ready.tokenizer).numpy()] = 0
        return counts


def token_counts(blocks: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each token occurs in `blocks`, which may be larger than memory: int64 (vocab_size,)."""
    counts = np.zeros(vocab_size, np.int64)
    for first in range(0, len(blocks), COUNTED_BLOCKS):
        counts += np.bincount(blocks[first : first + COUNTED_BLOCKS].ravel(), minlength=vocab_size)
    return counts


def _account(counts: dict[str, int]) -> str:
    """One line with all counts: documents used, held out and left out."""
    kept, held_out, *left_out = counts.items()
    skipped = ", ".join(f"{count:,} {what}" for what, count in left_out if count)
    return f"{kept[1]:,} + {held_out[1]:,} held out" + (f"; left out: {skipped}" if skipped else "")
