"""A corpus of documents that a test lists, and settings that suit a few of them."""

from collections.abc import Iterator

from lion_lightning.recipes.text.blocks import BlockSettings
from lion_lightning.recipes.text.corpus import Corpus, is_held_out

SETTINGS = BlockSettings(sequence_length=16, vocab_size=400, val_fraction=0.2, lowercase=True)


class Listed(Corpus):
    """A corpus of given documents, which counts how often it is read."""

    def __init__(self, documents: list[str], label: str = "listed") -> None:
        self.texts, self.label, self.reads = documents, label, 0

    def fingerprint(self) -> str:
        return self.label

    def documents(self) -> Iterator[str]:
        self.reads += 1
        yield from self.texts


def split(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """Those to train on and those held out, by the definition."""
    unique = list(dict.fromkeys(documents))
    return [t for t in unique if not is_held_out(t, fraction)], [t for t in unique if is_held_out(t, fraction)]
