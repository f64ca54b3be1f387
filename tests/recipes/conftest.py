"""What the tests of the text recipes share: a little packed text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from recipes.bert_mlm.data import TextBlocks


@pytest.fixture(scope="session")
def blocks(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> TextBlocks:
    """200,000 characters of English in blocks of 32 tokens, 512 WordPieces."""
    from small_bert import LENGTH  # not before the environment is set: see pytest_configure

    from recipes.bert_mlm.corpus import TextFiles
    from recipes.bert_mlm.data import TextBlocks

    cut = tmp_path_factory.mktemp("text") / "short.txt"
    cut.write_text(prose.read_text(encoding="utf-8")[:200_000], encoding="utf-8")
    cache = str(tmp_path_factory.mktemp("cache"))
    made = TextBlocks(
        TextFiles(str(cut)), batch_size=8, sequence_length=LENGTH, vocab_size=512, val_fraction=0.3, cache_dir=cache
    )
    made.setup("fit")
    return made
