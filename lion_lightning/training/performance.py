"""How fast a run is and what it costs: precision, throughput, utilisation, memory, bytes per parameter."""

import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lion_lightning.data.stream import StreamDataModule

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

WINDOW_BATCHES = 1000  # bounds the cost of a median, however long the run
WARMUP_BATCHES = 5  # allocation, compilation and caches make them slower
BYTES_PER_GIB = 2**30
SIDE, REPEATS = 1024, 4  # of the matrix products that measure a CPU
SHORT_SIDE = 256  # of those that choose a precision: some CPUs take seconds for a large product in bf16
TURNS = 5  # of fp32 and bf16; the best of each counts
PRECISION_VARIABLE = "LION_LIGHTNING_PRECISION"
WORTHWHILE = 1.3  # how many times faster bf16 must be: it does not speed up all of a run
STEADY = 0.8  # least ratio of the peaks before and after a run at which the machine counts as undisturbed


def choose_precision(accelerator: str, is_alone: bool) -> tuple[str, str]:
    """The precision that `trainer.precision=auto` stands for, and the reason in words.

    It is `bf16-mixed` where the device multiplies matrices in bf16 at least 1.3 times as fast as in fp32, and `32-true`
    elsewhere. The measurement takes a tenth of a second, in turns, so that other programs disturb both alike; a CPU of
    the AVX2 level has no instructions for bf16 products and is not measured. The environment variable
    LION_LIGHTNING_PRECISION takes the place of the measurement, for machines of several kinds that are to do the same.

    Args:
        accelerator: `trainer.accelerator`.
        is_alone: Whether the run has one process. Several must agree, so they do not measure: they take `bf16-mixed`
            on GPUs that multiply bf16, which all of one kind do, and `32-true` elsewhere.
    """
    if named := os.environ.get(PRECISION_VARIABLE):
        return named, f"from {PRECISION_VARIABLE}"
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        device = torch.device("cuda")
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            return "32-true", "the GPU does not multiply bf16"
        if not is_alone:
            return "bf16-mixed", "the GPU multiplies bf16"
    elif accelerator == "mps" or (accelerator != "cpu" and torch.backends.mps.is_available()):
        return "32-true", "bf16 is not measured on this accelerator"
    else:
        device = torch.device("cpu")
        if not is_alone:
            return "32-true", "several processes on CPUs do not measure bf16"
        if (level := torch.backends.cpu.get_cpu_capability()) == "AVX2":
            return "32-true", f"this CPU ({level}) has no instructions for bf16 products"
    turns = [
        [_matmul_flops(device, dtype, SHORT_SIDE) for dtype in (torch.float32, torch.bfloat16)] for _ in range(TURNS)
    ]
    full, half = map(max, zip(*turns, strict=True))
    name = "bf16-mixed" if half >= WORTHWHILE * full else "32-true"
    return name, f"bf16 products take {full / half:.2g} times as long as fp32 ones here"


class Throughput(Callback):
    """Logs `perf/*` and how much data the run has seen.

    Under `perf/`: `step_ms` (one optimizer step), `samples_per_second`, `tokens_per_second` (over all ranks, where a
    batch has `input_ids`), `mfu` (model FLOPs utilisation: what the module's `flops_per_sample` asks for, over
    `peak_flops`; recomputed activations do not count), `data_wait` (share of the time spent waiting for a batch),
    `peak_memory_gib` (device, or the process on a CPU), `bytes_per_parameter` (weights and optimizer state), `seconds`
    (since training began or was resumed). Under `data/`: `samples_seen`, `tokens_seen`.
    """

    def __init__(self) -> None:
        self.samples_seen = self.tokens_seen = 0
        self._peak_flops: float | None = None
        self._flops_per_sample = self._tokens_per_sample = self._batches = 0
        self._samples, self._tokens, self._waits, self.durations = (
            deque[float](maxlen=WINDOW_BATCHES) for _ in range(4)
        )  # of the latest batches; durations in seconds

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        flops = getattr(pl_module, "flops_per_sample", None)
        if flops is not None:
            self._flops_per_sample = flops()
            self._tokens_per_sample = getattr(pl_module, "tokens_per_sample", int)()
            self._peak_flops = peak_flops(trainer.strategy.root_device, str(trainer.precision))
        self._began = self._mark = time.perf_counter()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark = time.perf_counter()  # validation is not training time

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._wait = time.perf_counter() - self._mark

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        ids = batch.get("input_ids") if isinstance(batch, dict) else None
        data = getattr(trainer, "datamodule", None)
        count = data.samples_in if isinstance(data, StreamDataModule) else extract_batch_size
        samples = count(batch) * trainer.world_size
        tokens = ids.numel() * trainer.world_size if isinstance(ids, Tensor) else 0  # padding included
        self.samples_seen += samples
        self.tokens_seen += tokens
        self._batches += 1
        if self._batches > WARMUP_BATCHES:
            self.durations.append(now - self._mark)
            self._waits.append(self._wait)
            self._samples.append(samples)
            self._tokens.append(tokens)
        self._mark = now
        if self.durations and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            figures = {**self.measured(trainer), "perf/seconds": now - self._began}
            figures["perf/bytes_per_parameter"] = bytes_per_parameter(trainer.optimizers)
            figures["data/samples_seen"] = float(self.samples_seen)
            if self.tokens_seen:
                figures["data/tokens_seen"] = float(self.tokens_seen)
            pl_module.log_dict(figures)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._peak_flops and trainer.strategy.root_device.type == "cpu":
            again = peak_flops(trainer.strategy.root_device, str(trainer.precision)) or 0.0
            low, high = sorted((self._peak_flops, again))
            self._peak_flops = high if low >= STEADY * high else None

    def measured(self, trainer: Trainer) -> dict[str, float]:
        """The `perf/*` figures so far; empty before the first measured batch."""
        if not self.durations:
            return {}
        parts = trainer.accumulate_grad_batches
        duration, samples, tokens, wait = (
            _of_a_step(values, parts) for values in (self.durations, self._samples, self._tokens, self._waits)
        )
        samples, tokens = samples / duration, tokens / duration
        figures = {
            "perf/step_ms": 1000 * duration,
            "perf/samples_per_second": samples,
            "perf/data_wait": wait / duration,
        }
        if (peak_bytes := peak_memory(trainer.strategy.root_device)) is not None:
            figures["perf/peak_memory_gib"] = peak_bytes / BYTES_PER_GIB
        if tokens:
            figures["perf/tokens_per_second"] = tokens
        if self._peak_flops:
            # A schedule of lengths cuts samples up: their cost goes by their tokens.
            whole_samples = tokens / self._tokens_per_sample if tokens and self._tokens_per_sample else samples
            mfu = whole_samples * self._flops_per_sample / (self._peak_flops * trainer.world_size)
            if mfu <= 1.0:  # more means that the peak was measured on a busy machine
                figures["perf/mfu"] = mfu
        return figures

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"samples_seen": self.samples_seen, "tokens_seen": self.tokens_seen}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.samples_seen, self.tokens_seen = state_dict["samples_seen"], state_dict["tokens_seen"]


def peak_memory(device: torch.device) -> int | None:
    """Most bytes in use so far: of a CUDA device, else of this process; None on Windows, which does not keep it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _of_a_step(values: Sequence[float], parts: int) -> float:
    """The median over optimizer steps of what their micro-batches add up to.

    Args:
        values: of each micro-batch. Any `parts` of them in a row have one optimizer step among them.
        parts: micro-batches of a step.
    """
    latest = list(values)
    ends = range(len(latest), parts - 1, -parts)
    if not ends:
        return statistics.fmean(latest) * parts
    return statistics.median(sum(latest[end - parts : end]) for end in ends)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Floating-point operations a second that a device can reach at best; None where that is unknown.

    For an NVIDIA GPU, the figure of its data sheet for dense matrices. CPU data sheets have none: there the best of
    four linear layers on 1,024 x 1,024 matrices is taken, which costs a few hundredths of a second.

    Args:
        device: of the training.
        precision: as the Trainer names it.
    """
    kinds = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    dtype = kinds.get(precision.split("-")[0], torch.float32)
    if device.type == "cuda":
        return get_available_flops(device, dtype)
    if device.type != "cpu":
        return None
    return _matmul_flops(device, dtype, SIDE)


def _matmul_flops(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Operations a second of the fastest of `REPEATS` linear layers from `side` to `side` features."""
    inputs, weight = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        torch.nn.functional.linear(inputs, weight)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return 2 * side**3 / min(times)


def bytes_per_parameter(optimizers: Sequence[Optimizer]) -> float:
    """Bytes of the weights that `optimizers` hold and of the state kept for them, per weight; gradients not counted."""
    weights = {id(p): p for o in optimizers for group in o.param_groups for p in group["params"]}
    state = [value for o in optimizers for entry in o.state.values() for value in entry.values()]
    tensors = [*weights.values(), *(value for value in state if isinstance(value, Tensor))]
    return sum(tensor.nbytes for tensor in tensors) / max(1, sum(weight.numel() for weight in weights.values()))
