"""Bytes per parameter of a BERT training step, counted from the tensors of a real one: Lion beside AdamW and Adafactor.

    python scripts/bench/memory_table.py                  # BERT-large, about 12 GB of memory
    python scripts/bench/memory_table.py --model bert-base --rows lion
    python scripts/bench/memory_table.py --survival       # what of 200 steps is left in these weights, seconds

Each optimizer takes one step so that its state exists; the next is watched, and one more with gradients released.
Weights, gradients and state are the bytes of the tensors after backward; the peak is that of torch's allocator for the
device during the whole step, from its own records of every allocation, temporaries and activations included.
"""

import argparse
import gc
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adafactor, AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertForMaskedLM

from lion_lightning.optim import Lion
from lion_lightning.optim.gradient_release import release_gradients

SHAPES: dict[str, dict[str, Any]] = {
    "bert-mini": dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024),
    "bert-base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
    "bert-large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
}
TOKENS = 16
Factory = Callable[[Iterable[Tensor]], Optimizer]


@dataclass(frozen=True)
class Row:
    """Two lines of the table: an optimizer and the dtype of the weights, without and with gradient release."""

    name: str
    dtype: torch.dtype
    factory: Factory


ROWS = [
    Row("AdamW fused, fp32", torch.float32, partial(AdamW, lr=1e-4, fused=True)),
    Row("AdamW fused, bf16", torch.bfloat16, partial(AdamW, lr=1e-4, fused=True)),
    Row("Adafactor, fp32", torch.float32, partial(Adafactor, lr=1e-2)),
    Row("Adafactor, bf16", torch.bfloat16, partial(Adafactor, lr=1e-2)),
    Row("Lion, fp32", torch.float32, Lion),
    Row("Lion, fp32, int8 momentum", torch.float32, partial(Lion, momentum_dtype="int8")),
    Row("Lion, bf16 + 16 bits, bf16 momentum", torch.bfloat16, Lion),
    Row("Lion, bf16 + 8 bits, int8 momentum", torch.bfloat16, partial(Lion, weight_bits=24, momentum_dtype="int8")),
    Row("Lion, bf16 stochastic, bf16 momentum", torch.bfloat16, partial(Lion, weight_bits=16)),
    Row("Lion, bf16 stochastic, int8 momentum", torch.bfloat16, partial(Lion, weight_bits=16, momentum_dtype="int8")),
]


@dataclass(frozen=True)
class Bytes:
    """Bytes per parameter of one step."""

    weights: float
    gradients: float
    state: float
    peak: float

    def cells(self) -> list[str]:
        return [f"{value:.2f}" for value in (self.weights, self.gradients, self.state, self.peak)]


def count(tensors: Iterable[Any]) -> int:
    """Bytes of the storages of tensors, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}
    return sum(storages.values())


def allocator_peak(step: Callable[[], None], device: torch.device) -> int:
    """The most bytes that torch's allocator had given out beyond those before the step, while it ran."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as records:
        step()
    results: Any = records.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(row: Row, model: nn.Module) -> tuple[Bytes, Bytes]:
    """Takes three steps and counts the second and, with gradients released, the third."""
    optimizer = row.factory(model.parameters())
    device = next(model.parameters()).device
    tokens = torch.randint(0, 30_000, (1, TOKENS), device=device)
    gradients = 0

    def step() -> None:
        nonlocal gradients
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients = count(param.grad for param in model.parameters())
        optimizer.step()
        optimizer.zero_grad()

    def counted() -> Bytes:
        weights = count([*model.parameters(), *model.buffers()])
        state = count(value for entry in optimizer.state.values() for value in entry.values())
        peak = weights + state + allocator_peak(step, device)
        elements = sum(param.numel() for param in model.parameters())
        return Bytes(weights / elements, gradients / elements, state / elements, peak / elements)

    step()
    plain = counted()
    with release_gradients(model, optimizer):
        return plain, counted()


def moved(row: Row, dtype: torch.dtype) -> float:
    """Mean way of weights from 0.02 to 0.08 in 200 steps along a constant gradient."""
    weight = nn.Parameter((0.02 + 0.06 * torch.rand(64, 128, generator=torch.Generator().manual_seed(0))).to(dtype))
    start, optimizer = weight.detach().to(torch.float32, copy=True), row.factory([weight])
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    for _ in range(200):
        weight.grad = torch.full_like(weight, 1e-3)
        optimizer.step()
    return float((weight.detach().float() - start).mean())


def print_survival() -> None:
    print("| optimizer, weights | lr | share of 200 steps realised |\n| --- | ---: | ---: |")
    for row in ROWS:
        lr = row.factory([nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"]
        print(f"| {row.name} | {lr:g} | {moved(row, row.dtype) / moved(row, torch.float32):.1%} |")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="bert-large")
    parser.add_argument("--rows", default="", help="only rows whose name contains this, whatever its case")
    parser.add_argument("--survival", action="store_true", help="only how much of the steps the weights keep")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.survival:
        print_survival()
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU"
    print(f"{options.model}, batch of 1 x {TOKENS} tokens, torch {torch.__version__}, {where}\n")
    print("| optimizer, weights | released | weights | gradients | state | peak of a step |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    model: nn.Module = BertForMaskedLM(BertConfig(**SHAPES[options.model]))
    model = model.to(device)
    for row in sorted(ROWS, key=lambda row: row.dtype.itemsize, reverse=True):
        if options.rows.lower() not in row.name.lower():
            continue
        model = model.to(row.dtype)
        for released, figures in zip(("no", "yes"), measure(row, model), strict=True):
            print(f"| {row.name} | {released} | {' | '.join(figures.cells())} |", flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
