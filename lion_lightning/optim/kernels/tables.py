"""Tables that the Triton kernels read, addresses and settings, kept on the device from step to step."""

import struct
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from lion_lightning.optim import telemetry
from lion_lightning.optim.kernels import rule, storage_formats
from lion_lightning.optim.kernels.rule import Settings, TensorUpdate

TENSOR = (
    "param",
    "grad",
    "exp_avg",
    "exp_avg_scale",
    "weight_remainder",
    "statistics",
    "signs",
    "sign_stride",
    "observed_below",
    "count",
    "offset",
    "index",
    "group",
    "first_tile",
)
"""Columns of the table of tensors; all int64, the first seven addresses (0 for None)."""

NUMBERS = ("lr", "beta1", "rest1", "beta2", "rest2", "weight_decay", "factor", "bound")
GROUP = (*NUMBERS, "lr_address", "grad_scale_address", "found_inf_address", "step_address", "step", "seed", "skip")
"""Columns of the table of settings: float64 numbers, then int64. Addresses are of 0-d tensors, 0 for None."""

KEPT_BYTES = 1 << 26
"""Tables beyond this are dropped, oldest first."""

_TENSOR_ROW = struct.Struct(f"{len(TENSOR)}q")
_GROUP_ROW = struct.Struct(f"{len(NUMBERS)}d{len(GROUP) - len(NUMBERS)}q")


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
        address(update.statistics),
        address(update.signs),
        update.sign_stride,
        update.observed_below,
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

    decay = settings.weight_decay
    sign = -1.0 if settings.maximize else 1.0
    return _GROUP_ROW.pack(
        0.0 if isinstance(settings.lr, Tensor) else settings.lr,
        settings.beta1,
        1 - settings.beta1,
        settings.beta2,
        1 - settings.beta2,
        decay,
        sign if isinstance(settings.grad_scale, Tensor) else rule.gradient_factor(settings, dtype),
        telemetry.BOUND_SHARE / decay if decay > 0 else float("inf"),
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
        self._bytes = 0
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
            self._bytes += pinned.nbytes
            self._set_aside.setdefault(pinned.nbytes, torch.empty(pinned.nbytes, dtype=torch.uint8, pin_memory=True))
            self._forget()
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

    def _forget(self) -> None:
        while self._bytes > KEPT_BYTES and len(self._tables) > 1:
            _, table = self._tables.popitem(last=False)
            self._bytes -= table.nbytes


def _pinned(content: Tensor) -> Tensor:
    return torch.empty_like(content, pin_memory=True).copy_(content)
