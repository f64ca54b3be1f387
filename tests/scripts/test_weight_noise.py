"""Noise on weights: as much as asked for, the same for everybody, gone afterwards; sharp and flat are told apart."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lion_lightning.training.run import run
from scripts import weight_noise
from scripts.weight_noise import labels_of, noisy, rises


def test_noise_is_a_share_of_each_matrix_and_is_taken_back() -> None:
    model = nn.Sequential(nn.Linear(300, 200), nn.LayerNorm(200), nn.Linear(200, 100))
    with torch.no_grad():
        model[2].weight.mul_(50)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with noisy(model, 0.1, seed=1):
        for name, weight in model.named_parameters():
            moved = (weight.detach() - before[name]).square().mean().sqrt()
            expected = 0.1 * before[name].square().mean().sqrt() if weight.ndim > 1 else torch.tensor(0.0)
            assert float(moved) == pytest.approx(float(expected), rel=0.02, abs=1e-12), name
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])


def test_it_is_taken_back_after_an_error() -> None:
    model = nn.Linear(4, 4)
    before = model.weight.detach().clone()
    with pytest.raises(ZeroDivisionError), noisy(model, 1.0, seed=1):
        raise ZeroDivisionError
    assert torch.equal(model.weight, before)


def test_the_same_seed_draws_the_same_noise_for_every_model() -> None:
    def drawn(seed: int) -> torch.Tensor:
        model = nn.Linear(8, 8, bias=False)
        with torch.no_grad():
            model.weight.fill_(1.0)
        with noisy(model, 0.5, seed):
            return model.weight.detach().clone()

    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))


def test_the_sharper_minimum_rises_more() -> None:
    """On curvature * (w - 1)^2 with noise of a tenth the loss rises by curvature / 100 on average."""

    def rise(curvature: float) -> float:
        model = nn.Linear(100, 100, bias=False)
        with torch.no_grad():
            model.weight.fill_(1.0)

        def loss(share: float, seed: int) -> float:
            with noisy(model, share, seed):
                return float(curvature * (model.weight.detach() - 1).square().mean())

        return rises({share: [loss(share, seed) for seed in range(5)] for share in (0.0, 0.1)})[0.1]

    assert rise(1.0) == pytest.approx(0.01, rel=0.05)
    assert rise(30.0) == pytest.approx(0.3, rel=0.05)


def test_real_runs_are_measured_and_drawn(compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ("trainer.max_steps=2", "trainer.val_check_interval=2", "logger=none", "export=false")
    folders = [tmp_path / "runs" / name for name in ("0-lion-s1", "1-adamw-s1")]
    for optim, folder in zip(("lion", "adamw"), folders, strict=True):
        run(compose("recipe=image_classification", f"optim={optim}", f"run_dir={folder}", *short))
    assert list(labels_of(folders).values()) == ["lion", "adamw"]
    output = tmp_path / "noise"
    arguments = [str(tmp_path / "runs"), "--shares", "0.5", "--draws", "1", "--output", str(output)]
    assert weight_noise.main(arguments) == 0
    rows = output.with_suffix(".csv").read_text().splitlines()[1:]
    assert [row.split(",")[:3] for row in rows] == [
        [optim, "0", share] for optim in ("lion", "adamw") for share in ("0.0", "0.5")
    ]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert weight_noise.main([str(tmp_path / "nothing")]) == 2
    assert "no run with a best checkpoint" in capsys.readouterr().err
