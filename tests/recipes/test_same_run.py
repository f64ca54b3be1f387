"""The first start, which prepares the data, and later ones, which find it in the cache, are the same run."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lion_lightning.data.stream import StreamDataModule
from lion_lightning.recipes.bert_mlm.data import TextBlocks
from lion_lightning.recipes.image_classification.data import ImageArrays
from lion_lightning.recipes.image_classification.images import ImageSplits
from lion_lightning.recipes.image_classification.sources import ImageFiles
from lion_lightning.recipes.text_classification.data import LabeledTexts
from lion_lightning.recipes.text_classification.labels import TextSplits
from lion_lightning.recipes.text_classification.sources import LabeledFiles
from tests.recipes.listed import Listed
from tests.recipes.small_images import Noise
from tests.recipes.written_images import write_folder


def draw() -> tuple[float, ...]:
    """A number from each global generator."""
    return random.random(), float(np.random.rand()), float(torch.rand(()))


class DrawingCorpus(Listed):
    def documents(self) -> Iterator[str]:
        draw()
        return super().documents()


class DrawingImages(Noise):
    def open(self) -> ImageSplits:
        draw()
        return super().open()


class DrawingTable(LabeledFiles):
    def load(self) -> TextSplits:
        draw()
        return super().load()


def text_blocks(folder: Path, documents: list[str]) -> StreamDataModule:
    corpus = DrawingCorpus(documents)
    cache = str(folder / "cache")
    return TextBlocks(corpus, batch_size=4, sequence_length=16, vocab_size=400, val_fraction=0.3, cache_dir=cache)


def drawn_images(folder: Path, documents: list[str]) -> StreamDataModule:
    return ImageArrays(DrawingImages(), batch_size=4, cache_dir=str(folder / "cache"))


def decoded_images(folder: Path, documents: list[str]) -> StreamDataModule:
    """Nothing of its own draws here, but a DataLoader does when it begins."""
    source = ImageFiles(str(write_folder(folder / "images", {"cat": 8, "dog": 8})), image_size=8)
    return ImageArrays(source, batch_size=4, cache_dir=str(folder / "cache"))


def labeled_texts(folder: Path, documents: list[str]) -> StreamDataModule:
    rows = "".join(f'"{" ".join(text.split()[:9])} {n}",{n % 2}\n' for n, text in enumerate(documents))
    table = folder / "table.csv"
    table.write_text("text,label\n" + rows.replace('""', '"'), encoding="utf-8")
    return LabeledTexts(DrawingTable(str(table)), batch_size=4, vocab_size=300, cache_dir=str(folder / "cache"))


@pytest.mark.parametrize("make", [text_blocks, drawn_images, decoded_images, labeled_texts])
def test_preparing_data_draws_no_number_of_the_run(
    make: Callable[[Path, list[str]], StreamDataModule], tmp_path: Path
) -> None:
    documents = [f"sentence {number} of a small text with a few words in it" for number in range(100)]
    found: list[Any] = []
    for _ in range(2):
        data = make(tmp_path, documents)
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        data.prepare_data()
        data.setup("fit")
        found.append(draw())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert found == [draw()] * 2


def test_the_second_run_has_the_losses_of_the_first(compose: Any, tmp_path: Path) -> None:
    from lion_lightning.training.run import run

    write_folder(tmp_path / "images", {"cat": 24, "dog": 24})
    settings = [
        "recipe=image_classification", "data=image_files", f"data.path={tmp_path / 'images'}", "data.image_size=8",
        f"data.cache_dir={tmp_path / 'cache'}", "data.batch_size=8", "trainer.max_steps=3", "logger=none",
        "export=false", "model.config.hidden_dropout_prob=0.5", "model.config.num_hidden_layers=1",
    ]  # fmt: skip
    ends = []
    for name in ("first", "second"):
        run(compose(*settings, f"run_dir={tmp_path / name}"))
        state = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        ends.append(state)
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0)
