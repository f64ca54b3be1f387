"""Documents -> tokens -> packed blocks: nothing lost, made once, and a validation set of its own."""

import math
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import recipes.bert_mlm.shards as shards_module
import recipes.bert_mlm.survey as survey_module
import recipes.bert_mlm.tokens as tokens_module
from lion_lightning.training.errors import ConfigError
from lion_lightning.training.sampler import StepValues
from recipes.bert_mlm.corpus import Corpus, TextFiles, is_held_out
from recipes.bert_mlm.data import BlockDataset, TextBlocks
from recipes.bert_mlm.shards import token_dtype
from recipes.bert_mlm.tokenizer import SPECIAL_TOKENS, first_normal_id, starts_word, train_tokenizer
from recipes.bert_mlm.tokens import BlockSettings, prepare_blocks

SETTINGS = BlockSettings(sequence_length=16, vocab_size=400, val_fraction=0.2, lowercase=True)
PAD, UNK, CLS, SEP, MASK = range(5)


class Listed(Corpus):
    """A corpus of given documents, which counts how often it is read."""

    def __init__(self, documents: list[str], label: str = "listed") -> None:
        self.texts, self.label, self.reads = documents, label, 0

    def fingerprint(self) -> str:
        return self.label

    def documents(self) -> Iterator[str]:
        self.reads += 1
        yield from self.texts


@pytest.fixture(scope="module")
def documents(prose: Path) -> list[str]:
    """Two hundred short documents of real English."""
    paragraphs = [paragraph.strip() for paragraph in prose.read_text(encoding="utf-8").split("\n\n")]
    long = list(dict.fromkeys(paragraph for paragraph in paragraphs if len(paragraph) > 200))
    return long[:200]


def packed(prepared, documents: list[str], length: int) -> list[list[int]]:  # type: ignore[no-untyped-def]
    """Blocks of `documents` by the definition: one text, a separator after each document, cut, with a start each."""
    encoded = (prepared.tokenizer(text, add_special_tokens=False).input_ids for text in documents)
    stream = list(chain.from_iterable([*ids, SEP] for ids in encoded))
    width = length - 1
    return [[CLS, *stream[at : at + width]] for at in range(0, len(stream) - width + 1, width)]


def split(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    unique = list(dict.fromkeys(documents))
    return [t for t in unique if not is_held_out(t, fraction)], [t for t in unique if is_held_out(t, fraction)]


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
    monkeypatch.setattr(tokens_module, "train_tokenizer", lambda *_: trained)
    monkeypatch.setattr(shards_module, "SHARD_CHARACTERS", 5000)
    monkeypatch.setattr(shards_module, "BATCH_DOCUMENTS", 3)
    if not whole:
        monkeypatch.setattr(survey_module, "SAMPLE_CHARACTERS", 4000)
    corpus = Listed(documents)
    found = prepare_blocks([corpus], SETTINGS, tmp_path / "many")
    assert corpus.reads == (1 if whole else 2)
    assert np.array_equal(found.train, expected.train)
    assert np.array_equal(found.val, expected.val)
    assert sorted(file.name for file in found.folder.iterdir()) == sorted(
        ["held_out.npy", "report.json", "tokenizer.json", "tokenizer_config.json", "train.npy", "val.npy"]
    )


def test_a_tokenizer_learns_from_a_bounded_sample_of_the_training_documents(
    monkeypatch: pytest.MonkeyPatch, documents: list[str]
) -> None:
    monkeypatch.setattr(survey_module, "SAMPLE_CHARACTERS", 20_000)
    found = survey_module.survey([Listed(documents)], 0.2)
    train, _ = split(documents, 0.2)
    assert found.whole is None
    assert 5_000 < sum(map(len, found.sample)) <= 20_000
    assert set(found.sample) <= set(train)
    backwards = survey_module.survey([Listed(documents[::-1])], 0.2)
    assert set(backwards.sample) == set(found.sample), "which documents it is does not depend on their order"


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
    assert first_normal_id(tokenizer) == len(SPECIAL_TOKENS)


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


def test_the_second_preparation_reads_the_cache_and_tokenises_nothing(
    documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = Listed(documents)
    first = prepare_blocks([corpus], SETTINGS, tmp_path)

    def must_not_run(*_: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(tokens_module, "train_tokenizer", must_not_run)
    monkeypatch.setattr(tokens_module, "tokenise", must_not_run)
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
    monkeypatch.setattr(tokens_module, "train_tokenizer", lambda *_: tokenizer)
    once = prepare_blocks([Listed(documents, "once")], SETTINGS, tmp_path)
    twice = prepare_blocks([Listed([*documents, *documents, "", "  \n"], "twice")], SETTINGS, tmp_path)
    assert np.array_equal(once.train, twice.train)
    assert np.array_equal(once.val, twice.val)


def test_too_little_text_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"split has .* fills no block of 16 tokens") as error:
        prepare_blocks([Listed(["three short words"])], SETTINGS, tmp_path)
    assert "\n" not in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["locks"], "a failed preparation stays in the cache"


@pytest.fixture(scope="module")
def blocks(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> TextBlocks:
    data = TextBlocks(
        Listed(documents),  # type: ignore[arg-type]
        batch_size=4,
        sequence_length=16,
        vocab_size=400,
        val_fraction=0.2,
        cache_dir=str(tmp_path_factory.mktemp("cache")),
    )
    data.prepare_data()
    data.setup("fit")
    return data


def test_unigram_entropy_is_that_of_the_validation_tokens(blocks: TextBlocks) -> None:
    counts = Counter(token for token in blocks.ready.val.ravel().tolist() if token >= len(SPECIAL_TOKENS))
    total = sum(counts.values())
    direct = -sum(count / total * math.log(count / total) for count in counts.values())
    assert blocks.unigram_entropy() == pytest.approx(direct, rel=1e-12)
    assert 3 < direct < math.log(400)


def test_log_unigram_shares_are_add_one_frequencies_of_the_training_tokens(blocks: TextBlocks) -> None:
    shares = blocks.log_unigram_shares()
    counts = Counter(blocks.ready.train.ravel().tolist())
    size = len(blocks.ready.tokenizer)
    assert shares.shape == (size,)
    assert float(shares.double().exp().sum()) == pytest.approx(1, abs=1e-5)
    total = sum(count for token, count in counts.items() if token >= 5) + size
    for token in (5, 50, size - 1):
        assert float(shares[token]) == pytest.approx(math.log((counts[token] + 1) / total), abs=1e-5)
    assert (shares[:5] == shares[0]).all()


def test_a_batch_carries_tokens_and_the_number_of_each_sample(blocks: TextBlocks) -> None:
    batch = blocks.train_set.__getitems__([(100, 3), (101, 0)])
    assert batch["sample"].tolist() == [100, 101]
    assert batch["input_ids"].dtype == batch["sample"].dtype
    assert batch["input_ids"].tolist() == blocks.ready.train[[3, 0]].tolist()


def test_the_summary_says_tokens_blocks_vocabulary_and_a_sample(blocks: TextBlocks) -> None:
    lines = blocks.describe()
    assert f"{blocks.ready.train.size:,} for training" in lines["tokens"]
    assert f"{len(blocks.ready.val):,} of 16 tokens" in lines["blocks"]
    assert str(len(blocks.ready.tokenizer)) in lines["vocabulary"]
    assert f"{blocks.unigram_entropy():.3f}" in lines["unigram entropy"]
    assert len(lines["a sample"].split()) > 3


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"sequence_length": 7}, "data.sequence_length must be at least 8, got 7"),
        ({"vocab_size": 255}, "data.vocab_size must be at least 256, got 255"),
        ({"val_fraction": 0.0}, r"data\.val_fraction must be between 0 and 1, got 0\.0"),
        ({"val_fraction": 1.0}, r"data\.val_fraction must be between 0 and 1, got 1\.0"),
    ],
)
def test_bad_settings_are_named(wrong: dict[str, float], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        TextBlocks(Listed([]), batch_size=4, **wrong)  # type: ignore[arg-type]


def test_asking_before_setup_says_what_to_call() -> None:
    with pytest.raises(RuntimeError, match="setup"):
        TextBlocks(Listed([]), batch_size=4).describe()  # type: ignore[arg-type]


class Endless(Listed):
    """Stops for good after so many documents, as a machine does that is about to be killed."""

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
    monkeypatch.setattr(tokens_module, "train_tokenizer", lambda *_: trained)
    monkeypatch.setattr(shards_module, "SHARD_CHARACTERS", 5000)
    monkeypatch.setattr(survey_module, "SAMPLE_CHARACTERS", 4000)  # so that the documents are read a second time
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
    write = shards_module._write
    monkeypatch.setattr(shards_module, "_write", lambda file, *rest: (written.append(file.name), write(file, *rest)))
    monkeypatch.setattr(tokens_module, "train_tokenizer", None)
    found = prepare_blocks([Listed(documents)], SETTINGS, cache)
    assert len(done) >= 5
    assert written
    assert not done & set(written)
    assert np.array_equal(found.train, expected.train)
    assert np.array_equal(found.val, expected.val)
    assert not list(cache.glob("unfinished-*"))


def test_short_blocks_are_cut_from_whole_ones_at_the_same_number_of_tokens(blocks: TextBlocks) -> None:
    pairs = [(100, 3), (101, 0), (102, 7)]
    whole = BlockDataset(blocks.ready.train).__getitems__(pairs)
    cut = BlockDataset(blocks.ready.train, StepValues(((0, 4), (100, 8), (200, 16)))).__getitems__(pairs)
    assert cut["input_ids"].shape == (6, 8)
    assert (cut["input_ids"][:, 0] == CLS).all()
    text = whole["input_ids"].reshape(6, 8)
    assert cut["input_ids"][:, 1:].tolist() == text[:, 1:].tolist()
    assert cut["sample"][::2].tolist() == [100, 101, 102]
    assert len(set(cut["sample"].tolist())) == 6
    later = BlockDataset(blocks.ready.train, StepValues(((0, 8), (100, 16)))).__getitems__(pairs)
    assert later["input_ids"].tolist() == whole["input_ids"].tolist()
    assert later["sample"].tolist() == whole["sample"].tolist()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ([[0, 8], [5, 10], [9, 16]], "length_schedule: 10 must be at least 8 and divide data.sequence_length=16"),
        ([[0, 4], [9, 16]], "length_schedule: 4 must be at least 8"),
        ([[0, 8]], r"data\.length_schedule=\[\[0, 8\]\] must end with data\.sequence_length=16"),
        ([[2, 8], [9, 16]], r"data\.length_schedule=.* begin with 0 and rise"),
    ],
)
def test_a_length_schedule_that_cannot_be_is_named(wrong: list[list[int]], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        TextBlocks(Listed([]), batch_size=4, sequence_length=16, length_schedule=wrong)


@pytest.mark.parametrize("done", [0, 1, 3, 5, 9])
def test_schedules_are_exact_after_a_resume(blocks: TextBlocks, done: int) -> None:
    def batches(step: int) -> list[tuple[list[int], list[list[int]]]]:
        data = TextBlocks(
            Listed([]), batch_size=4, sequence_length=16, batch_schedule=[[0, 1], [2, 3], [7, 4]],
            length_schedule=[[0, 8], [5, 16]],
        )  # fmt: skip
        data.blocks, data.train_set = blocks.ready, blocks.train_set
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            global_step=step, max_steps=10, accumulate_grad_batches=2, global_rank=0, world_size=1,
            strategy=SimpleNamespace(root_device=SimpleNamespace(type="cpu")),
        )  # fmt: skip
        return [(batch["sample"].tolist(), batch["input_ids"].tolist()) for batch in data.train_dataloader()]

    whole = batches(0)
    assert batches(done) == whole[2 * done :]
    sizes = [(len(rows), len(rows[0])) for _, rows in whole[::2]]
    assert sizes == [(2, 8)] * 2 + [(6, 8)] * 3 + [(3, 16)] * 2 + [(4, 16)] * 3
