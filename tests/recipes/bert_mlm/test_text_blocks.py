"""The data module over packed blocks: what it says of them, batches, and schedules of length and batch size."""

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import lion_lightning.recipes.bert_mlm.data as data_module
from lion_lightning.data.sampler import StepValues
from lion_lightning.errors import ConfigError
from lion_lightning.recipes.bert_mlm.data import BlockDataset, TextBlocks, token_counts
from lion_lightning.recipes.text.tokenizer import SPECIAL_TOKENS
from tests.recipes.listed import Listed

PAD, UNK, CLS, SEP, MASK = range(5)


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


def test_a_resume_with_other_text_is_refused(blocks: TextBlocks, documents: list[str], tmp_path: Path) -> None:
    edited = [text.replace("e", "x") for text in documents]  # as many samples, but ids stand for other words
    options: dict[str, Any] = {"batch_size": 4, "sequence_length": 16, "vocab_size": 400, "val_fraction": 0.2}
    other = TextBlocks(Listed(edited), **options, cache_dir=str(tmp_path))  # type: ignore[arg-type]
    other.setup("fit")
    blocks.load_state_dict(blocks.state_dict())
    blocks.load_state_dict({})  # of a checkpoint of an earlier version
    with pytest.raises(ConfigError, match=r"resume: the data is not that of the run: .*vocabulary was 400 tokens \("):
        other.load_state_dict(blocks.state_dict())


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


def test_tokens_are_counted_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).integers(0, 50, (23, 7), dtype=np.uint16)
    monkeypatch.setattr(data_module, "COUNTED_BLOCKS", 5)
    sizes: list[int] = []
    count = np.bincount
    monkeypatch.setattr(np, "bincount", lambda tokens, **options: sizes.append(tokens.size) or count(tokens, **options))
    assert token_counts(rows, 60).tolist() == count(rows.ravel(), minlength=60).tolist()
    assert sizes == [35, 35, 35, 35, 21]


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
        ({"sequence_length": 7}, "data.sequence_length must be a whole number of at least 8, got 7"),
        ({"vocab_size": 255}, "data.vocab_size must be a whole number of at least 256, got 255"),
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
    assert blocks.samples_in(cut) == blocks.samples_in(whole) == 3, "parts of a block are no samples of their own"
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
