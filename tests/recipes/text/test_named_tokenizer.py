"""A tokenizer in the layout of ModernBERT's: special tokens behind the words, a special one among the first ids."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, pipeline

from lion_lightning.errors import ConfigError
from lion_lightning.recipes.bert_mlm.data import TextBlocks
from lion_lightning.recipes.bert_mlm.masking import IGNORED
from lion_lightning.recipes.text.corpus import TextFiles
from lion_lightning.recipes.text.tokenizer import load_masking_tokenizer, replacement_ids, special_tokens, starts_word
from lion_lightning.training.run import run
from tests.recipes.small_bert import build

ROLES = ("unk", "cls", "sep", "pad", "mask")  # in the order of their ids
WORDS = 400  # <|padding|> and the pieces
GAP, SPECIAL, UNUSED = WORDS, slice(WORDS + 1, WORDS + 6), slice(WORDS + 6, WORDS + 9)


@pytest.fixture(scope="module")
def folder(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<|padding|>`, byte-level pieces, a run of spaces, the special tokens, `[unused0]` to `[unused2]`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS,
        special_tokens=["<|padding|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.add_tokens([AddedToken("  ", normalized=True)])
    names = [f"[{role.upper()}]" for role in ROLES]
    tokenizer.add_special_tokens(names)
    tokenizer.add_tokens([AddedToken(f"[unused{number}]", normalized=False) for number in range(3)])
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    kept = tmp_path_factory.mktemp("modernbert")
    roles = {f"{role}_token": name for role, name in zip(ROLES, names, strict=True)}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(kept)
    return kept


@pytest.fixture(scope="module")
def data(folder: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> TextBlocks:
    place = tmp_path_factory.mktemp("text")
    text = place / "short.txt"
    text.write_text(prose.read_text(encoding="utf-8")[:100_000], encoding="utf-8")
    made = TextBlocks(
        TextFiles(str(text)), batch_size=8, sequence_length=32, val_fraction=0.3, tokenizer=str(folder),
        cache_dir=str(place / "cache"),
    )  # fmt: skip
    made.setup("fit")
    return made


def test_what_is_no_text_is_known_wherever_it_lies(folder: Path) -> None:
    tokenizer = load_masking_tokenizer(str(folder))
    ids = np.arange(len(tokenizer))
    assert len(tokenizer) == UNUSED.stop
    assert set(tokenizer.all_special_ids) == set(ids[SPECIAL])
    assert set(special_tokens(tokenizer).nonzero().flatten().tolist()) == {0, *ids[SPECIAL]}
    assert replacement_ids(tokenizer).tolist() == list(range(1, WORDS))


def test_places_that_a_wordpiece_vocabulary_keeps_free_are_not_drawn(tmp_path: Path) -> None:
    """The layout of BERT's own: `[PAD] [unused0] [unused1] [UNK] [CLS] [SEP] [MASK] [unused2] a ...`."""
    pieces = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused2]", "a", "b", "##b"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    tokenizer = load_masking_tokenizer(str(tmp_path))
    assert tokenizer.convert_ids_to_tokens(list(range(11))) == pieces
    assert special_tokens(tokenizer).nonzero().flatten().tolist() == [0, 3, 4, 5, 6]
    assert replacement_ids(tokenizer).tolist() == [8, 9, 10]


def test_a_piece_that_looks_like_wordpiece_changes_nothing_of_where_words_begin(documents: list[str]) -> None:
    """RoBERTa's and ModernBERT's vocabularies have `##` and `###` of Markdown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator([*documents, "## Title\n\n" * 99], trainers.BpeTrainer(vocab_size=400))
    named = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    begins = starts_word(named)
    assert begins[named.convert_tokens_to_ids("Ġthe")]
    assert not begins[named.convert_tokens_to_ids(["##", "s", "."])].any()


def test_blocks_are_made_of_the_tokenizers_own_ids(data: TextBlocks) -> None:
    tokenizer, train = data.ready.tokenizer, data.ready.train
    assert (train[:, 0] == tokenizer.cls_token_id).all()
    assert (train == tokenizer.sep_token_id).any()
    assert "UNK" not in str(tokenizer.decode(train[:20].ravel().tolist()))
    assert f"{len(tokenizer)} tokens" in data.describe()["vocabulary"]


def test_the_yardstick_counts_text_alone(data: TextBlocks) -> None:
    shares = data.log_unigram_shares().double()
    assert torch.allclose(shares.exp().sum(), torch.tensor(1.0, dtype=torch.double), atol=1e-5)
    assert (shares[SPECIAL] == shares[UNUSED.start]).all(), "special tokens count as if they never came"
    counts = np.bincount(data.ready.val.ravel())
    counts[[0, *range(SPECIAL.start, min(SPECIAL.stop, len(counts)))]] = 0
    expected = counts[counts > 0] / counts.sum()
    assert data.unigram_entropy() == pytest.approx(-(expected * np.log(expected)).sum(), rel=1e-12)


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_special_tokens_are_neither_hidden_nor_drawn(data: TextBlocks, unit: str) -> None:
    module = build(data, unit=unit, rate=0.5)
    object.__setattr__(module.masking, "mask_share", 0.0)
    object.__setattr__(module.masking, "random_share", 1.0)
    ids = torch.from_numpy(data.ready.train[:200].astype(np.int64)).repeat(5, 1)  # 16,000 draws: none is missing
    masked = module._mask({"input_ids": ids, "sample": torch.arange(1000)}, module.masking, seed=3)
    kept = masked.targets != IGNORED
    drawn = masked.input_ids.gather(1, masked.positions)[kept]
    special = special_tokens(data.ready.tokenizer)
    assert not special[masked.targets[kept]].any()
    assert set(drawn.tolist()) == set(range(1, WORDS)), "every piece, and nothing else"


def test_a_run_ends_in_a_folder_that_fills_masks(folder: Path, prose: Path, compose: Any, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text(prose.read_text(encoding="utf-8")[:100_000], encoding="utf-8")
    cfg = compose(
        "data=text_files", f"data.path={text}", f"data.tokenizer={folder}", f"data.cache_dir={tmp_path}/cache",
        "data.batch_size=8", "data.sequence_length=32", "data.val_fraction=0.3", "model.config.hidden_size=32",
        "trainer.max_steps=4", "trainer.val_check_interval=4", "logger=none", f"run_dir={tmp_path}/run",
    )  # fmt: skip
    run(cfg)
    fill = pipeline("fill-mask", model=str(tmp_path / "run" / "export"), device="cpu")
    assert fill.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(folder).get_vocab()
    best = fill("The statement is [MASK] by the interpreter.", top_k=5)
    assert len(best) == 5
    assert all(0 < guess["token"] <= GAP for guess in best)
    assert all("statement" in guess["sequence"] for guess in best)
    config = fill.model.config
    assert fill.tokenizer.model_max_length <= config.max_position_embeddings
    assert (config.vocab_size, config.pad_token_id) == (UNUSED.stop, fill.tokenizer.pad_token_id)


def test_a_tokenizer_that_leaves_out_ids_is_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((folder / name).read_text(encoding="utf-8"), encoding="utf-8")
    kept = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = kept["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 5000
    (tmp_path / "tokenizer.json").write_text(json.dumps(kept), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data\.tokenizer=.* ids up to 5,000: some are left out"):
        load_masking_tokenizer(str(tmp_path))


def test_a_tokenizer_without_a_mask_token_is_named(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"data.tokenizer={tmp_path} has no tokenizer .*: it has no mask_token"):
        load_masking_tokenizer(str(tmp_path))
