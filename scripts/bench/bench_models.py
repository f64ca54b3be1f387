"""Parameter shapes of the models that bench_step.py measures, written down so that nothing is downloaded."""

from collections.abc import Callable

Shape = tuple[int, ...]


def bert(layers: int, width: int, vocabulary: int = 30_522, positions: int = 512) -> list[Shape]:
    """BERT with its pooler (Devlin et al., 2018): base has 109,482,240 parameters, large 335,141,888."""
    linear: list[Shape] = [(width, width), (width,)]
    layer = (
        4 * linear + [(width,)] * 2 + [(4 * width, width), (4 * width,), (width, 4 * width), (width,)] + [(width,)] * 2
    )
    return [(vocabulary, width), (positions, width), (2, width), (width,), (width,), *layers * layer, *linear]


def vit(layers: int, width: int, patch: int = 16, image: int = 224, classes: int = 1000) -> list[Shape]:
    """ViT with a linear head (Dosovitskiy et al., 2020): B/16 at 224 pixels has 86,567,656 parameters."""
    tokens = (image // patch) ** 2 + 1
    attention: list[Shape] = [(3 * width, width), (3 * width,), (width, width), (width,)]
    layer = [(width,)] * 4 + attention + [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    stem: list[Shape] = [(1, 1, width), (1, tokens, width), (width, 3, patch, patch), (width,)]
    return [*stem, *layers * layer, (width,), (width,), (classes, width), (classes,)]


def decoder(layers: int, width: int, vocabulary: int = 50_257, positions: int = 2048) -> list[Shape]:
    """GPT-3 XL's shape with tied embeddings (Brown et al., 2020): 1,315,723,264 parameters at 24 layers of 2,048."""
    attention: list[Shape] = [(3 * width, width), (3 * width,), (width, width), (width,)]
    layer = [(width,)] * 4 + attention + [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(vocabulary, width), (positions, width), *layers * layer, (width,), (width,)]


MODELS: dict[str, Callable[[], list[Shape]]] = {
    "bert_base": lambda: bert(12, 768),
    "bert_large": lambda: bert(24, 1024),
    "vit_b16": lambda: vit(12, 768),
    "decoder_1.3b": lambda: decoder(24, 2048),
    "tiny": lambda: bert(2, 64, vocabulary=500, positions=32),
    "nano": lambda: bert(1, 8, vocabulary=40, positions=8),
}
