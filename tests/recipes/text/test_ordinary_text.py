"""Ordinary small texts: something is always held out, what is written in the text stays text, faults are told."""

import json
import logging
import re
from pathlib import Path

import pytest

from lion_lightning.errors import ConfigError
from lion_lightning.recipes.tables import Columns, read_table
from lion_lightning.recipes.text.blocks import BlockSettings, prepare_blocks
from lion_lightning.recipes.text.corpus import HubText, TextFiles
from lion_lightning.recipes.text_classification.data import LabeledTexts
from lion_lightning.recipes.text_classification.sources import LabeledFiles


def sentences(count: int) -> list[str]:
    words = re.findall(r"\w+", "the quick brown fox jumps over a lazy dog while seven old men walk along many rivers")
    return [
        " ".join(words[(number * step) % len(words)] for step in range(1, 30)) + f" {number}."
        for number in range(count)
    ]


def blocks_of(corpus, tmp_path: Path, **settings):
    chosen = {"sequence_length": 64, "vocab_size": 300, "val_fraction": 0.02, "lowercase": True, **settings}
    return prepare_blocks([corpus], BlockSettings(**chosen), tmp_path / "cache")


TEXTS = {
    "a paragraph a line": "\n".join(sentences(8000)),
    "one small novel": "\n\n".join("\n".join(sentences(1000)[start : start + 6]) for start in range(0, 1000, 6)),
    "400 short paragraphs": "\n\n".join(f"note {number}: {number * 7} apples" for number in range(400)),
}


@pytest.mark.parametrize("name", TEXTS)
def test_something_is_always_held_out(tmp_path: Path, name: str) -> None:
    (tmp_path / "text.txt").write_text(TEXTS[name])
    blocks = blocks_of(TextFiles(str(tmp_path / "text.txt")), tmp_path)
    assert len(blocks.train) > 10 * len(blocks.val) >= 10
    assert blocks.counts["documents"] + blocks.counts["held-out documents"] >= 15
    held_out = blocks.val.size / (blocks.val.size + blocks.train.size)
    assert 0.01 <= held_out <= 0.1


def test_what_is_held_out_is_neither_trained_on_nor_in_the_sample_of_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXTS["one small novel"])
    corpus = TextFiles(str(tmp_path / "text.txt"))
    whole = list(corpus.documents())
    blocks = blocks_of(corpus, tmp_path, val_fraction=0.001)
    assert blocks.counts["held-out documents"] >= 1
    assert blocks.counts["documents"] + blocks.counts["held-out documents"] == len(whole)


def test_special_tokens_that_are_written_in_a_text_are_text(tmp_path: Path) -> None:
    lines = [f"{line} [MASK] [SEP] [PAD]" for line in sentences(400)]
    (tmp_path / "text.txt").write_text("\n\n".join(lines))
    blocks = blocks_of(TextFiles(str(tmp_path / "text.txt")), tmp_path)
    assert blocks.tokenizer.mask_token_id not in blocks.train
    assert blocks.tokenizer.pad_token_id not in blocks.train
    assert "[ mask ]" in blocks.tokenizer.decode(blocks.train[0].tolist())
    assert blocks.tokenizer("[MASK]", add_special_tokens=False).input_ids == [blocks.tokenizer.mask_token_id]
    table = "text,label\n" + "".join(f"{line},{'xy'[number % 2]}\n" for number, line in enumerate(lines))
    (tmp_path / "train.csv").write_text(table)
    data = LabeledTexts(LabeledFiles(str(tmp_path / "train.csv")), batch_size=4, cache_dir=str(tmp_path / "cache"))
    data.setup("fit")
    assert data.tokenizer.mask_token_id not in data.train_set.texts.tokens


def test_lone_surrogates_are_replaced_and_pairs_are_joined(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"{line} \\ud83d\\ude00 \\udc00"}).replace("\\\\u", "\\u") for line in sentences(300)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    pytest.importorskip("datasets")
    labeled = "\n".join(row[:-1] + f', "label": "{"xy"[number % 2]}"}}' for number, row in enumerate(rows))
    (tmp_path / "train.jsonl").write_text(labeled)
    data = LabeledTexts(LabeledFiles(str(tmp_path / "train.jsonl")), batch_size=4, cache_dir=str(tmp_path / "cache"))
    data.setup("fit")
    assert len(data.train_set) + len(data.val_set) == 300
    with pytest.raises(ConfigError, match="the dataset cannot be opened"):  # the reader of `datasets` refuses them
        list(HubText(str(tmp_path / "text.jsonl")).documents())


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_another_encoding_is_named_with_its_conversion(tmp_path: Path, encoding: str) -> None:
    text = "Où est le café ? Très bien, à côté de l'hôtel. L'été dernier, la forêt brûlait. " * 200
    (tmp_path / "livre.txt").write_bytes(text.encode(encoding))
    with pytest.raises(ConfigError, match=r"is not UTF-8 .*iconv -f \S+ -t UTF-8 livre.txt > converted.txt") as told:
        list(TextFiles(str(tmp_path / "livre.txt")).documents())
    named = str(told.value).split("iconv -f ")[1].split()[0]
    assert (tmp_path / "livre.txt").read_bytes().decode(named).lstrip("\ufeff") == text


def test_a_quote_that_is_not_closed_is_an_error_with_its_line(tmp_path: Path) -> None:
    rows = [f'"some words {number}",x' for number in range(300)]
    rows[19] = '"some words 19,x'
    (tmp_path / "table.csv").write_text("text,label\n" + "\n".join(rows))
    with pytest.raises(ConfigError, match=r"table.csv: the row that begins in line 21 is not CSV"):
        list(read_table(tmp_path / "table.csv", Columns("text", "label")))
    rows[19:] = ['"some words 19,x', *(f"some words {number},x" for number in range(20, 300))]
    (tmp_path / "table.csv").write_text("text,label\n" + "\n".join(rows))
    with pytest.raises(ConfigError, match=r"the row that begins in line 21 is not CSV \(unexpected end of data\)"):
        list(read_table(tmp_path / "table.csv", Columns("text", "label")))


def test_extremely_long_texts_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "table.csv").write_text("text,label\nshort,x\n" + "long " * 30_000 + ",y\n")
    with caplog.at_level(logging.WARNING):
        assert len(list(read_table(tmp_path / "table.csv", Columns("text", "label")))) == 2
    assert "1 texts have over 100000 characters, the first in row 2" in caplog.text
