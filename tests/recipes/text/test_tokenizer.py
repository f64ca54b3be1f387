"""The tokenizer that is trained on the text, or one that is named."""

from pathlib import Path

import numpy as np
import pytest

import lion_lightning.recipes.text.blocks as blocks_module
import lion_lightning.recipes.text.blocks as tokens_module
import lion_lightning.recipes.text.tokenizer as tokenizer_module
from lion_lightning.errors import ConfigError
from lion_lightning.recipes.text.blocks import BlockSettings, prepare_blocks
from lion_lightning.recipes.text.corpus import is_held_out
from lion_lightning.recipes.text.tokenizer import (
    SPECIAL_TOKENS,
    replacement_ids,
    special_tokens,
    starts_word,
    train_tokenizer,
)
from tests.recipes.listed import SETTINGS, Listed, split

PAD, UNK, CLS, SEP, MASK = range(5)


def test_a_named_tokenizer_is_used_as_it_is(documents: list[str], tmp_path: Path) -> None:
    trained = prepare_blocks([Listed(documents)], SETTINGS, tmp_path)
    named = BlockSettings(16, 999, 0.2, lowercase=False, tokenizer=str(trained.folder))
    found = prepare_blocks([Listed(documents)], named, tmp_path / "other")
    assert np.array_equal(found.train, trained.train)
    assert found.tokenizer.get_vocab() == trained.tokenizer.get_vocab()
    assert prepare_blocks([Listed(documents)], named, tmp_path / "other").reused


def test_a_tokenizer_that_is_not_there_is_named(documents: list[str], tmp_path: Path) -> None:
    settings = BlockSettings(16, 400, 0.2, True, tokenizer=str(tmp_path))
    with pytest.raises(ConfigError, match=r"data\.tokenizer=") as error:
        prepare_blocks([Listed(documents)], settings, tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_pieces_that_go_on_with_a_word_are_known(documents: list[str], tmp_path: Path) -> None:
    tokenizer = prepare_blocks([Listed(documents)], SETTINGS, tmp_path).tokenizer
    table = starts_word(tokenizer)
    assert table.shape == (len(tokenizer),)
    for text in ("the", "[SEP]", "##s", "."):
        assert bool(table[tokenizer.convert_tokens_to_ids(text)]) is not text.startswith("##")
    assert special_tokens(tokenizer).tolist() == [True] * len(SPECIAL_TOKENS) + [False] * (len(tokenizer) - 5)
    assert replacement_ids(tokenizer).tolist() == list(range(5, len(tokenizer)))


def test_the_special_tokens_come_first(documents: list[str], tmp_path: Path) -> None:
    tokenizer = prepare_blocks([Listed(documents)], SETTINGS, tmp_path).tokenizer
    assert tokenizer.convert_ids_to_tokens(list(range(5))) == list(SPECIAL_TOKENS)
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id) == (PAD, UNK, CLS)
    assert (tokenizer.sep_token_id, tokenizer.mask_token_id) == (SEP, MASK)
    assert len(tokenizer) <= SETTINGS.vocab_size


def test_a_tokenizer_is_the_same_however_often_it_is_trained(documents: list[str]) -> None:
    """Else two machines, or one after its cache was cleared, train on different numbers for the same text."""
    first, second = (train_tokenizer(documents, 400, lowercase=True).get_vocab() for _ in range(2))
    assert first == second


@pytest.mark.parametrize("lowercase", [True, False])
def test_the_kept_tokenizer_is_the_trained_one(
    documents: list[str], tmp_path: Path, lowercase: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = train_tokenizer([text for text in documents if not is_held_out(text, 0.2)], 400, lowercase)
    monkeypatch.setattr(tokens_module, "train_tokenizer", lambda *_: trained)
    kept = prepare_blocks([Listed(documents)], BlockSettings(16, 400, 0.2, lowercase), tmp_path).tokenizer
    for text in [*documents[:50], "Naïve CAFÉ in München, 東京!", "unbelievably\tLONG\n\nspaces"]:
        assert kept(text).input_ids == trained.encode(text).ids
    assert "the" in kept.get_vocab()
    assert ("The" in kept.get_vocab()) is not lowercase


def test_a_tokenizer_learns_from_a_bounded_sample_of_the_training_documents(
    monkeypatch: pytest.MonkeyPatch, documents: list[str]
) -> None:
    monkeypatch.setattr(blocks_module, "SAMPLE_CHARACTERS", 20_000)
    found = blocks_module.scan_corpora([Listed(documents)], 0.2)
    train, _ = split(documents, 0.2)
    assert found.whole is None
    assert 5_000 < sum(map(len, found.sample)) <= 20_000
    assert set(found.sample) <= set(train)
    backwards = blocks_module.scan_corpora([Listed(documents[::-1])], 0.2)
    assert set(backwards.sample) == set(found.sample), "which documents it is does not depend on their order"


def test_a_word_too_long_to_be_used_teaches_nothing(documents: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """WordPiece makes it [UNK], and the trainer takes a time that grows with the square of its length."""
    usual = train_tokenizer(documents, 400, lowercase=True)
    for length, is_known in ((100, True), (101, False)):
        tokens = usual.encode("ab" * (length // 2) + "a" * (length % 2), add_special_tokens=False).tokens
        assert (tokens != ["[UNK]"]) is is_known
    longer = train_tokenizer([*documents, *["acgt" * 30] * 99], 400, lowercase=True)
    assert longer.get_vocab() == usual.get_vocab()
    monkeypatch.setattr(tokenizer_module, "MAX_WORD_CHARACTERS", 99_999)
    assert train_tokenizer(documents, 400, lowercase=True).get_vocab() == usual.get_vocab()
