"""Tokenising in shards: on all cores, in bounded memory, and resumed after an interruption."""

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from recipes.bert_mlm.survey import TRAIN, VAL

SHARD_CHARACTERS = 2**24  # about 4 M tokens, a few seconds of work
BATCH_CHARACTERS, BATCH_DOCUMENTS = 2**21, 512  # a token takes 100 bytes while it is an `Encoding`
SPLITS = {"train": TRAIN, "val": VAL}


def tokenise(
    documents: Iterable[tuple[int, str]],
    roles: np.ndarray,
    characters: int,
    tokenizer: Tokenizer,
    separator: int,
    folder: Path,
) -> None:
    """Write the tokens of `documents`, shard by shard; shards that are there already are not made again.

    Args:
        documents: (number of the source, text), source after source.
        roles: TRAIN, VAL or LEFT_OUT for each document.
        characters: of all documents, for the progress bar.
        tokenizer: its `encode_batch_fast` runs on all cores.
        separator: id of the token that ends a document.
        folder: `shard-<source>-<number>.npz` come here, with arrays `train` and `val` of `token_dtype`.
    """
    with _progress() as progress:
        task = progress.add_task("tokenising", total=characters)
        for number, (source, shard, read) in enumerate(_shards(documents, roles)):
            file = folder / f"shard-{source:03}-{number:06}.npz"
            if not file.exists():
                _write(file, _tokens(shard, tokenizer, separator))
            progress.advance(task, read)


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest integers that hold every id."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def read_shards(folder: Path, split: str, source: int | None = None) -> Iterator[np.ndarray]:
    """The tokens of `split`, a shard at a time; of one source, or of all."""
    for file in sorted(folder.glob(f"shard-{'*' if source is None else f'{source:03}'}-*.npz")):
        with np.load(file) as shard:
            yield shard[split]


def encode(documents: Iterable[str], tokenizer: Tokenizer, separator: int) -> Iterator[np.ndarray]:
    """The tokens of each document, `separator` at the end, by batches on all cores."""
    dtype = token_dtype(tokenizer.get_vocab_size())
    for batch in _batches(documents):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            yield np.array([*encoding.ids, separator], dtype)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    length = 0
    for document in documents:
        batch.append(document)
        length += len(document)
        if length >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


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


def _tokens(shard: list[tuple[int, str]], tokenizer: Tokenizer, separator: int) -> dict[str, np.ndarray]:
    pieces: dict[int, list[np.ndarray]] = {role: [] for role in SPLITS.values()}
    encoded = encode((document for _, document in shard), tokenizer, separator)
    for (role, _), tokens in zip(shard, encoded, strict=True):
        pieces[role].append(tokens)
    none = np.empty(0, token_dtype(tokenizer.get_vocab_size()))
    return {split: np.concatenate([none, *pieces[role]]) for split, role in SPLITS.items()}


def _write(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Whole or not at all, however the process ends."""
    temporary = file.with_suffix(".writing")
    with temporary.open("wb") as out:
        np.savez(out, **arrays)  # type: ignore[arg-type]  # names, which it takes for options
    os.replace(temporary, file)


def _progress() -> Progress:
    console = Console(file=sys.stderr)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
