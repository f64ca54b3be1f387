"""Documents -> tokens -> packed blocks: nothing lost, made once, and a validation set of its own."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

import lion_lightning.recipes.text.blocks as blocks_module
from lion_lightning.errors import ConfigError
from lion_lightning.recipes.text.blocks import BlockSettings, prepare_blocks, token_dtype
from lion_lightning.recipes.text.corpus import TextFiles, is_held_out
from lion_lightning.recipes.text.tokenizer import train_tokenizer
from tests.recipes.listed import SETTINGS, Listed, split

PAD, UNK, CLS, SEP, MASK = range(5)


def packed(prepared, documents: list[str], length: int) -> list[list[int]]:  # type: ignore[no-untyped-def]
    """Blocks of `documents` by the definition: one text, a separator after each document, cut, with a start each."""
    encoded = (prepared.tokenizer(text, add_special_tokens=False).input_ids for text in documents)
    stream = list(chain.from_iterable([*ids, SEP] for ids in encoded))
    width = length - 1
    return [[CLS, *stream[at : at + width]] for at in range(0, len(stream) - width + 1, width)]


def test_blocks_hold_every_token_in_order_with_separators_between_documents(
    documents: list[str], tmp_path: Path
) -> None:
    prepared = prepare_blocks([Listed(documents)], SETTINGS, tmp_path)
    train, val = split(documents, SETTINGS.val_fraction)
    assert prepared.train.dtype == np.uint16
    assert prepared.train.tolist() == packed(prepared, train, 16)
    assert prepared.val.tolist() == packed(prepared, val, 16)
    assert not np.isin(prepared.train[:, 1:], [PAD, CLS, MASK]).any()


@pytest.mark.parametrize("whole", [True, False])
def test_shards_batches_and_memory_do_not_change_the_blocks(
    monkeypatch: pytest.MonkeyPatch, documents: list[str], tmp_path: Path, whole: bool
) -> None:
    expected = prepare_blocks([Listed(documents)], SETTINGS, tmp_path / "one")
    trained = train_tokenizer(split(documents, SETTINGS.val_fraction)[0], 400, lowercase=True)
    monkeypatch.setattr(blocks_module, "train_tokenizer", lambda *_: trained)
    monkeypatch.setattr(blocks_module, "SHARD_CHARACTERS", 5000)
    monkeypatch.setattr(blocks_module, "BATCH_DOCUMENTS", 3)
    if not whole:
        monkeypatch.setattr(blocks_module, "SAMPLE_CHARACTERS", 4000)
    corpus = Listed(documents)
    found = prepare_blocks([corpus], SETTINGS, tmp_path / "many")
    assert corpus.reads == (1 if whole else 2)
    assert np.array_equal(found.train, expected.train)
    assert np.array_equal(found.val, expected.val)
    assert sorted(file.name for file in found.folder.iterdir()) == sorted(
        ["held_out.npy", "report.json", "tokenizer.json", "tokenizer_config.json", "train.npy", "val.npy"]
    )


def test_whatever_is_left_out_is_counted(documents: list[str], tmp_path: Path) -> None:
    given = [*documents, "", *documents[:30], " \n"]
    found = prepare_blocks([Listed(given)], SETTINGS, tmp_path)
    train, val = split(documents, SETTINGS.val_fraction)
    tokens = sum(len(found.tokenizer(text, add_special_tokens=False).input_ids) + 1 for text in documents)
    assert found.counts == {
        "documents": len(train),
        "held-out documents": len(val),
        "exact duplicates": 30,
        "empty documents": 2,
        "tokens that fill no block": tokens - 15 * (len(found.train) + len(found.val)),
    }
    assert len(found.held_out()) == len(val)


class WithOwnValidation(Listed):
    def held_out(self) -> Iterator[str]:
        yield from self.texts[:40]


def test_a_source_with_a_validation_set_keeps_it_and_trains_on_none_of_it(documents: list[str], tmp_path: Path) -> None:
    found = prepare_blocks([WithOwnValidation(documents)], SETTINGS, tmp_path)
    assert found.val.tolist() == packed(found, documents[:40], 16)
    assert found.train.tolist() == packed(found, documents[40:], 16)
    assert found.counts["exact duplicates"] == 40


def test_the_blocks_of_several_sources_lie_end_to_end(documents: list[str], tmp_path: Path) -> None:
    found = prepare_blocks([Listed(documents[:120], "one"), Listed(documents[100:], "two")], SETTINGS, tmp_path)
    one, two = (packed(found, split(texts, 0.2)[0], 16) for texts in (documents[:120], documents[120:]))
    assert found.rows == (len(one), len(two))
    assert found.train.tolist() == one + two
    assert found.counts["exact duplicates"] == 20
    assert found.val.tolist() == packed(found, split(documents, 0.2)[1], 16)


def test_a_large_vocabulary_gets_wider_integers() -> None:
    assert token_dtype(2**16) is np.uint16
    assert token_dtype(2**16 + 1) is np.uint32


def test_the_second_preparation_reads_the_cache_and_tokenises_nothing(
    documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = Listed(documents)
    first = prepare_blocks([corpus], SETTINGS, tmp_path)

    def must_not_run(*_: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(blocks_module, "train_tokenizer", must_not_run)
    monkeypatch.setattr(blocks_module, "tokenize_shards", must_not_run)
    second = prepare_blocks([corpus], SETTINGS, tmp_path)
    assert (first.reused, second.reused, corpus.reads) == (False, True, 1)
    assert np.array_equal(first.train, second.train)
    assert np.array_equal(first.val, second.val)
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()
    assert isinstance(second.train, np.memmap)


@pytest.mark.parametrize(
    "other",
    [
        BlockSettings(32, 400, 0.2, True),
        BlockSettings(16, 300, 0.2, True),
        BlockSettings(16, 400, 0.3, True),
        BlockSettings(16, 400, 0.2, False),
    ],
)
def test_every_setting_is_part_of_the_key(documents: list[str], tmp_path: Path, other: BlockSettings) -> None:
    first = prepare_blocks([Listed(documents)], SETTINGS, tmp_path)
    second = prepare_blocks([Listed(documents)], other, tmp_path)
    assert not second.reused
    assert second.folder != first.folder
    assert not prepare_blocks([Listed(documents, "another corpus")], SETTINGS, tmp_path).reused


def test_changing_a_file_prepares_again(documents: list[str], tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number, document in enumerate(documents):
        (tmp_path / "text" / f"{number}.txt").write_text(document, encoding="utf-8")

    def prepared():  # type: ignore[no-untyped-def]
        return prepare_blocks([TextFiles(str(tmp_path / "text"))], SETTINGS, tmp_path / "cache")

    assert [prepared().reused, prepared().reused] == [False, True]
    (tmp_path / "text" / "0.txt").write_text(documents[0] + " And one more sentence.", encoding="utf-8")
    assert [prepared().reused, prepared().reused] == [False, True]


def test_training_and_validation_share_no_document_whatever_the_order(documents: list[str], tmp_path: Path) -> None:
    forwards = prepare_blocks([Listed(documents, "forwards")], SETTINGS, tmp_path)
    backwards = prepare_blocks([Listed(documents[::-1], "backwards")], SETTINGS, tmp_path)

    def texts(blocks: np.ndarray, tokenizer) -> list[str]:  # type: ignore[no-untyped-def]
        stream = tokenizer.decode(blocks[:, 1:].ravel().tolist())
        return [text.strip() for text in stream.split("[SEP]")][:-1]  # the last one is cut off

    held = {forwards.tokenizer.decode(forwards.tokenizer(t).input_ids[1:-1]) for t in documents if is_held_out(t, 0.2)}
    assert 15 < len(held) < 65
    train, val = (set(texts(blocks, forwards.tokenizer)) for blocks in (forwards.train, forwards.val))
    assert val <= held
    assert len(held - val) <= 1
    assert not train & held
    val_backwards = set(texts(backwards.val, backwards.tokenizer))
    assert len(val ^ val_backwards) <= 2, "only the cut last document may differ"


def test_a_document_that_comes_twice_counts_once(
    documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = train_tokenizer(documents, 400, lowercase=True)
    monkeypatch.setattr(blocks_module, "train_tokenizer", lambda *_: tokenizer)
    once = prepare_blocks([Listed(documents, "once")], SETTINGS, tmp_path)
    twice = prepare_blocks([Listed([*documents, *documents, "", "  \n"], "twice")], SETTINGS, tmp_path)
    assert np.array_equal(once.train, twice.train)
    assert np.array_equal(once.val, twice.val)


def test_too_little_text_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"split has .* fills no block of 16 tokens") as error:
        prepare_blocks([Listed(["three short words"])], SETTINGS, tmp_path)
    assert "\n" not in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["locks"], "a failed preparation stays in the cache"


class Endless(Listed):
    """Stops for good after this many documents, as a machine does that is about to be killed."""

    def __init__(self, documents: list[str], stop: int) -> None:
        super().__init__(documents)
        self.stop = stop

    def documents(self) -> Iterator[str]:
        for number, document in enumerate(super().documents()):
            if self.reads == 2 and number == self.stop:
                time.sleep(600)
            yield document


def prepare_slowly(documents: list[str], cache: Path) -> None:
    prepare_blocks([Endless(documents, 150)], SETTINGS, cache)


def test_a_killed_start_is_resumed_without_tokenising_again_what_it_had_done(
    documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = prepare_blocks([Listed(documents)], SETTINGS, tmp_path / "other")
    trained = train_tokenizer(split(documents, SETTINGS.val_fraction)[0], 400, lowercase=True)
    monkeypatch.setattr(blocks_module, "train_tokenizer", lambda *_: trained)
    monkeypatch.setattr(blocks_module, "SHARD_CHARACTERS", 5000)
    monkeypatch.setattr(blocks_module, "SAMPLE_CHARACTERS", 4000)  # so that the documents are read a second time
    cache = tmp_path / "cache"
    process = multiprocessing.get_context("fork").Process(target=prepare_slowly, args=(documents, cache))
    process.start()
    deadline = time.monotonic() + 60
    while len(list(cache.glob("unfinished-*/shard-*.npz"))) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    done = {file.name for file in cache.glob("unfinished-*/shard-*.npz")}
    written: list[str] = []
    write = blocks_module.save_shard
    monkeypatch.setattr(
        blocks_module, "save_shard", lambda file, *rest: (written.append(file.name), write(file, *rest))
    )
    monkeypatch.setattr(blocks_module, "train_tokenizer", None)
    found = prepare_blocks([Listed(documents)], SETTINGS, cache)
    assert len(done) >= 5
    assert written
    assert not done & set(written)
    assert np.array_equal(found.train, expected.train)
    assert np.array_equal(found.val, expected.val)
    assert not list(cache.glob("unfinished-*"))
