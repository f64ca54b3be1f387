"""The triton engine: all tensors of a dtype combination in one launch, on CUDA and ROCm devices.

A table of addresses and settings tells each program of the kernel what to update. It is kept on the device and copied
there again only when it changes. No step waits for the device, and a step can be captured in a CUDA graph after one
that was not. What is then read anew by each replay is what the settings hold as tensors on the device: lr, the step
number, grad_scale, found_inf.
"""

import importlib.util
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lion_lightning.optim.kernels import tables
from lion_lightning.optim.kernels.rule import TensorUpdate

NUMBER_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PARAM_DTYPES = (torch.bfloat16, torch.float32, torch.float64)
ALIGNMENT_BYTES = 16
WARPS = 4
MINIMUM_CUDA_CAPABILITY = (7, 0)

logger = logging.getLogger(__name__)


class Combination(NamedTuple):
    """What is compiled into a kernel: tensors that agree in it share a launch."""

    param: torch.dtype
    grad: torch.dtype
    exp_avg: torch.dtype
    weight_bits: int
    cautious: bool
    statistics: bool
    aligned: bool

    @classmethod
    def of(cls, update: TensorUpdate) -> "Combination":
        """The combination that an update belongs to."""
        arrays = update.param, update.grad, update.exp_avg, update.weight_remainder
        return cls(
            update.param.dtype,
            update.grad.dtype,
            update.exp_avg.dtype,
            update.settings.weight_bits if update.param.dtype == torch.bfloat16 else 32,
            update.settings.cautious,
            update.statistics is not None,
            not any(tables.address(array) % ALIGNMENT_BYTES for array in arrays),
        )

    @property
    def arithmetic(self) -> torch.dtype:
        """float64 for float64 parameters, else float32."""
        return torch.float64 if self.param == torch.float64 else torch.float32


class TritonEngine:
    """Runs kernels.py. With TRITON_INTERPRET=1 in the environment it runs them on a CPU instead, for tests."""

    name = "triton"

    def __init__(self) -> None:
        self._tables = tables.DeviceTables()
        self._objections: dict[torch.device, str | None] = {}

    def objection(self, update: TensorUpdate) -> str | None:
        if update.param.dtype not in PARAM_DTYPES or update.grad.dtype not in NUMBER_DTYPES:
            return f"gradients of {update.grad.dtype} for parameters of {update.param.dtype} are not supported"
        device = update.param.device
        if device not in self._objections:
            self._objections[device] = _device_objection(device)
        return self._objections[device]

    def step(self, updates: Sequence[TensorUpdate], nonfinite: Tensor) -> None:
        batches: dict[Combination, list[TensorUpdate]] = {}
        for update in updates:
            batches.setdefault(Combination.of(update), []).append(update)
        with _current(nonfinite.device):
            for combination, batch in batches.items():
                self._launch(combination, batch, nonfinite)

    def _launch(self, combination: Combination, batch: list[TensorUpdate], nonfinite: Tensor) -> None:
        kernels = _kernels()
        converted: list[Tensor] = []  # freed after the launch: the stream keeps the order
        rows, groups, tiles = _rows(combination, batch, kernels.TILE_ELEMENTS, converted)
        device = nonfinite.device
        tensors = self._tables.table(rows, device)
        lanes = nonfinite
        if combination.statistics:
            shape = len(batch), kernels.LANES, kernels.LANE_COLUMNS
            lanes = torch.zeros(shape, dtype=torch.float64, device=device)
        kernels.lion_kernel[(sum(tiles),)](
            tensors,
            self._tables.table(groups, device),
            self._tables.find(tiles, lambda: _tensor_of_tile(tiles), device),
            nonfinite,
            lanes,
            **_constants(combination, kernels),
            num_warps=WARPS,
            enable_fp_fusion=False,  # a fused multiply-add would differ from the other engines in the last bit
        )
        if combination.statistics:
            kernels.statistics_kernel[(len(batch),)](tensors, lanes)


def _rows(
    combination: Combination, batch: list[TensorUpdate], tile_elements: int, converted: list[Tensor]
) -> tuple[bytes, bytes, tuple[int, ...]]:
    """The rows of both tables, and the number of tiles of each tensor."""
    rows, groups = bytearray(), bytearray()
    known: dict[int, int] = {}
    tiles: list[int] = []
    first_tile = 0
    for update in batch:
        settings = update.settings
        if id(settings) not in known:
            known[id(settings)] = len(known)
            groups += tables.group_row(settings, combination.arithmetic, update.is_random, converted)
        rows += tables.tensor_row(update, known[id(settings)], first_tile)
        tiles.append(-(-update.param.numel() // tile_elements))
        first_tile += tiles[-1]
    return bytes(rows), bytes(groups), tuple(tiles)


def _tensor_of_tile(tiles: tuple[int, ...]) -> Tensor:
    """The row of the tensor that each tile belongs to: int32."""
    return torch.arange(len(tiles), dtype=torch.int32).repeat_interleave(torch.tensor(tiles))


def _constants(combination: Combination, kernels: ModuleType) -> dict[str, Any]:
    def named(dtype: torch.dtype) -> Any:
        return getattr(kernels.tl, str(dtype).removeprefix("torch."))

    return dict(
        PARAM=named(combination.param),
        GRAD=named(combination.grad),
        MOMENTUM=named(combination.exp_avg),
        WEIGHT_BITS=combination.weight_bits,
        CAUTIOUS=combination.cautious,
        STATISTICS=combination.statistics,
        ALIGNED=combination.aligned,
    )


def _kernels() -> ModuleType:
    """kernels.py, which needs triton."""
    return importlib.import_module("lion_lightning.optim.kernels.kernels")


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a device the current one, on which triton launches."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def _device_objection(device: torch.device) -> str | None:
    """Why nothing can run on a device; finds out by running the smallest of kernels."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < MINIMUM_CUDA_CAPABILITY:
            return f"triton needs compute capability 7.0 and the device has {capability[0]}.{capability[1]}"
    try:
        kernels = _kernels()
        if (device.type == "cpu") != kernels.INTERPRETED or device.type not in ("cpu", "cuda"):
            return f"it runs on CUDA and ROCm, or with TRITON_INTERPRET=1 on a CPU, not on {device.type}"
        with _current(device):
            kernels.probe_kernel[(1,)](torch.zeros(1, device=device))
    except Exception as error:  # a compiler or driver that is missing shows in many ways
        logger.warning("The eager engine serves %s: triton does not work there (%s)", device, error)
        return f"triton does not work here ({error})"
    return None


engine = TritonEngine()
