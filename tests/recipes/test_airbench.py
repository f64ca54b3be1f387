"""`model=airbench`: size and cost of the published net, whitened inputs, an identity at the start, an exact export."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageClassification

from lion_lightning.errors import ConfigError
from lion_lightning.recipes.image_classification.airbench import AirbenchConfig, AirbenchForImageClassification
from lion_lightning.recipes.image_classification.data import ImageArrays
from lion_lightning.recipes.image_classification.module import forward_flops
from lion_lightning.recipes.image_classification.sources import ImageFiles
from lion_lightning.training.build import build_data, build_module


def small() -> Any:
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_config(AirbenchConfig(widths=[24, 32, 32], num_labels=10))


def test_size_and_cost_are_those_of_the_published_net() -> None:
    with torch.device("meta"):
        model = AirbenchForImageClassification(AirbenchConfig(num_labels=10))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # Convolutions, biases of the six batch norms and of the whitening, the linear layer.
    assert trained == 9 * (24 * 64 + 64**2 + 64 * 256 + 3 * 256**2) + 2 * (64 + 256 + 256) + 24 + 2560
    operations = 3 * 10 * 50_000 * forward_flops(model, (3, 32, 32))  # ten epochs, backward twice the forward
    assert operations == pytest.approx(3.6e14, rel=0.03), "the paper's figure for 94 %"


def test_the_first_layer_whitens_patches_of_the_images() -> None:
    model, generator = small(), torch.Generator().manual_seed(1)
    smooth = nn.functional.avg_pool2d(torch.randn(40, 3, 36, 36, generator=generator), 5, 1)
    mixed = torch.einsum("oc,bchw->bohw", torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5], [0.5, 0.0, 1.0]]), smooth)
    images = 30 * mixed
    model.fit_inputs(images.split(7))
    answers = model.whitening(images).detach().double().transpose(0, 1).flatten(1)
    assert torch.equal(answers[:12], -answers[12:])
    second_moment = torch.cov(answers[:12], correction=0)
    assert torch.allclose(second_moment, torch.eye(12, dtype=torch.double), atol=5e-3)
    assert torch.cov(nn.functional.unfold(images, 2).transpose(0, 1).flatten(1)).diagonal().min() > 5, "was not white"


def test_convolutions_begin_as_the_identity_and_the_whitening_is_not_trained() -> None:
    model = small()
    images = torch.randn(2, 24, 8, 8)
    for convolution in (model.groups[0].conv1, model.groups[0].conv2):
        assert torch.allclose(convolution(images)[:, :24], images, atol=1e-6)
    model(torch.randn(4, 3, 32, 32), labels=torch.arange(4)).loss.backward()
    still = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    norms = {f"groups.{group}.{norm}.weight" for group in range(3) for norm in ("norm1", "norm2")}
    assert still == norms | {"whitening.weight"}


def test_an_export_is_exact_and_has_no_code(tmp_path: Path) -> None:
    model = small()
    images = torch.randn(16, 3, 32, 32)
    model.fit_inputs([images])
    model.train()(images)  # moves the averages of the batch norms
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert not list(tmp_path.rglob("*.py"))
    assert torch.equal(again(images).logits, model(images).logits)


@pytest.mark.parametrize("decoded_gib", [16.0, 0.0])
def test_the_first_layer_sees_readable_images_of_all_classes(decoded_gib: float, tmp_path: Path) -> None:
    """Of a folder the images are in the order of their classes, and more of them than are looked at."""
    for number in range(60):
        file = tmp_path / "pictures" / ("bright", "dark")[number // 30] / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (200 - number, 0, 0)).save(file)
    (tmp_path / "pictures" / "dark" / "broken.png").write_bytes(b"no picture")
    source = ImageFiles(str(tmp_path / "pictures"), image_size=16)
    data = ImageArrays(source, batch_size=4, cache_dir=str(tmp_path / "cache"), decoded_gib=decoded_gib)
    data.setup("fit")
    for count in (6, 1000):
        pixels = np.concatenate(list(data.sample_pixels(count)))
        assert pixels.dtype == np.uint8
        assert pixels.shape[1:] == (3, 16, 16)
        red = pixels[:, 0, 0, 0]
        assert red.min() <= 170, "none of the second class"
        assert red.max() > 190, "none of the first class"
        assert pixels[:, 1:].max() == 0, "a picture that cannot be read was taken as pixels"
    assert len(pixels) == len(np.unique(red)), "an image was taken twice"


def test_a_step_in_bf16_gets_pixels_in_bf16(compose: Any) -> None:
    small = ["model.config.hidden_sizes=[4,8,8,8]", "model.config.embedding_size=4"]
    cfg = compose("recipe=image_classification", "model=resnet18_cifar", *small, "run_dir=out")
    module = build_module(cfg, build_data(cfg)).bfloat16()
    assert module(torch.zeros(2, *module.data.image_shape, dtype=torch.uint8)).dtype == torch.bfloat16


def test_images_of_eight_pixels_are_refused_in_one_line(compose: Any) -> None:
    cfg = compose("recipe=image_classification", "model=airbench", "run_dir=out")
    with pytest.raises(ConfigError, match="model=airbench needs images of at least 9 pixels, the data has 8"):
        build_module(cfg, build_data(cfg))
