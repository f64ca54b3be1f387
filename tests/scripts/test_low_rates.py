"""scripts/low_rates.py: what rounds to nearest stays, what keeps the bits follows fp32; cells are not repeated."""

from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from lion_lightning.training.run import run
from scripts import low_rates
from scripts.low_rates import Cell, Rate, append, interval, main, markdown, read


def test_a_cosine_ends_at_zero_and_a_constant_rate_stays() -> None:
    assert [Rate(2.0, "cosine").at(progress) for progress in (0.0, 0.5, 1.0)] == pytest.approx([2.0, 1.0, 0.0])
    assert Rate(2.0, "constant").at(0.7) == 2.0


def test_the_interval_is_students() -> None:
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.3027 / 3**0.5, rel=1e-4), "t of 2 degrees of freedom, times s / sqrt(3)"
    assert interval([5.0])[1] != interval([5.0])[1], "one value has none"


def test_the_table_compares_with_fp32_of_the_same_seed(tmp_path: Path) -> None:
    file = tmp_path / "cells.csv"
    for seed, norm in ((1, 0.98), (2, 0.96)):
        append(file, Cell("lion fp32", "1e-05 constant", seed, 10, 32, 4.0, 3.0, 1.0, norm))
        append(file, Cell("lion bf16/16", "1e-05 constant", seed, 10, 32, 4.0, 3.5, 1.0, 1 - (1 - norm) / 2))
    cells = read(file)
    assert len(cells) == 4
    assert "| lion bf16/16 | 0.5000 ± 0.0000 | 50% |" in markdown(cells)


def test_a_table_without_the_control_has_no_share_of_it(tmp_path: Path) -> None:
    cells = [Cell("lion bf16/16", "1e-05 constant", seed, 10, 32, 4.0, 3.5, 1.0, 0.9) for seed in (1, 2)]
    assert "| lion bf16/16 | 0.5000 ± 0.0000 | - |" in markdown(cells)
    low_rates.draw(cells, tmp_path / "a.png")


@pytest.fixture
def trained(compose, tmp_path: Path) -> Path:
    cfg: DictConfig = compose(
        "recipe=bert_mlm", "logger=none", "export=false", "trainer.max_steps=3", "trainer.val_check_interval=3",
        "data.batch_size=16", f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    run(cfg)
    return tmp_path / "run"


@pytest.mark.slow
def test_only_weights_that_keep_their_bits_move_at_a_low_rate(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rounding to nearest is a cast of each new weight to bf16, an optimizer of this test."""

    class Nearest(torch.optim.SGD):
        def step(self, closure=None):  # type: ignore[no-untyped-def]
            for group in self.param_groups:
                for weight in group["params"]:
                    weight.data.copy_((weight.data.float() - group["lr"] * weight.grad.float().sign()).bfloat16())

    known = low_rates.variants()
    chosen = {name: known[name] for name in ("lion fp32", "lion bf16/32")}
    chosen["nearest"] = (torch.bfloat16, lambda groups, lr: Nearest(groups, lr))
    monkeypatch.setattr(low_rates, "variants", lambda: chosen)
    monkeypatch.setattr(low_rates, "RATES", (Rate(1e-6, "constant"),))
    arguments = [str(trained), "--steps", "4", "--batch-size", "8", "--seeds", "1", "--output", str(tmp_path / "low")]
    assert main(arguments) == 0
    travelled = {cell.variant: cell.travelled for cell in read(tmp_path / "low.csv")}
    assert travelled["lion bf16/32"] > 0
    assert travelled["nearest"] < 0.5 * travelled["lion fp32"]
    assert (tmp_path / "low.png").stat().st_size > 1000

    monkeypatch.setattr(low_rates, "train", lambda *_: pytest.fail("a cell was trained again"))
    assert main(arguments) == 0
    (tmp_path / "low.csv").write_text(
        (tmp_path / "low.csv").read_text().replace(f",4,{read(tmp_path / 'low.csv')[0].start}", ",4,1.5")
    )
    capsys.readouterr()
    assert main(arguments) == 2
    assert "began from val/loss 1.5000" in capsys.readouterr().err, "cells of another first run were continued"
