"""Documents -> WordPiece tokenizer -> packed blocks of tokens on disk, made once and memory-mapped from then on.

A block is `[CLS]` and `sequence_length - 1` tokens of the running text, in which `[SEP]` ends each document: no
padding, so every position is worth computing.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertTokenizer, PreTrainedTokenizerBase

from lion_lightning.training.cache import cached_folder
from lion_lightning.training.errors import ConfigError
from recipes.bert_mlm.corpus import Corpus, is_held_out

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
FORMAT_VERSION = 3  # raise it when what is written to the cache changes
DOCUMENTS_PER_BATCH = 512
MAX_CHARACTERS = 500  # rarer ones become [UNK]; each takes two places of the vocabulary


@dataclass(frozen=True)
class BlockSettings:
    """What the blocks depend on, beside the text itself."""

    sequence_length: int
    vocab_size: int
    val_fraction: float
    lowercase: bool


@dataclass(frozen=True)
class Blocks:
    """Packed token blocks and the tokenizer that made them.

    Attributes:
        train, val: integer arrays (blocks, sequence_length), memory-mapped.
        tokenizer: opens as a Hugging Face tokenizer.
        reused: True if the cache had them and nothing was tokenised.
    """

    train: np.ndarray
    val: np.ndarray
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    reused: bool


def prepare_blocks(corpus: Corpus, settings: BlockSettings, cache: Path) -> Blocks:
    """The blocks of `corpus`, from the cache if it has them.

    Raises:
        ConfigError: not enough text for a training and a validation block.
    """
    key = json.dumps([FORMAT_VERSION, corpus.fingerprint(), asdict(settings)])
    folder, reused = cached_folder(cache, key, lambda folder: _write(corpus, settings, folder))
    return Blocks(
        train=np.load(folder / "train.npy", mmap_mode="r"),
        val=np.load(folder / "val.npy", mmap_mode="r"),
        tokenizer=BertTokenizer.from_pretrained(folder),
        folder=folder,
        reused=reused,
    )


def _write(corpus: Corpus, settings: BlockSettings, folder: Path) -> None:
    documents = list(dict.fromkeys(document for document in corpus.documents() if document.strip()))
    split = {"train": [], "val": []}  # type: dict[str, list[str]]
    for document in documents:
        split["val" if is_held_out(document, settings.val_fraction) else "train"].append(document)
    tokenizer = train_tokenizer(split["train"], settings.vocab_size, settings.lowercase)
    for name, texts in split.items():
        blocks = pack(tokenizer, iter(texts), settings.sequence_length)
        if not len(blocks):
            raise ConfigError(
                f"the {name} split has {len(texts)} documents and fills no block of {settings.sequence_length} tokens; "
                "give more text, or lower data.sequence_length or raise data.val_fraction"
            )
        np.save(folder / f"{name}.npy", blocks)
    _as_transformers(tokenizer, settings).save_pretrained(folder)


def train_tokenizer(documents: Sequence[str], vocab_size: int, lowercase: bool) -> Tokenizer:
    """A WordPiece tokenizer in BERT's conventions, trained on `documents`; the same one each time."""
    learner = _tokenizer(models.WordPiece(unk_token="[UNK]"), lowercase)
    # The trainer breaks ties by the ids of the pieces, and gives the single characters theirs in the order of a hash
    # map that differs from run to run. Naming them first, as if they were special, makes it repeat itself.
    characters = _characters(learner, documents)
    first = [*SPECIAL_TOKENS, *characters, *(f"##{character}" for character in characters)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=max(vocab_size, len(first)), special_tokens=first, show_progress=False, min_frequency=2
    )
    learner.train_from_iterator(documents, trainer)
    tokenizer = _tokenizer(models.WordPiece(learner.get_vocab(), unk_token="[UNK]"), lowercase)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.decoder = decoders.WordPiece()
    separator, start = SPECIAL_TOKENS.index("[SEP]"), SPECIAL_TOKENS.index("[CLS]")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", separator), ("[CLS]", start))
    return tokenizer


def _tokenizer(model: models.WordPiece, lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _characters(tokenizer: Tokenizer, documents: Sequence[str]) -> list[str]:
    """The most frequent characters of the normalised text, in alphabetical order."""
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(tokenizer.normalizer.normalize_str(document))
    frequent = sorted((character for character in counts if not character.isspace()), key=lambda c: (-counts[c], c))
    return sorted(frequent[:MAX_CHARACTERS])


def pack(tokenizer: Tokenizer, documents: Iterator[str], sequence_length: int) -> np.ndarray:
    """Tokens of all documents, cut into blocks: (blocks, sequence_length), uint16 where the vocabulary allows."""
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    separator = np.array([tokenizer.token_to_id("[SEP]")], dtype)
    pieces: list[np.ndarray] = []
    while batch := list(islice(documents, DOCUMENTS_PER_BATCH)):  # encode_batch runs on all cores
        for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
            pieces += [np.array(encoding.ids, dtype), separator]
    width = sequence_length - 1
    stream = np.concatenate(pieces) if pieces else separator[:0]
    text = stream[: len(stream) // width * width].reshape(-1, width)
    return np.concatenate([np.full((len(text), 1), tokenizer.token_to_id("[CLS]"), dtype), text], axis=1)


def _as_transformers(tokenizer: Tokenizer, settings: BlockSettings) -> PreTrainedTokenizerBase:
    return BertTokenizer(
        tokenizer_object=tokenizer,
        do_lower_case=settings.lowercase,
        model_max_length=settings.sequence_length,
        model_input_names=["input_ids", "attention_mask"],  # no token types: ModernBERT takes none, BERT needs none
    )
