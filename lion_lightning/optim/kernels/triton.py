"""The triton engine: one kernel launch for all tensors of a dtype combination, on CUDA and ROCm devices.

The kernel finds what to update in two tables on the device, one of tensors and one of settings, which are copied there
only when their content changes. A step never synchronises. It can be captured in a CUDA graph after a first step
outside the graph; a replay reads lr, the step number, grad_scale and found_inf anew if they are tensors on the device.
"""

import importlib.util
import logging
import struct
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lion_lightning.optim.kernels import rule, storage_formats
from lion_lightning.optim.kernels.rule import Settings, TensorUpdate

NUMBER_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PARAM_DTYPES = (torch.bfloat16, torch.float32, torch.float64)
ALIGNMENT_BYTES = 16
WARPS = 4 if torch.version.hip is None else 2
"""Of a program: 128 threads, whose warps are of 32 or, on AMD's data centre GPUs, of 64; see TILE_ELEMENTS."""
MINIMUM_CUDA_CAPABILITY = (7, 0)

TENSOR_ROW = struct.Struct("10q")
"""A row of the table of tensors; triton_kernels.py names the columns."""
GROUP_ROW = struct.Struct("8d7q")
"""A row of the table of settings, whose columns are named there too."""

KEPT_TABLES = 64
"""The least recently used tables beyond this number are dropped: a schedule makes a new one at every step."""

logger = logging.getLogger(__name__)


Constants: TypeAlias = tuple[torch.dtype, torch.dtype, torch.dtype, int, bool, bool]
"""PARAM, GRAD, MOMENTUM, WEIGHT_BITS, CAUTIOUS and ALIGNED of the kernel; tensors with equal ones share a launch."""


class TritonEngine:
    """Launches the kernels of triton_kernels.py; with TRITON_INTERPRET=1 in the environment on a CPU, for tests."""

    name = "triton"

    def __init__(self) -> None:
        self._tables = DeviceTables()
        self._objections: dict[torch.device, str | None] = {}

    def objection(self, update: TensorUpdate) -> str | None:
        param, grad, exp_avg = update.param.dtype, update.grad.dtype, update.exp_avg.dtype
        if param not in PARAM_DTYPES or grad not in NUMBER_DTYPES or exp_avg not in (*PARAM_DTYPES, torch.int8):
            return f"gradients of {grad} and momentum of {exp_avg} for parameters of {param} are not supported"
        device = update.param.device
        if device not in self._objections:
            self._objections[device] = _device_objection(device)
        return self._objections[device] or rule.without_memory(update)

    def step(self, updates: Sequence[TensorUpdate], nonfinite: Tensor) -> None:
        batches: dict[Constants, list[TensorUpdate]] = {}
        for update in updates:
            arrays = update.param, update.grad, update.exp_avg, update.weight_remainder
            constants = (
                update.param.dtype,
                update.grad.dtype,
                update.exp_avg.dtype,
                update.settings.weight_bits if update.param.dtype == torch.bfloat16 else 32,
                update.settings.cautious,
                not any(rule.address(array) % ALIGNMENT_BYTES for array in arrays),
            )
            batches.setdefault(constants, []).append(update)
        with _current(nonfinite.device):
            for constants, batch in batches.items():
                self._launch(constants, batch, nonfinite)

    def _launch(self, constants: Constants, batch: list[TensorUpdate], nonfinite: Tensor) -> None:
        """Writes both tables and launches the kernel once for all updates of a batch."""
        kernels, device = _kernels(), nonfinite.device
        arithmetic = torch.float64 if constants[0] == torch.float64 else torch.float32
        converted: list[Tensor] = []  # freed after the launch: the stream keeps the order
        numbers_of_settings: dict[int, int] = {}
        tensors, groups = bytearray(), bytearray()
        tiles: list[int] = []
        first_tile = 0
        for update in batch:
            settings = update.settings
            if id(settings) not in numbers_of_settings:
                numbers_of_settings[id(settings)] = len(numbers_of_settings)
                groups += _group_row(settings, arithmetic, update.is_random, converted)
            tensors += _tensor_row(update, numbers_of_settings[id(settings)], first_tile)
            tiles.append(-(-update.param.numel() // kernels.TILE_ELEMENTS))
            first_tile += tiles[-1]
        tensor_of_tile = self._tables.find(
            tuple(tiles), lambda: torch.repeat_interleave(torch.tensor(tiles, dtype=torch.int32, device="cpu")), device
        )
        dtypes = (getattr(kernels.tl, str(dtype).removeprefix("torch.")) for dtype in constants[:3])
        kernels.lion_kernel[(first_tile,)](
            self._tables.table(bytes(tensors), device),
            self._tables.table(bytes(groups), device),
            tensor_of_tile,
            nonfinite,
            *dtypes,
            *constants[3:],
            num_warps=WARPS,
            enable_fp_fusion=False,  # a fused multiply-add would differ from the other engines in the last bit
        )


def _kernels() -> ModuleType:
    """The module of the kernels, whose import needs triton."""
    return importlib.import_module("lion_lightning.optim.kernels.triton_kernels")


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which triton launches on `device`."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def _device_objection(device: torch.device) -> str | None:
    """Why kernels cannot run on a device, found by running a small one; None if they can."""
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
    except Exception as error:  # a missing compiler or driver raises exceptions of many types
        logger.warning("The eager engine serves %s: triton does not work there (%s)", device, error)
        return f"triton does not work here ({error})"
    return None


def _tensor_row(update: TensorUpdate, group: int, first_tile: int) -> bytes:
    """The row of one tensor, with the number of its settings' row and the number of tiles before its first."""
    return TENSOR_ROW.pack(
        update.param.data_ptr(),
        update.grad.data_ptr(),
        update.exp_avg.data_ptr(),
        rule.address(update.exp_avg_scale),
        rule.address(update.weight_remainder),
        update.param.numel(),
        update.offset,
        update.index,
        group,
        first_tile,
    )


def _group_row(settings: Settings, arithmetic: torch.dtype, is_random: bool, converted: list[Tensor]) -> bytes:
    """The row of one group's settings: numbers where the host knows them, else addresses of tensors on the device.

    Args:
        settings: of one step.
        arithmetic: dtype of the arithmetic, float32 or float64.
        is_random: whether seed and step number matter; if not, they are left out, so that the row stays the same.
        converted: device scalars of another dtype are converted; the caller keeps those added here until the launch.
    """

    def placed(value: float | Tensor | None, wanted: torch.dtype) -> int:
        if not isinstance(value, Tensor):
            return 0
        converted.append(value.to(wanted))
        return converted[-1].data_ptr()

    sign = -1.0 if settings.maximize else 1.0
    return GROUP_ROW.pack(
        0.0 if isinstance(settings.lr, Tensor) else settings.lr,
        settings.beta1,
        1 - settings.beta1,
        settings.beta2,
        1 - settings.beta2,
        settings.weight_decay,
        settings.decay_threshold,
        sign if isinstance(settings.grad_scale, Tensor) else rule.gradient_factor(settings, arithmetic),
        placed(settings.lr, arithmetic),
        placed(settings.grad_scale, arithmetic),
        placed(settings.found_inf, torch.float32),
        placed(settings.step, torch.int64) if is_random else 0,
        0 if isinstance(settings.step, Tensor) or not is_random else settings.step,
        storage_formats.seed_word(settings.seed) if is_random else 0,
        settings.skip_nonfinite,
    )


class DeviceTables:
    """Tables on the device, cached by content and stream.

    Tables are copied from pinned memory without synchronising. In a CUDA graph capture the copy of a new table becomes
    part of the graph. All tables that a graph reads, and the pinned source of such a copy, are kept for ever. Pinned
    memory cannot be allocated during a capture and is therefore reserved when a table of that size is first made.
    """

    def __init__(self) -> None:
        self._tables: OrderedDict[tuple[torch.device, int, Hashable], Tensor] = OrderedDict()
        self._of_graphs: list[Tensor] = []
        self._reserved: dict[int, Tensor] = {}

    def table(self, content: bytes, device: torch.device) -> Tensor:
        """int64 of shape (len(content) / 8,) on the current stream of the device."""
        return self.find(content, lambda: torch.frombuffer(bytearray(content), dtype=torch.int64), device)

    def find(self, key: Hashable, make: Callable[[], Tensor], device: torch.device) -> Tensor:
        """The table of a key, made and copied if there is none.

        Args:
            key: identifies the content.
            make: returns the content as a 1-D tensor on the host.
            device: a CPU, or the current CUDA device.
        """
        if device.type == "cpu":
            return make()
        if torch.cuda.is_current_stream_capturing():
            return self._captured(key, make, device)
        full_key = device, torch.cuda.current_stream(device).cuda_stream, key
        if full_key not in self._tables:
            source = pinned(make())
            self._tables[full_key] = source.to(device, non_blocking=True)
            if source.nbytes not in self._reserved:
                self._reserved[source.nbytes] = pinned(torch.empty(source.nbytes, dtype=torch.uint8, device="cpu"))
            if len(self._tables) > KEPT_TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(full_key)
        return self._tables[full_key]

    def _captured(self, key: Hashable, make: Callable[[], Tensor], device: torch.device) -> Tensor:
        # The tables of other streams are complete: a capture begins by synchronising the device.
        for (known_device, _, known_key), table in self._tables.items():
            if (known_device, known_key) == (device, key):
                self._of_graphs.append(table)
                return table
        content = make()
        reserved = self._reserved.pop(content.nbytes, None)
        source = pinned(content) if reserved is None else reserved.view(content.dtype).copy_(content)
        table = source.to(device, non_blocking=True)
        self._of_graphs += [source, table]
        return table


def pinned(content: Tensor) -> Tensor:
    """A copy of a tensor in pinned host memory."""
    return torch.empty_like(content, pin_memory=True).copy_(content)


engine = TritonEngine()
