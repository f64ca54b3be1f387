"""The cpu engine: cpu.c through ctypes. A step is one call, whose threads start and end in C.

The compiled library is part of the package, or is built on first use in the user's cache,
`$XDG_CACHE_HOME/lion_lightning` (by default `~/.cache/lion_lightning`). Its file name is a hash of source, compiler and
flags. The file is created by an atomic rename, so that several processes may build it at the same time.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lion_lightning.optim.kernels import compile_cpu, rule, storage_formats
from lion_lightning.optim.kernels.rule import TensorUpdate

STALE_SECONDS = 60

CHUNK_ELEMENTS = 262_144
CAUTIOUS_FLAG, SKIP_NONFINITE_FLAG = 1, 2
NARROW = (torch.float32, torch.bfloat16)
DOUBLE = (torch.float64, torch.float64, torch.float64)
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.int8: 3}
TASK = struct.Struct("15q8d")
"""The fields of Task in cpu.c, in order."""

log = logging.getLogger(__name__)


class CpuEngine:
    """Runs the compiled rule on as many threads as torch uses (`torch.set_num_threads`)."""

    name = "cpu"

    def objection(self, update: TensorUpdate) -> str | None:
        dtypes = param, grad, exp_avg = update.param.dtype, update.grad.dtype, update.exp_avg.dtype
        if dtypes != DOUBLE and (param not in NARROW or grad not in NARROW or exp_avg not in (*NARROW, torch.int8)):
            if param == torch.float64:
                return f"float64 parameters need gradients and momentum of float64, got {grad} and {exp_avg}"
            return f"gradients of {grad} and momentum of {exp_avg} for parameters of {param} are not supported"
        if load() is None:
            return "cpu.c could not be compiled"
        return rule.without_memory(update)

    def step(self, updates: Sequence[TensorUpdate], nonfinite: Tensor) -> None:
        table, first_chunk = bytearray(), 0
        for update in updates:
            table += _task(update, first_chunk)
            first_chunk += -(-update.param.numel() // CHUNK_ELEMENTS)
        compiled = load()
        assert compiled is not None, "objection() was not consulted"
        threads = min(torch.get_num_threads(), first_chunk)
        # Python handles an interrupt after this call, when all threads have ended and nothing is written any more.
        compiled.lion_step(bytes(table), len(updates), first_chunk, threads, nonfinite.data_ptr())


def _task(update: TensorUpdate, first_chunk: int) -> bytes:
    """The Task of cpu.c for one tensor, with the number of chunks of the tensors before it."""
    settings = update.settings
    keys = storage_formats.random_keys(settings.seed, settings.step, update.index) if update.is_random else (0, 0)
    arithmetic = torch.float64 if update.param.dtype == torch.float64 else torch.float32
    return TASK.pack(
        update.param.data_ptr(),
        update.exp_avg.data_ptr(),
        update.grad.data_ptr(),
        rule.address(update.exp_avg_scale),
        rule.address(update.weight_remainder),
        update.param.numel(),
        first_chunk,
        update.offset,
        TYPES[update.param.dtype],
        TYPES[update.grad.dtype],
        TYPES[update.exp_avg.dtype],
        settings.weight_bits,
        CAUTIOUS_FLAG * settings.cautious + SKIP_NONFINITE_FLAG * settings.skip_nonfinite,
        *keys,
        settings.lr,
        settings.beta1,
        1 - settings.beta1,
        settings.beta2,
        1 - settings.beta2,
        settings.weight_decay,
        settings.decay_threshold,
        rule.gradient_factor(settings, arithmetic),
    )


@functools.cache
def load() -> ctypes.CDLL | None:
    """The compiled library; None, with one warning in the log, if it can neither be found nor built."""
    problems = []
    for find in (installed, cached):
        try:
            library = ctypes.CDLL(str(find()))
            pointer, number = ctypes.c_void_p, ctypes.c_int64
            library.lion_step.argtypes, library.lion_step.restype = (pointer, number, number, number, pointer), None
            library.lion_task_bytes.argtypes, library.lion_task_bytes.restype = (), number
            return library
        except (OSError, RuntimeError, subprocess.SubprocessError, AttributeError) as error:
            problems.append(f"{find.__name__}: {error}")
    log.warning("Lion's CPU engine is not available, the slower eager engine serves instead (%s)", "; ".join(problems))
    return None


def installed() -> Path:
    """Path of the library beside its source, as wheels have it.

    Raises:
        FileNotFoundError: there is none, or the source is newer.
    """
    path = compile_cpu.SOURCE.with_name(compile_cpu.LIBRARY)
    # Of an editable installation, the source may be newer than the library. A wheel writes both within seconds.
    if path.exists() and path.stat().st_mtime > compile_cpu.SOURCE.stat().st_mtime - STALE_SECONDS:
        return path
    raise FileNotFoundError("not built with the package")


def cached() -> Path:
    """Path of the library in the user's cache, compiled if it is missing.

    Raises:
        FileNotFoundError: there is no compiler.
        subprocess.SubprocessError: the compiler failed.
    """
    flags = " ".join(compile_cpu.FLAGS).encode()
    parts = (compile_cpu.SOURCE.read_bytes(), compile_cpu.version(), flags, platform.machine().encode())
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")) / "lion_lightning"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"cpu-{digest}.so"
    if path.exists():
        return path
    descriptor, unfinished = tempfile.mkstemp(dir=folder, suffix=".so")
    os.close(descriptor)
    try:
        compile_cpu.compile_library(unfinished)
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return path


engine = CpuEngine()
