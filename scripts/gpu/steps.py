"""Optimizer steps on a device, a row as soon as it is measured: time, share of copy bandwidth, launches, waits, replay.

    python scripts/gpu/steps.py --model bert_large
    TRITON_INTERPRET=1 python scripts/gpu/steps.py --model nano --interpreter --steps 1 --repeats 1   # to rehearse

Bytes, subjects and peers are those of scripts/bench/bench_step.py. Launches, and waits of the host for the device, are
counted by torch's profiler; a replay is that of a CUDA graph of the step.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for the modules of scripts/bench

from scripts.bench import bench_measure, bench_peers
from scripts.bench.bench_models import MODELS
from scripts.bench.bench_peers import Subject

COPIED_BYTES = 2**30
PROFILED_STEPS = 8
COLUMNS = ("optimizer", "ms", "±", "B", "GB/s", "of copy", "launches", "waits", "replay ms", "replay of copy")


class ForeachLion(Optimizer):
    """Lion in eager torch, a call for all tensors at a time: what one would write without a kernel."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params: list[Any] = group["params"]
            grads = [param.grad for param in params]
            for param in params:
                if not self.state[param]:
                    self.state[param]["exp_avg"] = torch.zeros_like(param)
            momenta = [self.state[param]["exp_avg"] for param in params]
            updates = torch._foreach_lerp(momenta, grads, 0.1)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, grads, 0.01)


def foreach_lion(params: bench_peers.Params, lr: float, decay: float) -> Optimizer:
    return ForeachLion(params, {"lr": lr, "weight_decay": decay})


def subjects(device: torch.device, only: list[str]) -> list[Subject]:
    """Ours come first: if time runs out, the last ones are missing."""
    ours = sorted(bench_peers.ours(device), key=lambda subject: "eager" in subject.name)
    plain = bench_peers.theirs("torch", "foreach Lion", lambda: foreach_lion)
    found = [*ours, *bench_peers.torch_own(), *plain, *bench_peers.peers(device)]
    return [s for s in found if not only or any(name.lower() in s.name.lower() for name in only)]


def copy_speed(device: torch.device, clock: bench_measure.Clock, elements: int) -> float:
    """GB/s of a copy on the device, bytes read and written."""
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    fastest = min(clock(lambda: target.copy_(source)) for _ in range(20))
    return 2 * source.nbytes / fastest / 1e6


def counted(work: Callable[[], Any], device: torch.device) -> tuple[float, float] | None:
    """Kernel launches of a call, and waits of the host for the device; None on a CPU."""
    if device.type != "cuda":
        return None
    work()
    found = []
    for steps in (0, PROFILED_STEPS):  # the profiler waits for the device itself
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as records:
            for _ in range(steps):
                work()
        counts = {event.key: event.count for event in records.key_averages()}
        launches = sum(count for key, count in counts.items() if "LaunchKernel" in key)
        waits = sum(count for key, count in counts.items() if "Synchronize" in key)
        found.append((launches, waits))
    return (found[1][0] - found[0][0]) / PROFILED_STEPS, (found[1][1] - found[0][1]) / PROFILED_STEPS


def replayed(work: Callable[[], Any], clock: bench_measure.Clock, device: torch.device, repeats: int) -> float | None:
    """Milliseconds of a step that is replayed from a CUDA graph, None on a CPU; the median of `repeats`."""
    if device.type != "cuda":
        return None
    replay = bench_measure.captured(work)
    return statistics.median(clock(replay) for _ in range(repeats))


def traits(subject: Subject, arena: bench_measure.Arena, repeats: int) -> tuple[Any, Any, str]:
    """Launches and waits of a step, and milliseconds of its replay, or why there is none."""
    params = arena.params(subject.dtype)
    with bench_peers.quiet():
        optimizer = subject.make(params, bench_measure.LR, bench_measure.WEIGHT_DECAY)
    counts = counted(optimizer.step, arena.device)
    if isinstance(optimizer, torch.optim.AdamW | torch.optim.Adam):
        for group in optimizer.param_groups:
            group["capturable"] = True  # torch requires it for a step captured in a graph
    try:
        return counts, replayed(optimizer.step, bench_measure.Clock(arena.device), arena.device, repeats), ""
    except RuntimeError as error:  # what cannot be captured says so in many ways
        return counts, None, f"{subject.name} cannot be captured: {' '.join(str(error).split())[:160]}"


def cells(result: bench_measure.Result, arena: bench_measure.Arena, copy: float, counts: Any, replay: Any) -> list[str]:
    gigabytes = result.bytes_moved * arena.count / 1e6  # over milliseconds that is GB/s
    speed = gigabytes / result.median
    return [
        result.subject.name,
        f"{result.median:.3f}",
        f"{result.spread:.3f}",
        f"{result.bytes_moved:.1f}",
        f"{speed:.0f}",
        f"{speed / copy:.0%}",
        *(["", ""] if counts is None else [f"{number:g}" for number in counts]),
        *(["", ""] if replay is None else [f"{replay:.3f}", f"{gigabytes / replay / copy:.0%}"]),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bert_large", choices=list(MODELS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a repeat, of which the fastest counts (3)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="optimizers whose name contains one")
    parser.add_argument("--interpreter", action="store_true", help="the Triton engine on a CPU: TRITON_INTERPRET=1")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.interpreter:
        bench_peers.engines.ENGINES["cpu"] = ("triton",)
    arena, clock = bench_measure.Arena(MODELS[options.model](), device), bench_measure.Clock(device)
    elements = COPIED_BYTES // 4 if device.type == "cuda" else 2**20
    copy = copy_speed(device, clock, elements)
    print(f"{options.model}: {arena.count / 1e6:.1f} M parameters in {len(arena.shapes)} tensors, on {device}")
    print(f"copy: {copy:.0f} GB/s (read and written)\n")
    print(f"| {' | '.join(COLUMNS)} |\n| --- |{' ---: |' * (len(COLUMNS) - 1)}", flush=True)
    remarks = []
    for subject in subjects(device, options.only):
        (result,), _ = bench_measure.run(
            [subject], arena, options.repeats, options.steps, lambda _: None, survival=False
        )
        if result.error is None:
            counts, replay, remark = traits(subject, arena, options.repeats)
            print(f"| {' | '.join(cells(result, arena, copy, counts, replay))} |", flush=True)
            remarks += [remark] if remark else []
        else:
            remarks.append(f"{subject.name}: {result.error}")
    print("", *(f"- {remark}" for remark in dict.fromkeys(remarks)), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
