"""Models by name have their published sizes and costs; those that cannot be built say why."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForImageClassification, TimmWrapperConfig, ViTConfig

import lion_lightning.recipes.image_classification.module as module
from lion_lightning.errors import ConfigError
from lion_lightning.recipes.image_classification.module import build_model, forward_flops
from lion_lightning.recipes.image_classification.sources import Digits
from lion_lightning.training.build import instantiate
from tests.recipes.small_images import build, prepared

# Millions of parameters with 1,000 classes at 224 x 224, and billions of multiplications and additions of one image:
# Dosovitskiy et al., 2021; Touvron et al., 2021 (DeiT-S, 22 M and 4.6 G); torchvision's tables for the ResNets.
PUBLISHED = {"vit_b16": (86.57, 17.6), "vit_s16": (22.05, 4.6), "resnet50": (25.56, 4.09), "resnet18": (11.69, 1.81)}


def hollow(name: str, compose: Any) -> Any:
    config = instantiate(compose("recipe=image_classification", f"model={name}", "run_dir=out").model.config)
    config.image_size, config.num_labels = 224, 1000
    with torch.device("meta"):
        return AutoModelForImageClassification.from_config(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_and_costs_are_as_published(name: str, compose: Any) -> None:
    model = hollow(name, compose)
    millions, billions = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
    assert forward_flops(model, (3, 224, 224)) / 2e9 == pytest.approx(billions, rel=0.015)


def test_the_cost_of_a_transformer_is_that_of_its_matrix_products() -> None:
    layers, width, inner, patches, classes = 3, 32, 64, 16, 10
    config = ViTConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=2, intermediate_size=inner, patch_size=2,
        image_size=8, num_labels=classes,
    )  # fmt: skip
    tokens = patches + 1
    layer = tokens * (4 * width**2 + 2 * width * inner) + 2 * tokens**2 * width
    expected = 2 * (layers * layer + patches * width * 3 * 2**2 + width * classes)
    model = AutoModelForImageClassification.from_config(config)
    before = torch.random.get_rng_state()
    assert forward_flops(model, (3, 8, 8)) == expected
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_cost_is_counted_once(compose: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = prepared(Digits())
    module = build(instantiate(compose("recipe=image_classification", "run_dir=out").model.config), data)
    first = module.flops_per_sample()
    assert first == 3 * forward_flops(module.model, (3, 8, 8))
    monkeypatch.setattr("lion_lightning.recipes.image_classification.module.forward_flops", None)
    assert module.flops_per_sample() == first


def test_timm_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    data = prepared(Digits())
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"model=timm needs timm and torchvision: pip install 'lion-lightning\[timm\]'"
    ):
        build_model(TimmWrapperConfig(architecture="resnet18"), data)


def test_what_timm_says_of_a_name_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: Any) -> None:
        raise ImportError("The model architecture 'nope' is not supported\nin this version")

    data = prepared(Digits())
    monkeypatch.setattr(module, "find_spec", lambda name: True)
    monkeypatch.setattr(AutoModelForImageClassification, "from_config", refuse)
    with pytest.raises(ConfigError, match=r"model.architecture=nope: The model architecture 'nope' is not supported$"):
        build_model(TimmWrapperConfig(architecture="nope"), data)


@pytest.mark.parametrize(("recipe", "batch", "lion", "adamw"), [("imagenet", 4096, (1e-4, 10.0), (1e-3, 1.0))])
def test_the_presets_are_the_papers(
    compose: Any, recipe: str, batch: int, lion: tuple[float, float], adamw: tuple[float, float]
) -> None:
    for optim, (lr, decay) in (("lion", lion), ("adamw", adamw)):
        cfg = compose(f"recipe={recipe}", f"optim={optim}", "run_dir=out")
        assert (cfg.optim.lr, cfg.optim.weight_decay) == (lr, decay)
        assert cfg.data.batch_size * cfg.trainer.accumulate_grad_batches == batch
        assert (cfg.trainer.max_epochs, cfg.guard.warmup_steps, cfg.schedule.name) == (300, 10_000, "cosine")
        module = cfg.recipe.module
        assert (module.randaugment_layers, module.randaugment_magnitude, module.mixup) == (2, 15, 0.5)
        assert (cfg.model.name, cfg.data.name, cfg.data.image_size) == ("vit_b16", "imagenet", 224)
