"""What the tests of the text recipes share: a little text, whole, packed, in files and as a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

if TYPE_CHECKING:
    from lion_lightning.recipes.bert_mlm.data import TextBlocks


@pytest.fixture(scope="session")
def blocks(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> TextBlocks:
    """200,000 characters of English in blocks of 32 tokens, 512 WordPieces."""
    from small_bert import LENGTH  # not before the environment is set: see pytest_configure

    from lion_lightning.recipes.bert_mlm.data import TextBlocks
    from lion_lightning.recipes.text.corpus import TextFiles

    cut = tmp_path_factory.mktemp("text") / "short.txt"
    cut.write_text(prose.read_text(encoding="utf-8")[:200_000], encoding="utf-8")
    cache = str(tmp_path_factory.mktemp("cache"))
    made = TextBlocks(
        TextFiles(str(cut)), batch_size=8, sequence_length=LENGTH, vocab_size=512, val_fraction=0.3, cache_dir=cache
    )
    made.setup("fit")
    return made


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """TextChunks of 3 KB, so that a little text has many."""
    import lion_lightning.recipes.text.text_chunks as chunks_module
    from lion_lightning.recipes.text.text_chunks import FileChunks

    monkeypatch.setattr(chunks_module, "CHUNK_BYTES", 3000)
    monkeypatch.setattr(chunks_module, "CUT_WITHIN_BYTES", 1000)
    monkeypatch.setattr(FileChunks, "chunks_per_pool", 2)
    monkeypatch.setattr(FileChunks, "chunks_in_sample", 8)


@pytest.fixture(scope="session")
def library(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of 30 KB in all."""
    text = prose.read_text(encoding="utf-8").encode("ascii", "replace").decode()
    folder = tmp_path_factory.mktemp("library")
    for number, (first, last) in enumerate(((0, 20_000), (50_000, 50_500), (60_000, 69_500))):
        (folder / f"{number}.txt").write_text(text[first:last], encoding="utf-8")
    return folder


@pytest.fixture
def hub_folder(tmp_path: Path, prose: Path) -> Path:
    """A dataset in the hub's format: parquet files with row groups of ten documents."""
    paragraphs = list(dict.fromkeys(p for p in prose.read_text(encoding="utf-8").split("\n\n") if len(p) > 100))
    (tmp_path / "data").mkdir()
    for number in range(2):
        table = pa.table({"text": paragraphs[60 * number : 60 * number + 60], "likes": list(range(60))})
        pq.write_table(table, tmp_path / "data" / f"train-0000{number}-of-00002.parquet", row_group_size=10)
    return tmp_path


@pytest.fixture(scope="session")
def documents(prose: Path) -> list[str]:
    """Two hundred short documents of real English."""
    paragraphs = [paragraph.strip() for paragraph in prose.read_text(encoding="utf-8").split("\n\n")]
    long = list(dict.fromkeys(paragraph for paragraph in paragraphs if len(paragraph) > 200))
    return long[:200]
