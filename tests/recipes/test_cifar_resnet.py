"""`model=resnet18_cifar`: the usual size, full resolution in the first stage, an export without code."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageClassification

from lion_lightning.recipes.image_classification.module import forward_flops
from lion_lightning.training.build import instantiate

SMALL = ("model.config.embedding_size=4", "model.config.hidden_sizes=[4,8]", "model.config.depths=[1,1]")


def build(compose: Any, *overrides: str) -> Any:
    cfg = compose("recipe=image_classification", "model=resnet18_cifar", "run_dir=out", *overrides)
    config = instantiate(cfg.model.config)
    config.num_labels, config.image_size = 10, 32
    return AutoModelForImageClassification.from_config(config)


def test_size_and_cost_are_those_of_the_usual_cifar_net(compose: Any) -> None:
    with torch.device("meta"):
        model = build(compose)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    assert forward_flops(model, (3, 32, 32)) == 2 * 555_422_720


def test_the_first_stage_sees_every_pixel(compose: Any) -> None:
    model = build(compose, *SMALL)
    hidden = model(torch.zeros(2, 3, 32, 32), output_hidden_states=True).hidden_states
    assert [tuple(states.shape[1:]) for states in hidden] == [(4, 32, 32), (4, 32, 32), (8, 16, 16)]
    weight = model.resnet.embedder.embedder.convolution.weight
    assert weight.shape == (4, 3, 3, 3)
    assert 0.5 < weight.std() * (4 * 9 / 2) ** 0.5 < 1.5, "initialised like the other convolutions: Kaiming, fan out"


OPEN = """
import torch
from transformers import AutoModelForImageClassification
import lion_lightning.recipes.image_classification.cifar_resnet
model = AutoModelForImageClassification.from_pretrained({export!r}).eval()
torch.save(model(torch.load({pixels!r})).logits.detach(), {logits!r})
"""


@pytest.mark.slow
def test_the_export_has_no_code_and_opens_where_the_module_is_imported(
    compose: Any, root: Path, tmp_path: Path
) -> None:
    model = build(compose, *SMALL).eval()
    pixels = torch.randn(2, 3, 32, 32)
    model.save_pretrained(tmp_path / "export")
    assert not list((tmp_path / "export").rglob("*.py"))
    assert "auto_map" not in (tmp_path / "export/config.json").read_text()
    torch.save(pixels, tmp_path / "pixels.pt")
    places = {name: str(tmp_path / file) for name, file in
              {"export": "export", "pixels": "pixels.pt", "logits": "logits.pt"}.items()}  # fmt: skip
    subprocess.run([sys.executable, "-c", OPEN.format(**places)], cwd=root, check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(pixels).logits)
