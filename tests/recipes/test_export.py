"""An export gives the predictions of validation: preprocessing, weights, tokenizer and class names."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, PretrainedConfig, TimmWrapperConfig, pipeline

from lion_lightning.recipes.image_classification.airbench import AirbenchConfig
from lion_lightning.recipes.image_classification.cifar_resnet import CifarResNetConfig
from lion_lightning.recipes.image_classification.data import ImageArrays
from lion_lightning.recipes.image_classification.images import square
from lion_lightning.recipes.image_classification.module import ImageClassifier
from lion_lightning.recipes.image_classification.sources import ImageFiles
from tests.recipes.small_images import build, resnet, vit

SIZES = [(9, 31), (64, 17), (33, 33), (8, 8), (100, 23), (7, 120), (5, 5), (200, 199)]
MODES = ["RGB", "L", "RGBA", "P", "CMYK", "LA", "1"]
ENDINGS = {"CMYK": "tif"}


def write_noise(root: Path) -> list[Path]:
    """Pictures of every size in every mode, in two classes; fixed noise with large features."""
    draw = np.random.default_rng(0)
    files = []
    for number, (size, mode) in enumerate((size, mode) for size in SIZES for mode in MODES):
        folder = root / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(draw.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        files.append(folder / f"{number:03}.{ENDINGS.get(mode, 'png')}")
        coarse.resize(size, Image.Resampling.BILINEAR).convert(mode).save(files[-1])
    return files


def small_vit() -> PretrainedConfig:
    return vit(patch_size=4)


def timm() -> PretrainedConfig:
    if missing := [name for name in ("timm", "torchvision") if find_spec(name) is None]:
        pytest.skip(f"the optional model=timm needs {' and '.join(missing)}")
    return TimmWrapperConfig(architecture="resnet10t")


def cifar_resnet() -> PretrainedConfig:
    return CifarResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")


def airbench() -> PretrainedConfig:
    return AirbenchConfig(widths=[24, 24, 24])


def said(module: ImageClassifier, pixels: np.ndarray) -> list[float]:
    """The share of each class, as validation computes it."""
    with torch.no_grad():
        return module(torch.from_numpy(pixels)[None]).softmax(-1)[0].tolist()


@pytest.mark.parametrize("share", [1.0, 0.875])
@pytest.mark.parametrize(
    ("make", "side"), [(small_vit, 16), (resnet, 16), (timm, 16), (cifar_resnet, 16), (airbench, 28)]
)
def test_the_pipeline_says_of_any_picture_what_validation_says(
    tmp_path: Path, make: Callable[[], PretrainedConfig], side: int, share: float
) -> None:
    config = make()
    files = write_noise(tmp_path / "pictures")
    source = ImageFiles(str(tmp_path / "pictures"), image_size=side, val_share=share, max_broken=0)
    on_access = {} if share == 1.0 else {"decoded_gib": 0.0}  # only then does validation see a part of the shorter side
    data = ImageArrays(source, batch_size=4, cache_dir=str(tmp_path / "cache"), **on_access)
    data.setup("fit")
    module = build(config, data)
    module.export(tmp_path / "export", "card")
    exact = AutoImageProcessor.from_pretrained(tmp_path / "export", backend="pil")
    classify = pipeline("image-classification", str(tmp_path / "export"), image_processor=exact, device="cpu")
    by_default = pipeline("image-classification", str(tmp_path / "export"), device="cpu")
    # torchvision, if it is installed, resizes a little otherwise; without it the default is the exact one.
    tolerance, compared = (1e-3, files) if find_spec("torchvision") else (1e-5, files[:1])
    # Pictures are prepared alike for every net of a size; every fifth is of each size and mode.
    for file in files if make in (small_vit, airbench) else files[::5]:
        expected = said(module, square({"bytes": None, "path": str(file)}, side, share))
        found = {answer["label"]: answer["score"] for answer in classify(str(file))}
        assert [found[name] for name in data.classes] == pytest.approx(expected, abs=1e-5), file.name
        if file in compared:
            found = {answer["label"]: answer["score"] for answer in by_default(str(file))}
            assert [found[name] for name in data.classes] == pytest.approx(expected, abs=tolerance), file.name


def test_the_text_pipeline_says_what_validation_says(tmp_path: Path) -> None:
    from functools import partial

    from transformers import BertConfig

    from lion_lightning.hyperparams import cosine
    from lion_lightning.optim import Lion
    from lion_lightning.recipes.text_classification.data import LabeledTexts
    from lion_lightning.recipes.text_classification.module import TextClassifier
    from lion_lightning.recipes.text_classification.sources import LabeledFiles

    words = ["apple", "river", "stone", "[MASK]", "[SEP]", "Éclair", "don't", "42"]
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(words, size=1 + number % 40)) + f" {number}" for number in range(80)]
    rows = "".join(f'"{text}",{("low", "high", "mid")[n % 3]}\n' for n, text in enumerate(texts))
    (tmp_path / "table.csv").write_text("text,label\n" + rows, encoding="utf-8")
    source = LabeledFiles(str(tmp_path / "table.csv"), str(tmp_path / "table.csv"))
    data = LabeledTexts(source, batch_size=8, sequence_length=16, vocab_size=300, cache_dir=str(tmp_path / "cache"))
    data.setup("fit")
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64)
    module = TextClassifier(config, data, partial(Lion, lr=1e-3), cosine).eval()
    module.export(tmp_path / "export", "card")
    classify: Any = pipeline("text-classification", str(tmp_path / "export"), top_k=None, device="cpu")
    validation: Any = data.val_set
    assert len(validation) == 80
    for index in range(80):
        with torch.no_grad():
            expected = module(validation.__getitems__([(index, index)])).softmax(-1)[0].tolist()
        found = {answer["label"]: answer["score"] for answer in classify([texts[index]], truncation=True)[0]}
        assert [found[name] for name in data.classes] == pytest.approx(expected, abs=1e-5), texts[index]
