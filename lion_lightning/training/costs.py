"""Costs of a run beside time: bytes per parameter, and energy where a counter can be read."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

POWERCAP = Path("/sys/class/powercap")
JOULES_PER_KILOJOULE, MICROJOULES_PER_JOULE, MILLIJOULES_PER_JOULE = 1e3, 1e6, 1e3


class Costs(Callback):
    """Logs `perf/bytes_per_parameter` (weights and optimizer state) and, where it can be read, `perf/energy_kj`.

    Energy is what the counters (NVIDIA's NVML, Linux' powercap) show for whole devices since training began, including
    the use by other processes.
    """

    def __init__(self) -> None:
        self._meters: list[Callable[[], float]] = []
        self._joules_at_start = 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._meters = meters(trainer.strategy.root_device)
        self._joules_at_start = self._joules()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 0 or trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        figures = {"perf/bytes_per_parameter": bytes_per_parameter(trainer.optimizers)}
        if self._meters:
            figures["perf/energy_kj"] = (self._joules() - self._joules_at_start) / JOULES_PER_KILOJOULE
        pl_module.log_dict(figures)

    def _joules(self) -> float:
        return sum(meter() for meter in self._meters)


def bytes_per_parameter(optimizers: Sequence[Optimizer]) -> float:
    """Bytes of the weights that `optimizers` hold and of their state, per weight, without gradients."""
    weights = {id(p): p for o in optimizers for group in o.param_groups for p in group["params"]}
    state = [tensor for o in optimizers for tensor in _tensors(o.state)]
    numbers = sum(weight.numel() for weight in weights.values())
    return sum(tensor.nbytes for tensor in [*weights.values(), *state]) / max(1, numbers)


def meters(device: torch.device, powercap: Path = POWERCAP) -> list[Callable[[], float]]:
    """The energy counters that this process may read, as functions that return joules.

    Args:
        device: The device that trains; a CUDA device adds its NVML counter.
        powercap: The folder of Linux' powercap interface.
    """
    return [*_packages(powercap), *(_nvml(device) if device.type == "cuda" else [])]


def _packages(powercap: Path) -> Iterator[Callable[[], float]]:
    for package in sorted(powercap.glob("intel-rapl:?")):
        try:
            yield _Package(package)
        except (OSError, ValueError):  # usually readable by root only
            continue


class _Package:
    """The counter of a processor package, continued when it wraps; it must be read before it wraps twice."""

    def __init__(self, package: Path) -> None:
        self.file = package / "energy_uj"
        self.range = int((package / "max_energy_range_uj").read_text())
        self.last, self.wraps = int(self.file.read_text()), 0

    def __call__(self) -> float:
        now = int(self.file.read_text())
        self.wraps += now < self.last
        self.last = now
        return (now + self.wraps * self.range) / MICROJOULES_PER_JOULE


def _nvml(device: torch.device) -> list[Callable[[], float]]:
    try:
        import pynvml
    except ModuleNotFoundError:
        return []
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:  # GPUs older than Volta have no such counter
        return []
    return [lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / MILLIJOULES_PER_JOULE]


def _tensors(node: Any) -> Iterator[Tensor]:
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, Mapping):
        for value in node.values():
            yield from _tensors(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _tensors(value)
