"""Labeled text, as a LightningDataModule: tokenised once and cached, padded batch by batch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lion_lightning.data.cache import cache_at, cached_folder
from lion_lightning.data.stream import StreamDataModule
from lion_lightning.errors import ConfigError

from ..text.tokenizer import (
    as_transformers,
    check_text_settings,
    identity,
    load_tokenizer,
    train_tokenizer,
    vocabulary_of,
)
from .labels import Labeled
from .sources import TextSource

FORMAT_VERSION = 2  # raise it when what is written to the cache changes
PADDINGS = ("longest", "fixed")
TEXTS_PER_BATCH = 2048
TOKEN_TYPES = "token_type_ids"


@dataclass(frozen=True)
class TokenizedTexts:
    """Texts of different lengths, end to end.

    Attributes:
        tokens: uint32 (tokens,) of all texts.
        types: uint8 (tokens,), 1 in the second text of a pair; None where the tokenizer has none.
        bounds: int64 (texts + 1,); text `i` is `tokens[bounds[i] : bounds[i + 1]]`.
        labels: int64 or float32 (texts,).
        cut: how many texts were longer than the sequence length.
    """

    tokens: np.ndarray
    types: np.ndarray | None
    bounds: np.ndarray
    labels: np.ndarray
    cut: int

    def __len__(self) -> int:
        return len(self.labels)


class TextDataset(Dataset):
    """Tokenised texts, a batch at a time.

    Args:
        texts: the texts.
        pad_id: id of [PAD].
        length: pad to this; None pads to the longest of the batch.
    """

    def __init__(self, texts: TokenizedTexts, pad_id: int, length: int | None) -> None:
        self.texts, self.pad_id, self.length = texts, pad_id, length

    def __len__(self) -> int:
        return len(self.texts)

    def __getitems__(self, pairs: list[tuple[int, int]]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and perhaps `token_type_ids` int64 (batch, length), `labels`, `sample`."""
        positions, indices = (list(part) for part in zip(*pairs, strict=True))
        starts, ends = self.texts.bounds[indices], self.texts.bounds[np.array(indices) + 1]
        place = np.arange(self.length or int((ends - starts).max()))
        filled = place < (ends - starts)[:, None]
        where = (starts[:, None] + place)[filled]
        batch = {"input_ids": np.full(filled.shape, self.pad_id), "attention_mask": filled.astype(np.int64)}
        batch["input_ids"][filled] = self.texts.tokens[where]
        if self.texts.types is not None:
            batch[TOKEN_TYPES] = np.zeros(filled.shape, np.int64)
            batch[TOKEN_TYPES][filled] = self.texts.types[where]
        batch["labels"] = self.texts.labels[indices]
        return {**{name: torch.from_numpy(part) for name, part in batch.items()}, "sample": torch.tensor(positions)}


class LabeledTexts(StreamDataModule):
    """Texts with labels, tokenised once and cached.

    Args:
        source: where the texts come from.
        sequence_length: most tokens of a text or a pair, [CLS] and [SEP] included; longer ones are cut and counted.
        padding: to the `longest` text of a batch, or `fixed` to `sequence_length`, so that shapes never change.
        tokenizer: a folder or a name, such as that of the model's checkpoint; None trains one on the texts.
        vocab_size, lowercase: of the tokenizer that is trained.
        batch_size, num_workers, seed, limit_train_samples: see `StreamDataModule`.
        cache_dir: where tokens are kept; None for `lion_lightning` in the user's cache folder.
        path, val_path, task: arguments of the source.
    """

    def __init__(
        self,
        source: TextSource,
        *,
        batch_size: int,
        sequence_length: int = 128,
        padding: str = "longest",
        tokenizer: str | None = None,
        vocab_size: int = 4096,
        lowercase: bool = True,
        num_workers: int = 0,
        seed: int = 1,
        limit_train_samples: int | None = None,
        cache_dir: str | None = None,
        path: str | None = None,
        val_path: str | None = None,
        task: str | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, limit_train_samples)
        check_text_settings(sequence_length, vocab_size, lowercase)
        if padding not in PADDINGS:
            raise ConfigError(f"data.padding must be one of {', '.join(PADDINGS)}, got {padding!r}")
        self.source, self.sequence_length, self.padding = source, sequence_length, padding
        self.named, self.vocab_size, self.lowercase = tokenizer, vocab_size, lowercase
        self.cache = cache_at(cache_dir)
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def prepare_data(self) -> None:
        self.setup("fit")

    @isolate_rng(include_cuda=False)  # only a first start prepares data, which must not change a run's random numbers
    def setup(self, stage: str) -> None:
        if self._tokenizer is not None:
            return
        named = load_tokenizer(self.named) if self.named else None
        made = identity(named) if named else [self.vocab_size, self.lowercase]
        key = json.dumps([FORMAT_VERSION, self.source.fingerprint(), self.sequence_length, made])
        folder, self._reused = cached_folder(self.cache, key, lambda folder: self._write(folder, named))
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        self.classes: tuple[str, ...] = tuple(about["classes"])
        self.left_out: dict[str, int] = about["left_out"]
        self._tokenizer = named or AutoTokenizer.from_pretrained(folder)
        self._tokenizer.model_max_length = self.sequence_length  # pre-training may have had another
        as_text(self._tokenizer)
        length = self.sequence_length if self.padding == "fixed" else None
        self._texts = [_read(folder, name) for name in ("train", "val")]
        self.train_labels = self._texts[0].labels if self.classes else None
        self.train_set, self.val_set = (TextDataset(part, self.tokenizer.pad_token_id, length) for part in self._texts)

    def _write(self, folder: Path, named: PreTrainedTokenizerBase | None) -> None:
        splits = self.source.load()
        tokenizer = as_text(named or self._train_tokenizer(splits.train))
        dtype = np.int64 if splits.classes else np.float32
        for name, labeled in (("train", splits.train), ("val", splits.val)):
            _save(folder, name, tokenize(tokenizer, labeled, self.sequence_length, np.dtype(dtype)))
        about = {"classes": splits.classes, "left_out": splits.left_out}
        (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")
        if named is None:
            tokenizer.save_pretrained(folder)

    def _train_tokenizer(self, labeled: Labeled) -> PreTrainedTokenizerBase:
        learned = train_tokenizer([*labeled.texts, *(labeled.seconds or [])], self.vocab_size, self.lowercase)
        return as_transformers(learned, self.lowercase, self.sequence_length)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """RuntimeError before `setup`."""
        if self._tokenizer is None:
            raise RuntimeError("call setup('fit') first")
        return self._tokenizer

    @property
    def mean_tokens(self) -> int:
        """Tokens that a training text has on average, rounded; with fixed padding all of them."""
        texts = self._texts[0]
        return self.sequence_length if self.padding == "fixed" else max(1, round(len(texts.tokens) / len(texts)))

    def state_dict(self) -> dict[str, Any]:
        meaning = {"vocabulary": vocabulary_of(self.tokenizer), "classes": ", ".join(self.classes)}
        return {**super().state_dict(), **meaning}

    def describe(self) -> dict[str, str]:
        """Lines for the summary at the start of a run."""
        train, val = self._texts
        made = "from the cache" if self._reused else "tokenised just now"
        lines = {
            "texts": f"{len(train):,} for training, {len(val):,} for validation ({made}), {self.mean_tokens} tokens on "
            f"average; {train.cut + val.cut:,} were cut at {self.sequence_length}",
            "labels": self._labels(val.labels),
            "vocabulary": f"{len(self.tokenizer):,} tokens of {self.named or 'a tokenizer trained on these texts'}",
        }
        if account := self.source.account():
            lines["files"] = account
        if self.left_out:
            lines["left out"] = ", ".join(f"{count} rows with {reason}" for reason, count in self.left_out.items())
        return lines

    def _labels(self, labels: np.ndarray) -> str:
        if not self.classes:
            return f"values from {labels.min():g} to {labels.max():g}"
        counts = np.bincount(labels, minlength=len(self.classes))
        names = ", ".join(self.classes[:10]) + (", ..." if len(self.classes) > 10 else "")
        most = f"always {self.classes[counts.argmax()]} would reach {counts.max() / counts.sum():.3f}"
        return f"{len(self.classes)} classes: {names}; {most}"


def as_text(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """`tokenizer`, set to take a [MASK] that is written in a text for text; its export does the same."""
    tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = True
    return tokenizer


def tokenize(
    tokenizer: PreTrainedTokenizerBase, labeled: Labeled, sequence_length: int, dtype: np.dtype
) -> TokenizedTexts:
    """Texts, or pairs, joined by the tokenizer's own template and cut at `sequence_length`, the longer one first."""
    tokens: list[np.ndarray] = []
    types: list[np.ndarray] = []
    cut = 0
    for start in range(0, len(labeled), TEXTS_PER_BATCH):
        part = slice(start, start + TEXTS_PER_BATCH)
        seconds = labeled.seconds[part] if labeled.seconds else None
        found = tokenizer(
            labeled.texts[part],
            seconds,
            truncation="longest_first",
            max_length=sequence_length,
        )
        tokens += [np.array(ids, np.uint32) for ids in found["input_ids"]]
        types += [np.array(ids, np.uint8) for ids in found.get(TOKEN_TYPES, [])]
        cut += sum(bool(encoding.overflowing) for encoding in found.encodings or [])
    bounds = np.concatenate([[0], np.cumsum([len(ids) for ids in tokens])]).astype(np.int64)
    joined = np.concatenate(types) if types else None
    return TokenizedTexts(np.concatenate(tokens), joined, bounds, np.array(labeled.labels, dtype), cut)


def _save(folder: Path, name: str, texts: TokenizedTexts) -> None:
    arrays = {"tokens": texts.tokens, "types": texts.types, "bounds": texts.bounds, "labels": texts.labels}
    for part, array in arrays.items():
        if array is not None:
            np.save(folder / f"{name}-{part}.npy", array)
    (folder / f"{name}-cut.json").write_text(str(texts.cut), encoding="utf-8")


def _read(folder: Path, name: str) -> TokenizedTexts:
    def array(part: str, mmap_mode: Any = None) -> np.ndarray:
        return np.load(folder / f"{name}-{part}.npy", mmap_mode=mmap_mode)

    types = array("types", "r") if (folder / f"{name}-types.npy").is_file() else None
    cut = int((folder / f"{name}-cut.json").read_text(encoding="utf-8"))
    return TokenizedTexts(array("tokens", "r"), types, array("bounds"), array("labels"), cut)


def decode(tokenizer: Any, ids: list[int], characters: int = 120) -> str:
    """The beginning of a text, decoded from its tokens."""
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    return text if len(text) <= characters else f"{text[:characters]} ..."
