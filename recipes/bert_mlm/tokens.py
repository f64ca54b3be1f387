"""Documents -> tokens -> packed blocks on disk, made once and memory-mapped from then on.

A block is `[CLS]` and `sequence_length - 1` tokens of the running text, in which `[SEP]` ends each document: no
padding, so every position is worth computing. Memory stays bounded whatever the size of the text, and what was
tokenised before an interruption is not tokenised again.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from transformers import BertTokenizer, PreTrainedTokenizerBase

from lion_lightning.data.cache import cached_folder, release_freed_memory
from lion_lightning.errors import ConfigError
from recipes.bert_mlm.corpus import Corpus
from recipes.bert_mlm.shards import read_shards, token_dtype, tokenise
from recipes.bert_mlm.survey import TRAIN, VAL, Survey, read, survey
from recipes.bert_mlm.tokenizer import SPECIAL_TOKENS, as_transformers, identity, open_tokenizer, train_tokenizer

__all__ = ["SPECIAL_TOKENS", "BlockSettings", "Blocks", "prepare_blocks"]
FORMAT_VERSION = 4  # raise it when what is written to the cache changes
TOKENIZER_DONE, HELD_OUT = "tokenizer.done", "held_out.npy"


@dataclass(frozen=True)
class BlockSettings:
    """What the blocks depend on, beside the text itself.

    Attributes:
        tokenizer: folder or name of a tokenizer; None trains one, of `vocab_size` and `lowercase`.
    """

    sequence_length: int
    vocab_size: int
    val_fraction: float
    lowercase: bool
    tokenizer: str | None = None


@dataclass(frozen=True)
class Blocks:
    """Packed token blocks and the tokenizer that made them.

    Attributes:
        train, val: integer arrays (blocks, sequence_length), memory-mapped.
        tokenizer: opens as a Hugging Face tokenizer.
        rows: training blocks of each source, in the order in which `train` has them.
        counts: documents of both splits, and what was left out.
        reused: True if the cache had them and nothing was tokenised.
    """

    train: np.ndarray
    val: np.ndarray
    tokenizer: PreTrainedTokenizerBase
    rows: tuple[int, ...]
    counts: dict[str, int]
    folder: Path
    reused: bool

    def held_out(self) -> frozenset[int]:
        """The digests of the held-out documents."""
        return frozenset(np.load(self.folder / HELD_OUT).tolist())


def prepare_blocks(corpora: Sequence[Corpus], settings: BlockSettings, cache: Path) -> Blocks:
    """The blocks of `corpora`, from the cache if it has them.

    Raises:
        ConfigError: not enough text for a training block of each source and a validation block.
    """
    named = None if settings.tokenizer is None else open_tokenizer(settings.tokenizer)
    fingerprints = [corpus.fingerprint() for corpus in corpora]
    key = json.dumps([FORMAT_VERSION, fingerprints, asdict(settings), named and identity(named)])
    folder, reused = cached_folder(cache, key, lambda folder: _write(corpora, settings, named, folder), resumable=True)
    report = json.loads((folder / "report.json").read_text())
    return Blocks(
        train=np.load(folder / "train.npy", mmap_mode="r"),
        val=np.load(folder / "val.npy", mmap_mode="r"),
        tokenizer=named or BertTokenizer.from_pretrained(folder),
        rows=tuple(report["rows"]),
        counts=report["counts"],
        folder=folder,
        reused=reused,
    )


def _write(
    corpora: Sequence[Corpus], settings: BlockSettings, named: PreTrainedTokenizerBase | None, folder: Path
) -> None:
    found = survey(corpora, settings.val_fraction)
    counts = {
        "documents": int((found.roles == TRAIN).sum()),
        "held-out documents": int((found.roles == VAL).sum()),
        "exact duplicates": found.duplicates,
        "empty documents": found.empty,
    }
    tokenizer = named or _trained(found.sample, settings, folder)
    _tokenise(corpora, found, tokenizer, folder)
    trained = [Split("train", source) for source in range(len(corpora))]
    rows, left = _pack(folder, trained, settings, tokenizer, counts)
    _, left_of_val = _pack(folder, [Split("val", None)], settings, tokenizer, counts)
    counts["tokens that fill no block"] = left + left_of_val
    (folder / "report.json").write_text(json.dumps({"rows": rows, "counts": counts}))
    np.save(folder / HELD_OUT, found.held_out)
    for file in (*folder.glob("shard-*"), folder / TOKENIZER_DONE):
        file.unlink(missing_ok=True)
    del found  # all documents, where they are few
    release_freed_memory()


def _trained(sample: list[str], settings: BlockSettings, folder: Path) -> PreTrainedTokenizerBase:
    if (folder / TOKENIZER_DONE).is_file():  # an interrupted start had come so far
        return BertTokenizer.from_pretrained(folder)
    learned = train_tokenizer(sample, settings.vocab_size, settings.lowercase)
    tokenizer = as_transformers(learned, settings.lowercase, settings.sequence_length)
    tokenizer.save_pretrained(folder)
    (folder / TOKENIZER_DONE).touch()
    return tokenizer


def _tokenise(corpora: Sequence[Corpus], found: Survey, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    documents = found.whole or ((source, document) for source, _, document in read(corpora))
    tokenise(documents, found.roles, found.characters, backend, tokenizer.sep_token_id, folder)


@dataclass(frozen=True)
class Split:
    """Which shards make one run of blocks: those of `train` or `val`, of one source or (None) of all."""

    name: str
    source: int | None


def _pack(
    folder: Path,
    splits: Sequence[Split],
    settings: BlockSettings,
    tokenizer: PreTrainedTokenizerBase,
    counts: dict[str, int],
) -> tuple[list[int], int]:
    """Write the blocks of `splits`, one after the other, and return how many each has, and tokens that fill none."""
    width = settings.sequence_length - 1
    totals = [sum(map(len, read_shards(folder, split.name, split.source))) for split in splits]
    rows = [total // width for total in totals]
    name = splits[0].name
    if not all(rows):
        documents = counts["documents" if name == "train" else "held-out documents"]
        source = f" of source {rows.index(0) + 1}" if len(splits) > 1 else ""
        raise ConfigError(
            f"the {name} split{source} has {documents} documents and fills no block of {settings.sequence_length} "
            "tokens; give more text, or lower data.sequence_length or raise data.val_fraction"
        )
    shape = sum(rows), settings.sequence_length
    blocks = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", token_dtype(len(tokenizer)), shape)
    blocks[:, 0] = tokenizer.cls_token_id
    ends = np.cumsum(rows)
    for split, count, end in zip(splits, rows, ends, strict=True):
        fill(blocks[end - count : end, 1:], read_shards(folder, split.name, split.source))
    blocks.flush()
    return rows, sum(totals) - width * sum(rows)


def fill(rows: np.ndarray, pieces: Iterable[np.ndarray]) -> None:
    """Write the running text of `pieces` into `rows` (blocks, width) until these are full."""
    width, done = rows.shape[1], 0
    rest = np.empty(0, rows.dtype)
    for piece in pieces:
        text = np.concatenate([rest, piece])
        count = min(len(text) // width, len(rows) - done)
        rows[done : done + count] = text[: count * width].reshape(count, width)
        done, rest = done + count, text[count * width :]
