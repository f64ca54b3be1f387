"""Bytes counted by hand, and counters of energy that are files."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lion_lightning import Lion
from lion_lightning.training import costs

CPU = torch.device("cpu")


def stepped(optimizer_of, dtype=torch.float32):
    weight = nn.Parameter(torch.ones(512, 512, dtype=dtype))
    optimizer = optimizer_of([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("optimizer_of", "dtype", "expected"),
    [
        (Lion, torch.float32, 8),
        (Lion, torch.bfloat16, 6),
        (lambda p: Lion(p, weight_bits=16, momentum_dtype=torch.int8), torch.bfloat16, 3),
        (torch.optim.AdamW, torch.float32, 12),
        (torch.optim.SGD, torch.float32, 4),
    ],
)
def test_bytes_kept_are_those_of_the_design(optimizer_of, dtype, expected):
    assert costs.bytes_per_parameter([stepped(optimizer_of, dtype)]) == pytest.approx(expected, abs=0.03)


def package(folder: Path, microjoules: int, limit: int = 1000_000) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{limit}\n")
    return folder


def test_energy_is_summed_over_packages_and_goes_on_when_a_counter_wraps(tmp_path):
    first, second = (package(tmp_path / f"intel-rapl:{i}", 900_000) for i in (0, 1))
    package(tmp_path / "intel-rapl:0:0", 5)  # a part of the first package
    found = costs.meters(CPU, tmp_path)
    assert [meter() for meter in found] == [0.9, 0.9]
    package(first, 100_000)
    package(second, 950_000)
    assert [meter() for meter in found] == [pytest.approx(1.1), pytest.approx(0.95)]


def test_a_counter_that_may_not_be_read_is_no_counter(tmp_path):
    (tmp_path / "intel-rapl:0").mkdir()
    assert costs.meters(CPU, tmp_path) == []
    assert costs.meters(CPU, tmp_path / "nowhere") == []


def test_nvidias_counter_is_in_millijoules(monkeypatch, tmp_path):
    fake = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: {"GPU-abc": 2500}[handle],
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    (meter,) = costs.meters(torch.device("cuda"), tmp_path)
    assert meter() == 2.5


class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return Lion(self.parameters(), lr=1e-3)


def test_a_run_logs_what_it_costs(monkeypatch, tmp_path):
    readings = iter(range(1000, 9000, 500))
    monkeypatch.setattr(costs, "meters", lambda device: [lambda: float(next(readings))])
    trainer = Trainer(
        max_steps=4, log_every_n_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[costs.Costs()], default_root_dir=tmp_path, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(Line(), DataLoader(TensorDataset(torch.ones(32, 4)), batch_size=4))
    assert float(trainer.callback_metrics["perf/bytes_per_parameter"]) == 8.0
    assert float(trainer.callback_metrics["perf/energy_kj"]) == 1.0, "two readings after the first, 500 J apart"
