"""The cpu engine: cpu.c through ctypes from a few Python threads, which run in parallel as ctypes drops the GIL."""

import ctypes
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from lion_lightning.optim import bits, rule, telemetry
from lion_lightning.optim.engines import library
from lion_lightning.optim.rule import Settings, TensorUpdate

CHUNK_ELEMENTS = 65_536
CAUTIOUS_FLAG, SKIP_NONFINITE_FLAG = 1, 2
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.int8: 3}

_TASK = struct.Struct("18q7d")  # the fields of Task in cpu.c, in order


class CpuEngine:
    """Runs the compiled rule on as many threads as torch uses (`torch.set_num_threads`)."""

    name = "cpu"

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._thread_count = 0

    def objection(self, update: TensorUpdate) -> str | None:
        types = update.param.dtype, update.grad.dtype, update.exp_avg.dtype
        if update.param.dtype == torch.float64 and set(types) != {torch.float64}:
            return f"float64 parameters need gradients and momentum of float64, got {types[1]} and {types[2]}"
        if update.grad.dtype not in (torch.float32, torch.bfloat16, torch.float64) or (
            update.grad.dtype == torch.float64 and update.param.dtype != torch.float64
        ):
            return f"gradients of {update.grad.dtype} for parameters of {update.param.dtype} are not supported"
        if library.load() is None:
            return "cpu.c could not be compiled"
        return None

    def step(self, updates: Sequence[TensorUpdate], nonfinite: Tensor) -> None:
        tasks, rows, chunks = bytearray(), [], 0
        for update in updates:
            count = -(-update.param.numel() // CHUNK_ELEMENTS)
            row = None
            if update.statistics is not None:
                row = torch.zeros(count, telemetry.STATISTICS, dtype=torch.float64)
                rows.append((update.statistics, row))
            tasks += _task(update, chunks, row)
            chunks += count
        self._run(bytes(tasks), len(updates), chunks, nonfinite)
        for statistics, row in rows:
            statistics += row.sum(0)

    def _run(self, tasks: bytes, task_count: int, chunk_count: int, nonfinite: Tensor) -> None:
        """Calls cpu.c from every thread; the calling one takes its share."""
        compiled = library.load()
        assert compiled is not None, "objection() was not asked"
        next_chunk = ctypes.c_int64(0)
        arguments = tasks, task_count, chunk_count, ctypes.addressof(next_chunk), nonfinite.data_ptr()
        threads = min(torch.get_num_threads(), chunk_count)
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


def _task(update: TensorUpdate, first_chunk: int, row: Tensor | None) -> bytes:
    """The Task of cpu.c for one tensor."""
    settings = update.settings
    dtype = torch.float64 if update.param.dtype == torch.float64 else torch.float32
    keys = bits.random_keys(settings.seed, settings.step, update.index) if update.is_random else (0, 0)
    return _TASK.pack(
        update.param.data_ptr(),
        update.exp_avg.data_ptr(),
        update.grad.data_ptr(),
        _address(update.exp_avg_scale),
        _address(update.weight_remainder),
        _address(row),
        _address(update.signs),
        update.sign_stride,
        update.param.numel(),
        first_chunk,
        update.offset,
        TYPES[update.param.dtype],
        TYPES[update.grad.dtype],
        TYPES[update.exp_avg.dtype],
        settings.weight_bits,
        _flags(settings),
        *keys,
        settings.lr,
        settings.beta1,
        1 - settings.beta1,
        settings.beta2,
        1 - settings.beta2,
        settings.weight_decay,
        rule.gradient_factor(settings, dtype),
    )


def _flags(settings: Settings) -> int:
    return CAUTIOUS_FLAG * settings.cautious + SKIP_NONFINITE_FLAG * settings.skip_nonfinite


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


engine = CpuEngine()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=engine.forget_threads)
