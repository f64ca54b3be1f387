"""Cosines between AdamW's updates and sign updates, held to numbers worked out another way."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from scripts import sign_cosine
from scripts.sign_cosine import SignCosines

STEPS = 6


class Line(pl.LightningModule):
    """Gradients that are known: the loss is linear in the weights, its slope the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(50, dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self.weight * batch[0][0]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.0)


@pytest.fixture(scope="module")
def slopes() -> torch.Tensor:
    return torch.randn(STEPS, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def rows(slopes: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    cosines = SignCosines()
    trainer = pl.Trainer(
        max_steps=STEPS, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, callbacks=[cosines], default_root_dir=tmp_path_factory.mktemp("run"),
    )  # fmt: skip
    trainer.fit(Line(), DataLoader(TensorDataset(slopes), batch_size=1))
    return cosines.rows


def expected(slopes: torch.Tensor) -> list[dict[str, float]]:
    """Adam and Lion by their formulas."""
    m, v, lion_m = (torch.zeros(50, dtype=torch.float64) for _ in range(3))
    found = []
    for step, g in enumerate(slopes, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        update = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        lion = torch.sign(0.9 * lion_m + 0.1 * g)
        lion_m = 0.99 * lion_m + 0.01 * g
        others = {"gradient": g.sign(), "itself": update.sign(), "lion": lion}
        found.append({name: float(update @ one / update.norm() / one.norm()) for name, one in others.items()})
    return found


def test_the_cosines_are_those_of_the_formulas(rows: list[dict[str, float]], slopes: torch.Tensor) -> None:
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row, oracle in zip(rows, expected(slopes), strict=True):
        assert {name: row[name] for name in oracle} == pytest.approx(oracle, abs=1e-6)


def test_adams_first_step_is_the_sign_of_the_gradient(rows: list[dict[str, float]]) -> None:
    assert rows[0]["gradient"] == rows[0]["itself"] == rows[0]["lion"] == pytest.approx(1.0, abs=1e-9)
    assert rows[1]["gradient"] < 0.95


def test_a_real_recipe_is_measured_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "cosine"
    arguments = ["recipe=image_classification", "data.limit_train_samples=128", "--steps", "3", "--output", str(output)]
    assert sign_cosine.main(arguments) == 0
    lines = output.with_suffix(".csv").read_text().splitlines()
    assert lines[0] == "step,gradient,itself,lion"
    assert len(lines) == 4
    assert float(lines[1].split(",")[1]) > 0.99
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "the sign of the gradient" in capsys.readouterr().out
