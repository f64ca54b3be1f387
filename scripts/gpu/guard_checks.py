"""The guard on a device: what it adds to a step, whether it waits, and whether its gate decides as on a CPU.

    python scripts/gpu/guard_checks.py

Needs torch alone. The guard is its StepMonitor, which the Lightning callback calls; scripts/bench/bench_guard.py
measures the whole callback in a training. Exits with 1 where a step waits or a decision differs.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for the project's modules

from lion_lightning.guard.gate import Gate
from lion_lightning.guard.lr_warmup import LinearWarmup
from lion_lightning.guard.reading import FACTS
from lion_lightning.guard.rules import Thresholds
from lion_lightning.guard.step_monitor import Losses, StepMonitor
from lion_lightning.optim import Lion
from scripts.bench.bench_measure import Arena, Clock
from scripts.bench.bench_models import MODELS
from scripts.gpu.steps import counted

GATED_STEPS = 400
OUTLIERS = {100: 50.0, 150: float("nan"), 200: float("inf"), 250: 30.0, 251: 30.0, 300: 0.0}
"""Step -> factor of its gradient norm; also of its loss, but for the last."""


def decisions(device: torch.device) -> list[tuple[float, ...]]:
    """Factor, skip and both z of a made-up run, judged on a device."""
    gate, generator = Gate(Thresholds(), skips_bad_losses=True), torch.Generator().manual_seed(0)
    norms = torch.rand(GATED_STEPS, generator=generator, dtype=torch.float64) + 1.0
    losses = torch.rand(GATED_STEPS, generator=generator, dtype=torch.float64) + 3.0
    for step, factor in OUTLIERS.items():
        norms[step] *= factor
        losses[step] *= factor or 1.0
    norms, losses = norms.to(device), losses.to(device)
    verdicts = [gate.judge(norm, loss) for norm, loss in zip(norms, losses, strict=True)]
    return [tuple(float(value) for value in (v.factor, v.skip, v.norm_z, v.loss_z)) for v in verdicts]


def compare_gates(device: torch.device) -> bool:
    """Whether the gate decides as on a CPU, and by how much its numbers differ."""
    here, there = (torch.tensor(decisions(where), dtype=torch.float64) for where in (torch.device("cpu"), device))
    same_steps = torch.equal(here[:, 1], there[:, 1]) and torch.equal(here[:, 0] != 1, there[:, 0] != 1)
    difference = (here - there).abs().nan_to_num(0.0).amax(0).tolist()
    acted = int(((here[:, 0] != 1) | (here[:, 1] != 0)).sum())
    print(f"gate: {acted} of {GATED_STEPS} steps acted on; the same on {device} as on cpu: {same_steps}")
    print("largest differences: " + ", ".join(f"{d:.1e}" for d in difference) + " (factor, skip, norm z, loss z)\n")
    return same_steps and acted > 0


@contextmanager
def waiting_is_an_error(device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def guarded(monitor: StepMonitor, loss: Tensor) -> Callable[[], None]:
    """What the callback does around a step; a reading is taken one step late."""

    def step() -> None:
        losses = Losses()
        losses.before_backward(loss, comparable=True)
        losses.add(loss, 32)
        monitor.before_step(losses, None, [0.0] * len(FACTS))
        monitor.optimizer.step()
        monitor.read()

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bert_base", choices=list(MODELS))
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    good = compare_gates(device)
    params: list[nn.Parameter] = Arena(MODELS[options.model](), device).params("fp32")
    optimizer, clock, loss = Lion(params, lr=1e-6), Clock(device), torch.ones((), device=device)
    print("The guard waits only for the event of the step before, which has completed by then.\n")
    print(f"| {options.model}, {device} | ms | launches | waits |\n| --- | ---: | ---: | ---: |", flush=True)
    for kind in ("without the guard", "with it"):
        step: Callable[[], object] = optimizer.step
        if kind == "with it":
            step = guarded(StepMonitor(optimizer, Thresholds(), LinearWarmup(0)), loss)
        for _ in range(3):
            step()
        milliseconds = statistics.median(clock(step) for _ in range(options.steps))
        counts = counted(step, device)
        print(f"| {kind} | {milliseconds:.3f} | {' | '.join(map(str, counts or ('', '')))} |", flush=True)
    try:
        with waiting_is_an_error(device):
            step()
    except RuntimeError as error:
        print(f"\na step with the guard waits: {error}")
        good = False
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
