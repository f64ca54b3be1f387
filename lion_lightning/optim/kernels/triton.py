"""The triton engine: all tensors of a dtype combination in one launch, on CUDA and ROCm devices.

A table of addresses and settings tells each program of the kernel what to update. It is kept on the device and copied
there again only when it changes. No step waits for the device, and a step can be captured in a CUDA graph after one
that was not. What is then read anew by each replay is what the settings hold as tensors on the device: lr, the step
number, grad_scale, found_inf.
"""

import importlib.util
import logging
import struct
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lion_lightning.optim.kernels import rule, storage_formats
from lion_lightning.optim.kernels.rule import Settings, TensorUpdate

NUMBER_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PARAM_DTYPES = (torch.bfloat16, torch.float32, torch.float64)
ALIGNMENT_BYTES = 16
WARPS = 4
MINIMUM_CUDA_CAPABILITY = (7, 0)

TENSOR_COLUMNS = (
    "param",
    "grad",
    "exp_avg",
    "exp_avg_scale",
    "weight_remainder",
    "count",
    "offset",
    "index",
    "group",
    "first_tile",
)
"""Columns of the table of tensors; all int64, the first five addresses (0 for None)."""

NUMBERS = ("lr", "beta1", "rest1", "beta2", "rest2", "weight_decay", "factor")
GROUP_COLUMNS = (
    *NUMBERS,
    "lr_address",
    "grad_scale_address",
    "found_inf_address",
    "step_address",
    "step",
    "seed",
    "skip",
)
"""Columns of the table of settings: float64 numbers, then int64. Addresses are of 0-d tensors, 0 for None."""

KEPT_TABLES = 64
"""Tables beyond this number are dropped, the least recently used first: a schedule makes a new one at every step."""

_TENSOR_ROW = struct.Struct(f"{len(TENSOR_COLUMNS)}q")
_GROUP_ROW = struct.Struct(f"{len(NUMBERS)}d{len(GROUP_COLUMNS) - len(NUMBERS)}q")

logger = logging.getLogger(__name__)


class Combination(NamedTuple):
    """What is compiled into a kernel: tensors that agree in it share a launch."""

    param: torch.dtype
    grad: torch.dtype
    exp_avg: torch.dtype
    weight_bits: int
    cautious: bool
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
            not any(address(array) % ALIGNMENT_BYTES for array in arrays),
        )

    @property
    def arithmetic(self) -> torch.dtype:
        """float64 for float64 parameters, else float32."""
        return torch.float64 if self.param == torch.float64 else torch.float32


class TritonEngine:
    """Runs triton_kernels.py. With TRITON_INTERPRET=1 in the environment it runs them on a CPU instead, for tests."""

    name = "triton"

    def __init__(self) -> None:
        self._tables = DeviceTables()
        self._objections: dict[torch.device, str | None] = {}

    def objection(self, update: TensorUpdate) -> str | None:
        misfit = update.misfit()
        if misfit is not None:
            return misfit
        param, grad, exp_avg = update.param.dtype, update.grad.dtype, update.exp_avg.dtype
        if param not in PARAM_DTYPES or grad not in NUMBER_DTYPES or exp_avg not in (*PARAM_DTYPES, torch.int8):
            return f"gradients of {grad} and momentum of {exp_avg} for parameters of {param} are not supported"
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
        kernels.lion_kernel[(sum(tiles),)](
            self._tables.table(rows, device),
            self._tables.table(groups, device),
            self._tables.find(tiles, lambda: _tensor_of_tile(tiles), device),
            nonfinite,
            **_constants(combination, kernels),
            num_warps=WARPS,
            enable_fp_fusion=False,  # a fused multiply-add would differ from the other engines in the last bit
        )


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
            groups += group_row(settings, combination.arithmetic, update.is_random, converted)
        rows += tensor_row(update, known[id(settings)], first_tile)
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
        ALIGNED=combination.aligned,
    )


def _kernels() -> ModuleType:
    """triton_kernels.py, which needs triton."""
    return importlib.import_module("lion_lightning.optim.kernels.triton_kernels")


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


def address(tensor: Tensor | None) -> int:
    """Where a tensor's elements begin; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def tensor_row(update: TensorUpdate, group: int, first_tile: int) -> bytes:
    """The row of one tensor.

    Args:
        update: the tensor.
        group: row of its settings in the other table.
        first_tile: tiles of the tensors before it.
    """
    return _TENSOR_ROW.pack(
        update.param.data_ptr(),
        update.grad.data_ptr(),
        update.exp_avg.data_ptr(),
        address(update.exp_avg_scale),
        address(update.weight_remainder),
        update.param.numel(),
        update.offset,
        update.index,
        group,
        first_tile,
    )


def group_row(settings: Settings, dtype: torch.dtype, is_random: bool, converted: list[Tensor]) -> bytes:
    """The row of one parameter group's settings. What a device knows is left to the kernel to read.

    Args:
        settings: of one step.
        dtype: of the arithmetic, float32 or float64.
        is_random: whether the step number matters; if not, it does not change the row.
        converted: device scalars of another dtype are converted, and added here to be kept until the launch.
    """

    def place(value: float | Tensor | None, wanted: torch.dtype) -> int:
        if not isinstance(value, Tensor):
            return 0
        converted.append(value.to(wanted))
        return converted[-1].data_ptr()

    sign = -1.0 if settings.maximize else 1.0
    return _GROUP_ROW.pack(
        0.0 if isinstance(settings.lr, Tensor) else settings.lr,
        settings.beta1,
        1 - settings.beta1,
        settings.beta2,
        1 - settings.beta2,
        settings.weight_decay,
        sign if isinstance(settings.grad_scale, Tensor) else rule.gradient_factor(settings, dtype),
        place(settings.lr, dtype),
        place(settings.grad_scale, dtype),
        place(settings.found_inf, torch.float32),
        place(settings.step, torch.int64) if is_random else 0,
        0 if isinstance(settings.step, Tensor) or not is_random else settings.step,
        storage_formats.seed_word(settings.seed) if is_random else 0,
        settings.skip_nonfinite,
    )


class DeviceTables:
    """Tables on the device, found by their content, so that one is copied there only when it is new.

    A copy goes through pinned memory and is not waited for. Under CUDA graph capture a new table becomes a copy in the
    graph; it, its pinned source and every other table a graph reads are kept for good, and pinned memory for it is set
    aside before, as none may be allocated then.
    """

    def __init__(self) -> None:
        self._tables: OrderedDict[tuple[torch.device, int, Hashable], Tensor] = OrderedDict()
        self._of_graphs: list[Tensor] = []
        self._set_aside: dict[int, Tensor] = {}

    def table(self, content: bytes, device: torch.device) -> Tensor:
        """int64 of shape (len(content) / 8,) on the current stream of the device."""
        return self.find(content, lambda: torch.frombuffer(bytearray(content), dtype=torch.int64), device)

    def find(self, key: Hashable, make: Callable[[], Tensor], device: torch.device) -> Tensor:
        """The table of a key, which must tell its content.

        Args:
            key: other than the key of any table of other content.
            make: gives the content as a 1-D tensor on the host.
            device: which must be the current one.
        """
        if device.type == "cpu":
            return make()
        if torch.cuda.is_current_stream_capturing():
            return self._captured(key, make, device)
        full_key = device, torch.cuda.current_stream(device).cuda_stream, key
        if full_key not in self._tables:
            pinned = _pinned(make())
            self._tables[full_key] = pinned.to(device, non_blocking=True)
            if pinned.nbytes not in self._set_aside:
                self._set_aside[pinned.nbytes] = torch.empty(pinned.nbytes, dtype=torch.uint8, pin_memory=True)
            if len(self._tables) > KEPT_TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(full_key)
        return self._tables[full_key]

    def _captured(self, key: Hashable, make: Callable[[], Tensor], device: torch.device) -> Tensor:
        # What another stream copied is there: a capture begins with a wait for the device.
        for (known_device, _, known_key), table in self._tables.items():
            if (known_device, known_key) == (device, key):
                self._of_graphs.append(table)
                return table
        content = make()
        pinned = self._set_aside.pop(content.nbytes, None)
        pinned = _pinned(content) if pinned is None else pinned.view(content.dtype).copy_(content)
        table = pinned.to(device, non_blocking=True)
        self._of_graphs += [pinned, table]
        return table


def _pinned(content: Tensor) -> Tensor:
    return torch.empty_like(content, pin_memory=True).copy_(content)


engine = TritonEngine()
