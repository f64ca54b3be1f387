"""One reading of the corpora before they are tokenised: which documents count, for what, and a bounded sample."""

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from recipes.bert_mlm.corpus import Corpus, digest

SAMPLE_CHARACTERS = 2**27  # what a tokenizer is trained on at most
LEFT_OUT, TRAIN, VAL = 0, 1, 2
BY_CONTENT = LEFT_OUT  # in place of a role that a source does not decide
_EMPTY = 0  # stands for the digest of a document without text


@dataclass(frozen=True)
class Survey:
    """What a reading of all documents found.

    Attributes:
        roles: uint8 (documents,), LEFT_OUT, TRAIN or VAL for each in the order of `read`.
        held_out: uint64, the digests of those that are VAL.
        characters: of all documents.
        empty, duplicates: documents that are left out.
        sample: documents to train a tokenizer on; a hash picks them where all are too many.
        whole: all documents in the order of `read`, or None where they are too many to be held.
    """

    roles: np.ndarray
    held_out: np.ndarray
    characters: int
    empty: int
    duplicates: int
    sample: list[str] = field(repr=False)
    whole: list[tuple[int, str]] | None = field(repr=False)


def read(corpora: Sequence[Corpus]) -> Iterator[tuple[int, int, str]]:
    """All documents as (number of the source, TRAIN, VAL or BY_CONTENT, text)."""
    for source, corpus in enumerate(corpora):
        held_out = corpus.held_out()
        if held_out is not None:
            yield from ((source, VAL, document) for document in held_out)
        role = BY_CONTENT if held_out is None else TRAIN
        yield from ((source, role, document) for document in corpus.documents())


def survey(corpora: Sequence[Corpus], val_fraction: float) -> Survey:
    """Read all documents once, and keep 9 bytes of each and a bounded sample.

    Left out are documents without text, and those that came before. Held out are the documents of a source's own
    validation set, or else a share of its documents, by their content.
    """
    digests, given, characters = array("Q"), array("B"), 0
    sample, whole = _Sample(SAMPLE_CHARACTERS), _Whole(SAMPLE_CHARACTERS)
    threshold = math.ceil(val_fraction * 2**64)
    for source, role, document in read(corpora):
        known = digest(document) if document.strip() else _EMPTY
        digests.append(known)
        given.append(role)
        characters += len(document)
        whole.add((source, document))
        if known != _EMPTY and (role or (VAL if known < threshold else TRAIN)) == TRAIN:
            sample.add(known, document)
    numbers = np.frombuffer(digests, np.uint64)
    roles = np.frombuffer(given, np.uint8).copy()
    roles[roles == BY_CONTENT] = np.where(numbers < np.uint64(threshold), VAL, TRAIN)[roles == BY_CONTENT]
    first = np.zeros(len(numbers), bool)
    first[np.unique(numbers, return_index=True)[1]] = True
    empty = numbers == _EMPTY
    roles[empty | ~first] = LEFT_OUT
    return Survey(
        roles=roles,
        held_out=numbers[roles == VAL],
        characters=characters,
        empty=int(empty.sum()),
        duplicates=int((~empty & ~first).sum()),
        sample=list(sample.kept.values()),
        whole=whole.kept,
    )


class _Sample:
    """Different documents, at most so many characters of them; which ones, their digests alone decide."""

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


class _Whole:
    """All documents, until they are too many characters."""

    def __init__(self, most: int) -> None:
        self.left = most
        self.kept: list[tuple[int, str]] | None = []

    def add(self, document: tuple[int, str]) -> None:
        self.left -= len(document[1])
        if self.left < 0:
            self.kept = None
        if self.kept is not None:
            self.kept.append(document)
