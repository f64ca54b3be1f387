"""How fast a run really goes: the median over its latest batches, without the first ones and without validation."""

import resource
import statistics
import sys
import time
from collections import deque
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor
from typing_extensions import override

from lion_lightning.training.peak_flops import peak_flops

WINDOW_BATCHES = 1000  # bounds what a median costs, however long the run
WARMUP_BATCHES = 5  # allocation, compilation and caches: not what the run will be like
BYTES_PER_GIB = 2**30


class Throughput(Callback):
    """Logs `perf/*` and how much data the run has seen.

    Under `perf/`: `step_ms` (one optimizer step), `samples_per_second`, `tokens_per_second` (over all ranks, where a
    batch has `input_ids`), `mfu` (model FLOPs utilisation: what the module's `flops_per_sample` asks for, over
    `peak_flops`; recomputed activations do not count), `data_wait` (share of the time spent waiting for a batch),
    `peak_memory_gib` (device, or the process on a CPU), `seconds` (since training began). Under `data/`:
    `samples_seen`, `tokens_seen`.
    """

    def __init__(self) -> None:
        self.samples_seen = self.tokens_seen = 0
        self._peak_flops: float | None = None
        self._flops_per_sample = self._tokens_per_sample = 0
        self._samples: deque[float] = deque(maxlen=WINDOW_BATCHES)
        self._tokens: deque[float] = deque(maxlen=WINDOW_BATCHES)
        self._waits: deque[float] = deque(maxlen=WINDOW_BATCHES)
        self.durations: deque[float] = deque(maxlen=WINDOW_BATCHES)
        """Seconds of the latest batches."""
        self._batches = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        flops = getattr(pl_module, "flops_per_sample", None)
        if flops is not None:
            self._flops_per_sample, self._tokens_per_sample = flops(), pl_module.tokens_per_sample() or 0  # type: ignore[operator]
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
        samples = extract_batch_size(batch) * trainer.world_size
        tokens = _tokens_in(batch) * trainer.world_size
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
            pl_module.log_dict({**self.measured(trainer), **self._seen(), "perf/seconds": now - self._began})

    def measured(self, trainer: Trainer) -> dict[str, float]:
        """The `perf/*` figures so far; empty before the first measured batch."""
        if not self.durations:
            return {}
        duration = statistics.median(self.durations)
        samples, tokens = (statistics.median(seen) / duration for seen in (self._samples, self._tokens))
        figures = {
            "perf/step_ms": 1000 * duration * trainer.accumulate_grad_batches,
            "perf/samples_per_second": samples,
            "perf/data_wait": statistics.median(self._waits) / duration,
            "perf/peak_memory_gib": _peak_memory_bytes(trainer.strategy.root_device) / BYTES_PER_GIB,
        }
        if tokens:
            figures["perf/tokens_per_second"] = tokens
        if self._peak_flops:
            # A schedule of lengths cuts samples up: what they cost goes by their tokens.
            whole_samples = tokens / self._tokens_per_sample if tokens and self._tokens_per_sample else samples
            figures["perf/mfu"] = whole_samples * self._flops_per_sample / (self._peak_flops * trainer.world_size)
        return figures

    def _seen(self) -> dict[str, float]:
        seen = {"data/samples_seen": float(self.samples_seen)}
        return seen | ({"data/tokens_seen": float(self.tokens_seen)} if self.tokens_seen else {})

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"samples_seen": self.samples_seen, "tokens_seen": self.tokens_seen}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.samples_seen, self.tokens_seen = state_dict["samples_seen"], state_dict["tokens_seen"]


def _tokens_in(batch: Any) -> int:
    """Tokens of a micro-batch, padding included; 0 where it has none."""
    tokens = batch.get("input_ids") if isinstance(batch, dict) else None
    return tokens.numel() if isinstance(tokens, Tensor) else 0


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes, except on macOS
