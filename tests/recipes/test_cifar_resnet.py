"""`model=resnet18_cifar`: the size of the usual CIFAR net, full resolution in the first stage, an export that opens."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageClassification

from lion_lightning.training.build import instantiate
from recipes.image_classification.module import forward_flops

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
import sys, torch
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained("export", trust_remote_code=True).eval()
assert not [name for name in sys.modules if name.startswith("recipes")]
torch.save(model(torch.load("pixels.pt")).logits.detach(), "logits.pt")
"""


def test_the_export_opens_without_this_project(compose: Any, tmp_path: Path) -> None:
    model = build(compose, *SMALL).eval()
    pixels = torch.randn(2, 3, 32, 32)
    model.save_pretrained(tmp_path / "export")
    torch.save(pixels, tmp_path / "pixels.pt")
    # Another process: where this project is imported, transformers prefers the registered class to the exported one.
    subprocess.run([sys.executable, "-c", OPEN], cwd=tmp_path, check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(pixels).logits)
