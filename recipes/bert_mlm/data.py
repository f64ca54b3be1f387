"""Text for masked language modelling, as a LightningDataModule."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lion_lightning.training.cache import default_cache
from lion_lightning.training.data import StreamDataModule
from lion_lightning.training.errors import ConfigError
from recipes.bert_mlm.corpus import Corpus
from recipes.bert_mlm.tokens import SPECIAL_TOKENS, Blocks, BlockSettings, prepare_blocks

MIN_VOCAB_SIZE, MIN_SEQUENCE_LENGTH = 256, 8


class BlockDataset(Dataset):
    """Packed blocks of tokens, a batch at a time."""

    def __init__(self, blocks: np.ndarray) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitems__(self, pairs: list[tuple[int, int]]) -> dict[str, Tensor]:
        """`input_ids` int64 (batch, length) and `sample` int64 (batch,), the number of each in the run."""
        positions, indices = zip(*pairs, strict=True)
        tokens = self.blocks[list(indices)].astype(np.int64)
        return {"input_ids": torch.from_numpy(tokens), "sample": torch.tensor(positions)}


class TextBlocks(StreamDataModule):
    """Packed blocks of a corpus, tokenised once and cached.

    Args:
        corpus: where the documents come from.
        sequence_length: tokens in a block, `[CLS]` included.
        vocab_size: size of the WordPiece vocabulary that is trained on the corpus.
        val_fraction: share of the documents held out, by their content.
        lowercase: whether the tokenizer folds case.
        batch_size, num_workers, seed, limit_train_samples: see `StreamDataModule`.
        cache_dir: where blocks are kept; None for `lion_lightning` in the user's cache folder.
        path: what the corpus reads, for the summary.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        batch_size: int,
        sequence_length: int = 128,
        vocab_size: int = 8192,
        val_fraction: float = 0.05,
        lowercase: bool = True,
        num_workers: int = 0,
        seed: int = 1,
        limit_train_samples: int | None = None,
        cache_dir: str | None = None,
        path: str | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, limit_train_samples)
        if sequence_length < MIN_SEQUENCE_LENGTH:
            raise ConfigError(f"data.sequence_length must be at least {MIN_SEQUENCE_LENGTH}, got {sequence_length}")
        if vocab_size < MIN_VOCAB_SIZE:
            raise ConfigError(f"data.vocab_size must be at least {MIN_VOCAB_SIZE}, got {vocab_size}")
        if not 0 < val_fraction < 1:
            raise ConfigError(f"data.val_fraction must be between 0 and 1, got {val_fraction}")
        self.corpus = corpus
        self.settings = BlockSettings(sequence_length, vocab_size, val_fraction, lowercase)
        self.cache = Path(cache_dir).expanduser() if cache_dir else default_cache()
        self.path = path
        self.blocks: Blocks | None = None

    def prepare_data(self) -> None:
        self.setup("fit")

    def setup(self, stage: str) -> None:
        if self.blocks is None:
            self.blocks = prepare_blocks(self.corpus, self.settings, self.cache)
            self.train_set, self.val_set = BlockDataset(self.blocks.train), BlockDataset(self.blocks.val)

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
            "blocks": f"{len(blocks.train):,} + {len(blocks.val):,} of {self.settings.sequence_length} tokens",
            "vocabulary": f"{len(blocks.tokenizer):,} WordPieces",
            "a sample": f"{sample[:120]} ...",
            "unigram entropy": f"{self.unigram_entropy():.3f} nats, what val/loss has to get under",
        }

    def unigram_entropy(self) -> float:
        """Entropy of the validation tokens in nats: the loss of the best model that looks at no context at all."""
        counts = np.bincount(self.ready.val.ravel()).astype(np.float64)
        counts[: len(SPECIAL_TOKENS)] = 0
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())

    def log_unigram_shares(self) -> Tensor:
        """Logarithm of each token's share of the training text, one occurrence added to each: float32 (vocabulary,)."""
        counts = np.bincount(self.ready.train.ravel(), minlength=len(self.ready.tokenizer)).astype(np.float64)
        counts[: len(SPECIAL_TOKENS)] = 0
        return torch.from_numpy(np.log((counts + 1) / (counts + 1).sum())).float()
