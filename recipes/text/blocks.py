"""Documents -> roles -> tokens -> packed blocks on disk, made once and memory-mapped from then on.

A block is `[CLS]` and `sequence_length - 1` tokens of the running text, in which `[SEP]` ends each document: no
padding, so every position is worth computing. The text is read twice: `scan_corpora` decides which documents are
trained on and which are held out, `tokenize_shards` tokenises them on all cores. Memory stays bounded whatever the size
of the text, and an interrupted preparation continues after the last complete shard.
"""

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from transformers import BertTokenizer, PreTrainedTokenizerBase

from lion_lightning.data.cache import cached_folder, release_freed_memory
from lion_lightning.errors import ConfigError

from ..files import without_surrogates
from .corpus import Corpus, digest, grouped, held_out_below
from .tokenizer import as_transformers, identity, load_masking_tokenizer, train_tokenizer

SAMPLE_CHARACTERS = 2**27  # a tokenizer is trained on at most this many
LEFT_OUT, TRAIN, VAL = 0, 1, 2
BY_CONTENT = LEFT_OUT  # the source leaves the role to the document's digest
_EMPTY = 0  # stands for the digest of a document without text
SHARD_CHARACTERS = 2**24  # about 4 M tokens, a few seconds of work
BATCH_CHARACTERS, BATCH_DOCUMENTS = 2**21, 512  # a token takes 100 bytes while it is an `Encoding`
SPLITS = {"train": TRAIN, "val": VAL}
FORMAT_VERSION = 6  # raise it when what is written to the cache changes
TOKENIZER_DONE, HELD_OUT = "tokenizer.done", "held_out.npy"


@dataclass(frozen=True)
class CorpusScan:
    """The result of reading all documents once.

    Attributes:
        roles: uint8 (documents,), LEFT_OUT, TRAIN or VAL for each in the order of `read_documents`.
        held_out: uint64, the digests of those that are VAL.
        characters: of all documents.
        empty, duplicates: documents that are left out.
        sample: documents to train a tokenizer on; a hash picks them where there are too many for all.
        whole: (source, text) of all documents in the order of `read_documents`; None where there are too many to hold.
    """

    roles: np.ndarray
    held_out: np.ndarray
    characters: int
    empty: int
    duplicates: int
    sample: list[str] = field(repr=False)
    whole: list[tuple[int, str]] | None = field(repr=False)


def read_documents(corpora: Sequence[Corpus]) -> Iterator[tuple[int, int, str]]:
    """All documents as (number of the source, TRAIN, VAL or BY_CONTENT, text)."""
    for source, corpus in enumerate(corpora):
        held_out = corpus.held_out()
        if held_out is not None:
            yield from ((source, VAL, without_surrogates(document)) for document in held_out)
        role = BY_CONTENT if held_out is None else TRAIN
        yield from ((source, role, without_surrogates(document)) for document in corpus.documents())


def scan_corpora(corpora: Sequence[Corpus], val_fraction: float) -> CorpusScan:
    """Read all documents once, and keep 17 bytes of each and a bounded sample.

    Left out are documents without text, and those that came before. Held out are the documents of a source's own
    validation set, or else a share of its documents, by their content.
    """
    digests, given, lengths, characters = array("Q"), array("B"), array("L"), 0
    sample = _Sample(SAMPLE_CHARACTERS)
    whole: list[tuple[int, str]] | None = []
    threshold = held_out_below(val_fraction)
    for source, role, document in read_documents(corpora):
        known = digest(document) if document.strip() else _EMPTY
        digests.append(known)
        given.append(role)
        lengths.append(len(document))
        characters += len(document)
        if characters > SAMPLE_CHARACTERS:
            whole = None
        if whole is not None:
            whole.append((source, document))
        if known != _EMPTY and (role or (VAL if known < threshold else TRAIN)) == TRAIN:
            sample.add(known, document)
    numbers = np.frombuffer(digests, np.uint64)
    roles = np.frombuffer(given, np.uint8).copy()
    roles[roles == BY_CONTENT] = np.where(numbers < np.uint64(threshold), VAL, TRAIN)[roles == BY_CONTENT]
    first = np.zeros(len(numbers), bool)
    first[np.unique(numbers, return_index=True)[1]] = True
    empty = numbers == _EMPTY
    roles[empty | ~first] = LEFT_OUT
    by_content = (np.frombuffer(given, np.uint8) == BY_CONTENT) & (roles != LEFT_OUT)
    for number in _held_out_too(
        roles, numbers, np.frombuffer(lengths, f"u{lengths.itemsize}"), by_content, val_fraction
    ):
        roles[number] = VAL
        sample.kept.pop(int(numbers[number]), None)
    return CorpusScan(
        roles=roles,
        held_out=numbers[roles == VAL],
        characters=characters,
        empty=int(empty.sum()),
        duplicates=int((~empty & ~first).sum()),
        sample=list(sample.kept.values()),
        whole=whole,
    )


def _held_out_too(
    roles: np.ndarray, digests: np.ndarray, lengths: np.ndarray, by_content: np.ndarray, val_fraction: float
) -> list[int]:
    """Further documents to hold out, smallest digests first, where chance holds out less than half of the share.

    Args:
        roles, digests, lengths: of each document, (documents,).
        by_content: bool (documents,), those whose role their content decides.
        val_fraction: the share of their characters that is to be held out.
    """
    aim = val_fraction * lengths[by_content].sum()
    held = lengths[by_content & (roles == VAL)].sum()
    trained = np.flatnonzero(by_content & (roles == TRAIN))
    found: list[int] = []
    if held < aim / 2:
        for number in trained[np.argsort(digests[trained], kind="stable")][:-1]:
            if held >= aim:
                break
            found.append(int(number))
            held += lengths[number]
    return found


class _Sample:
    """Distinct documents, chosen by their digests, of at most `most` characters."""

    def __init__(self, most: int) -> None:
        self.most, self.characters, self.below = most, 0, 2**32
        self.kept: dict[int, str] = {}

    def add(self, key: int, document: str) -> None:
        # The low half of the digest: the high one decides what is held out.
        if key in self.kept or key % 2**32 >= self.below:
            return
        self.kept[key] = document
        self.characters += len(document)
        while self.characters > self.most and len(self.kept) > 1:
            self.below //= 2
            self.kept = {key: document for key, document in self.kept.items() if key % 2**32 < self.below}
            self.characters = sum(map(len, self.kept.values()))


def tokenize_shards(
    documents: Iterable[tuple[int, str]],
    roles: np.ndarray,
    characters: int,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    """Write the tokens of `documents`, shard by shard; existing shards are kept.

    Args:
        documents: (number of the source, text), source after source.
        roles: TRAIN, VAL or LEFT_OUT for each document.
        characters: of all documents, for the progress bar.
        tokenizer: see `encode`.
        folder: `shard-<source>-<number>.npz` come here, with arrays `train` and `val` of `token_dtype`.
    """
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("tokenising", total=characters)
        for number, (source, shard, read) in enumerate(_shards(documents, roles)):
            file = folder / f"shard-{source:03}-{number:06}.npz"
            if not file.exists():
                save_shard(file, _tokens(shard, tokenizer))
            progress.advance(task, read)


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest integers that hold every id."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def read_shards(folder: Path, split: str, source: int | None = None) -> Iterator[np.ndarray]:
    """The tokens of `split`, a shard at a time; of one source, or of all."""
    for file in sorted(folder.glob(f"shard-{'*' if source is None else f'{source:03}'}-*.npz")):
        with np.load(file) as shard:
            yield shard[split]


def encode(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """The tokens of each document, [SEP] at the end, by batches on all cores."""
    dtype = token_dtype(len(tokenizer))
    backend, separator = tokenizer.backend_tokenizer, tokenizer.sep_token_id
    backend.no_truncation()
    backend.no_padding()
    for batch in grouped(documents, BATCH_CHARACTERS, BATCH_DOCUMENTS):
        backend.encode_special_tokens = True  # a [MASK] in the text is text
        try:
            encodings = backend.encode_batch_fast(batch, add_special_tokens=False)
        finally:
            backend.encode_special_tokens = False
        for encoding in encodings:
            yield np.array([*encoding.ids, separator], dtype)


def _shards(
    documents: Iterable[tuple[int, str]], roles: np.ndarray
) -> Iterator[tuple[int, list[tuple[int, str]], int]]:
    """(source, documents that count with their roles, characters read) for each shard."""
    shard: list[tuple[int, str]] = []
    read, current = 0, 0
    for (source, document), role in zip(documents, roles.tolist(), strict=True):
        if source != current or read >= SHARD_CHARACTERS:
            yield current, shard, read
            shard, read, current = [], 0, source
        read += len(document)
        if role in (TRAIN, VAL):
            shard.append((role, document))
    yield current, shard, read


def _tokens(shard: list[tuple[int, str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, np.ndarray]:
    pieces: dict[int, list[np.ndarray]] = {role: [] for role in SPLITS.values()}
    encoded = encode((document for _, document in shard), tokenizer)
    for (role, _), tokens in zip(shard, encoded, strict=True):
        pieces[role].append(tokens)
    none = np.empty(0, token_dtype(len(tokenizer)))
    return {split: np.concatenate([none, *pieces[role]]) for split, role in SPLITS.items()}


def save_shard(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write to a temporary file and rename it, so that an interrupted process leaves no partial shard."""
    temporary = file.with_suffix(".writing")
    with temporary.open("wb") as out:
        np.savez(out, **arrays)  # type: ignore[arg-type]  # names, which it takes for options
    os.replace(temporary, file)


@dataclass(frozen=True)
class BlockSettings:
    """The settings that the blocks depend on, in addition to the text.

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
    named = None if settings.tokenizer is None else load_masking_tokenizer(settings.tokenizer)
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
    found = scan_corpora(corpora, settings.val_fraction)
    counts = {
        "documents": int((found.roles == TRAIN).sum()),
        "held-out documents": int((found.roles == VAL).sum()),
        "exact duplicates": found.duplicates,
        "empty documents": found.empty,
    }
    tokenizer = named or _trained(found.sample, settings, folder)
    documents = found.whole or ((source, document) for source, _, document in read_documents(corpora))
    tokenize_shards(documents, found.roles, found.characters, tokenizer, folder)
    rows, left = _pack(folder, "train", range(len(corpora)), settings, tokenizer, counts)
    _, left_of_val = _pack(folder, "val", [None], settings, tokenizer, counts)
    counts["tokens that fill no block"] = left + left_of_val
    (folder / "report.json").write_text(json.dumps({"rows": rows, "counts": counts}))
    np.save(folder / HELD_OUT, found.held_out)
    for file in (*folder.glob("shard-*"), folder / TOKENIZER_DONE):
        file.unlink(missing_ok=True)
    del found, documents  # they hold all text, where it is short
    release_freed_memory()


def _trained(sample: list[str], settings: BlockSettings, folder: Path) -> PreTrainedTokenizerBase:
    if (folder / TOKENIZER_DONE).is_file():  # an interrupted preparation got this far
        return BertTokenizer.from_pretrained(folder)
    learned = train_tokenizer(sample, settings.vocab_size, settings.lowercase)
    tokenizer = as_transformers(learned, settings.lowercase, settings.sequence_length)
    tokenizer.save_pretrained(folder)
    (folder / TOKENIZER_DONE).touch()
    return tokenizer


def _pack(
    folder: Path,
    split: str,
    sources: Sequence[int | None],
    settings: BlockSettings,
    tokenizer: PreTrainedTokenizerBase,
    counts: dict[str, int],
) -> tuple[list[int], int]:
    """Write the blocks of `split`, source by source (None: all); return how many each has, and tokens of no block."""
    width = settings.sequence_length - 1
    totals = [sum(map(len, read_shards(folder, split, source))) for source in sources]
    rows = [total // width for total in totals]
    if not all(rows):
        documents = counts["documents" if split == "train" else "held-out documents"]
        which = f" of source {rows.index(0) + 1}" if len(sources) > 1 else ""
        raise ConfigError(
            f"the {split} split{which} has {documents} documents and fills no block of {settings.sequence_length} "
            "tokens; give more text, or lower data.sequence_length or raise data.val_fraction"
        )
    shape = sum(rows), settings.sequence_length
    blocks = np.lib.format.open_memmap(folder / f"{split}.npy", "w+", token_dtype(len(tokenizer)), shape)
    blocks[:, 0] = tokenizer.cls_token_id
    ends = np.cumsum(rows)
    for source, count, end in zip(sources, rows, ends, strict=True):
        fill(blocks[end - count : end, 1:], read_shards(folder, split, source))
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
