"""The tokenizer: trained on the corpus in BERT's conventions, or loaded from a folder or the hub."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase

from lion_lightning.errors import ConfigError, check_flag, check_number

from ..files import one_line

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_CHARACTERS = 500  # rarer ones become [UNK]; each takes two places of the vocabulary
MAX_WORD_CHARACTERS = 100  # WordPiece makes a longer word [UNK]
HUGGING_FACE_FILES = ("config.json", "*token*", "*vocab*", "*.model")
UNUSED = re.compile(r"\[unused\d+\]")  # places that BERT's and ModernBERT's vocabularies keep free
CONTINUES = "##"  # WordPiece marks the pieces that continue a word
BEGINS = ("Ġ", "▁", "Ċ")  # byte-level BPE and SentencePiece mark those that begin one
MIN_SEQUENCE_LENGTH, MIN_VOCAB_SIZE = 8, 256


def check_text_settings(sequence_length: int, vocab_size: int, lowercase: bool) -> None:
    """Raise ConfigError for settings of `data` with which no text can be cut into tokens."""
    check_number("data.sequence_length", sequence_length, f"[{MIN_SEQUENCE_LENGTH}, inf)", whole=True)
    check_number("data.vocab_size", vocab_size, f"[{MIN_VOCAB_SIZE}, inf)", whole=True)
    check_flag("data.lowercase", lowercase)


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
    # A longer word is never cut into pieces; to learn from it takes a time that grows with the square of its length.
    without_long = pre_tokenizers.Split(Regex(rf"\A.{{{MAX_WORD_CHARACTERS + 1},}}\z"), "removed")
    learner.pre_tokenizer = pre_tokenizers.Sequence([learner.pre_tokenizer, without_long])
    learner.train_from_iterator(documents, trainer)
    model = models.WordPiece(learner.get_vocab(), unk_token="[UNK]", max_input_chars_per_word=MAX_WORD_CHARACTERS)
    tokenizer = _tokenizer(model, lowercase)
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


def as_transformers(tokenizer: Tokenizer, lowercase: bool, sequence_length: int) -> PreTrainedTokenizerBase:
    """`tokenizer` as a tokenizer of `transformers`."""
    return BertTokenizer(
        tokenizer_object=tokenizer,
        do_lower_case=lowercase,
        model_max_length=sequence_length,
        model_input_names=["input_ids", "attention_mask"],  # no token types: ModernBERT takes none, BERT needs none
    )


def load_tokenizer(
    place: str, setting: str = "data.tokenizer", roles: Collection[str] = ("cls_token", "sep_token", "pad_token")
) -> PreTrainedTokenizerBase:
    """The tokenizer in a Hugging Face folder, or of that name on the hub.

    Args:
        place: folder or name.
        setting: the setting that gave `place`, for error messages.
        roles: special tokens that it must have.

    Raises:
        ConfigError: there is none, it is empty, not a fast one, or lacks one of `roles`.
    """
    with opening(setting, place):
        tokenizer = AutoTokenizer.from_pretrained(existing(setting, place))
    missing = [role for role in roles if getattr(tokenizer, role, None) is None]
    if missing or len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ConfigError(
            f"{setting}={place} has no tokenizer that a BERT can use: it "
            f"{'has no ' + ', '.join(missing) if missing else 'is empty'}"
        )
    if not tokenizer.is_fast:
        raise ConfigError(f"{setting}={place} is not a fast tokenizer, which needs a tokenizer.json")
    return tokenizer


def load_masking_tokenizer(place: str) -> PreTrainedTokenizerBase:
    """The tokenizer at `data.tokenizer=place`, which has everything that masked language modelling needs.

    Raises:
        ConfigError: see `load_tokenizer`; or it leaves out ids.
    """
    tokenizer = load_tokenizer(place, roles=("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"))
    highest = max(tokenizer.get_vocab().values())
    if highest >= len(tokenizer):
        raise ConfigError(
            f"data.tokenizer={place} has {len(tokenizer):,} tokens and ids up to {highest:,}: some are left out"
        )
    return tokenizer


def existing(setting: str, place: str) -> str:
    """`place` in the form the library expects: an existing folder, or a hub name (`name` or `owner/name`).

    Args:
        setting: the setting that gave `place`, for error messages.
        place: folder or name.

    Raises:
        ConfigError: it can only be meant as a folder, and there is none.
    """
    folder, by_default = Path(place).expanduser(), _origin(setting)
    if folder.is_dir():
        if not any(any(folder.glob(name)) for name in HUGGING_FACE_FILES):
            inside = f", but {place}/export is one" if (folder / "export").is_dir() else ""
            raise ConfigError(
                f"{setting}={place} cannot be opened: no export, nor a Hugging Face folder{inside}{by_default}"
            )
        return str(folder)
    if folder.exists():
        raise ConfigError(f"{setting}={place} is a file; give the folder it is in")
    if place.count("/") > 1 or place.startswith((".", "~", "/")):
        raise ConfigError(f"{setting}={place}: there is no such folder{by_default}")
    return place


@contextmanager
def opening(setting: str, place: str) -> Iterator[None]:
    """Turn what the libraries raise on an unusable folder or name into a one-line ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ConfigError(
            f"{setting}={place} cannot be opened, as a folder or from the hub: {one_line(error)}{_origin(setting)}"
        ) from error


def _origin(setting: str) -> str:
    """For an error message: where `setting` comes from if the user has not typed it."""
    return "; data.tokenizer is model.pretrained by default" if setting == "data.tokenizer" else ""


def identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the tokenizer's definition."""
    return hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode(), digest_size=10).hexdigest()


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Size and a hash of the vocabulary: what decides which text an id stands for."""
    entries = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    return f"{len(tokenizer)} tokens ({hashlib.blake2b(entries, digest_size=4).hexdigest()})"


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Which ids are special tokens, wherever they are in the vocabulary: bool (vocabulary,)."""
    table = torch.zeros(len(tokenizer), dtype=torch.bool)
    named_so = (number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    table[[*tokenizer.all_special_ids, *named_so]] = True
    return table


def replacement_ids(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The ids that a random token is drawn from, ascending: int64.

    Excluded are special tokens, tokens added to the vocabulary, and its unused places.
    """
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    barred = special_tokens(tokenizer)
    barred[list(tokenizer.added_tokens_decoder)] = True
    barred |= torch.tensor([UNUSED.fullmatch(piece) is not None for piece in pieces])
    return (~barred).nonzero().flatten()


def starts_word(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Which tokens begin a word, by the marks of WordPiece, byte-level BPE or SentencePiece: bool (vocabulary,)."""
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    begin, go_on = ([piece.startswith(mark) for piece in pieces] for mark in (BEGINS, CONTINUES))
    # A few pieces may look like the other mark: RoBERTa's and ModernBERT's vocabularies have the headings ## and ###.
    return torch.tensor(begin if sum(begin) > sum(go_on) else [not found for found in go_on])
