"""How many floating-point operations a device could do at best: what model FLOPs utilisation is a share of."""

import time

import torch
from lightning.fabric.utilities.throughput import get_available_flops

SIDE = 1024
"""Of the matrices that a CPU multiplies to show what it can do."""
REPEATS = 4


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Operations a second; None where nobody knows.

    Of an NVIDIA GPU, what its data sheet says for dense matrices. The data sheet of a CPU says nothing of the kind:
    there the best of four products of 1,024 x 1,024 matrices on torch's threads is taken, a few hundredths of a second.

    Args:
        device: of the training.
        precision: as the Trainer names it.
    """
    dtype = _dtype(precision)
    if device.type == "cuda":
        return get_available_flops(device, dtype)
    return _measured(dtype) if device.type == "cpu" else None


def _dtype(precision: str) -> torch.dtype:
    kinds = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64, "32": torch.float32}
    return kinds.get(precision.split("-")[0], torch.float32)


def _measured(dtype: torch.dtype) -> float:
    left, right = (torch.ones(SIDE, SIDE, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        torch.mm(left, right)
        times.append(time.perf_counter() - began)
    return 2 * SIDE**3 / min(times)
