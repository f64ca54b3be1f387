"""The cpu engine: cpu.c through ctypes from a few Python threads, which run in parallel as ctypes drops the GIL."""

import ctypes
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from lion_lightning.optim import telemetry
from lion_lightning.optim.kernels import library, rule, storage_formats
from lion_lightning.optim.kernels.rule import Settings, TensorUpdate

CHUNK_ELEMENTS = 262_144
CAUTIOUS_FLAG, SKIP_NONFINITE_FLAG = 1, 2
GRAD_TYPES = (torch.float32, torch.bfloat16)
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.int8: 3}

_TENSOR = struct.Struct("19q")
_NUMBERS = struct.Struct("7d")  # together the fields of Task in cpu.c, in order


@dataclass
class Tasks:
    """The updates of a step as cpu.c reads them. Good for as long as the tensors stay where they are."""

    updates: Sequence[TensorUpdate]
    table: bytes
    """One Task for each update."""
    chunks: int
    rows: list[tuple[TensorUpdate, Tensor]]
    """Sums of chunks, to be added up for telemetry."""


class CpuEngine:
    """Runs the compiled rule on as many threads as torch uses (`torch.set_num_threads`)."""

    name = "cpu"

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._thread_count = 0

    def objection(self, update: TensorUpdate) -> str | None:
        param, grad, exp_avg = update.param.dtype, update.grad.dtype, update.exp_avg.dtype
        if param == torch.float64 and not param == grad == exp_avg:
            return f"float64 parameters need gradients and momentum of float64, got {grad} and {exp_avg}"
        if grad not in GRAD_TYPES and grad != param:
            return f"gradients of {grad} for parameters of {param} are not supported"
        if library.load() is None:
            return "cpu.c could not be compiled"
        return None

    def step(self, updates: Sequence[TensorUpdate], nonfinite: Tensor, tasks: "Tasks | None" = None) -> None:
        """Takes the step; `tasks` are those of the same updates, where they have been written before."""
        if tasks is None or updates[0].statistics is not None:  # which came later
            tasks = self.tasks(updates)
        self._run(tasks, nonfinite)
        for update, row in tasks.rows:
            assert update.statistics is not None
            update.statistics += row.sum(0)

    def tasks(self, updates: Sequence[TensorUpdate]) -> "Tasks":
        """What cpu.c is to do for the updates."""
        table, chunks = bytearray(), 0
        rows: list[tuple[TensorUpdate, Tensor]] = []
        numbers: dict[tuple[int, torch.dtype], bytes] = {}
        for update in updates:
            count = -(-update.param.numel() // CHUNK_ELEMENTS)
            row = update.statistics
            if row is not None and count > 1:  # chunks are added up afterwards: threads share none
                row = torch.zeros(count, telemetry.STATISTICS, dtype=torch.float64)
                rows.append((update, row))
            key = id(update.settings), update.param.dtype
            if key not in numbers:
                numbers[key] = _numbers(update.settings, update.param.dtype)
            table += _tensor(update, chunks, row)
            table += numbers[key]
            chunks += count
        return Tasks(updates, bytes(table), chunks, rows)

    def _run(self, tasks: "Tasks", nonfinite: Tensor) -> None:
        """Calls cpu.c from every thread; the calling one takes its share."""
        compiled = library.load()
        assert compiled is not None, "objection() was not asked"
        next_chunk = ctypes.c_int64(0)
        arguments = tasks.table, len(tasks.updates), tasks.chunks, ctypes.addressof(next_chunk), nonfinite.data_ptr()
        threads = min(torch.get_num_threads(), tasks.chunks)
        others = [self._pool(threads - 1).submit(compiled.lion_step, *arguments) for _ in range(threads - 1)]
        compiled.lion_step(*arguments)
        for other in others:
            other.result()

    def _pool(self, threads: int) -> ThreadPoolExecutor:
        if self._threads is None or self._thread_count < threads:
            if self._threads is not None:
                self._threads.shutdown()
            self._threads = ThreadPoolExecutor(threads, thread_name_prefix="lion")
            self._thread_count = threads
        return self._threads

    def forget_threads(self) -> None:
        """A forked child has none of its parent's threads."""
        self._threads = None


def _tensor(update: TensorUpdate, first_chunk: int, row: Tensor | None) -> bytes:
    """The first part of the Task of cpu.c: what belongs to one tensor."""
    settings = update.settings
    keys = storage_formats.random_keys(settings.seed, settings.step, update.index) if update.is_random else (0, 0)
    return _TENSOR.pack(
        update.param.data_ptr(),
        update.exp_avg.data_ptr(),
        update.grad.data_ptr(),
        _address(update.exp_avg_scale),
        _address(update.weight_remainder),
        _address(row),
        _address(update.signs),
        update.sign_stride,
        update.observed_below,
        update.param.numel(),
        first_chunk,
        update.offset,
        TYPES[update.param.dtype],
        TYPES[update.grad.dtype],
        TYPES[update.exp_avg.dtype],
        settings.weight_bits,
        _flags(settings),
        *keys,
    )


def _numbers(settings: Settings, param_dtype: torch.dtype) -> bytes:
    """The other part: the numbers of one parameter group."""
    return _NUMBERS.pack(
        settings.lr,
        settings.beta1,
        1 - settings.beta1,
        settings.beta2,
        1 - settings.beta2,
        settings.weight_decay,
        rule.gradient_factor(settings, torch.float64 if param_dtype == torch.float64 else torch.float32),
    )


def _flags(settings: Settings) -> int:
    return CAUTIOUS_FLAG * settings.cautious + SKIP_NONFINITE_FLAG * settings.skip_nonfinite


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


engine = CpuEngine()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=engine.forget_threads)
