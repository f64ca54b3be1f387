"""Interrupts steps of Lion by a timer signal at random moments and checks what is left.

    python scripts/interrupt_stress.py --interrupts 2000 --seed 1

After each interrupt no weight and no state may change any more, and the next step must equal that of a second optimizer
that was given a copy of weights and state, bit for bit. A part of the interrupts hits the first step of an optimizer,
which makes the state. Exit codes: 0 all held, 1 one did not.
"""

import argparse
import copy
import random
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from lion_lightning.optim import Lion

SIZES = (600_011, 270_000, 4_099, 17)
"""Elements of the parameters: several chunks, one, and less than one."""
FRESH_SHARE = 0.2
"""Of the interrupts, those that hit an optimizer without state."""
REST_SECONDS = 0.003
"""How long nothing may change after an interrupt."""
MODES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "fp32, int8": (torch.float32, {"momentum_dtype": "int8"}),
    "fp64": (torch.float64, {}),
    "bf16/32": (torch.bfloat16, {}),
    "bf16/24, int8": (torch.bfloat16, {"weight_bits": 24, "momentum_dtype": "int8"}),
    "bf16/16": (torch.bfloat16, {"weight_bits": 16}),
    "fp32, eager": (torch.float32, {"fused": False}),
    "bf16/24, int8, eager": (torch.bfloat16, {"weight_bits": 24, "momentum_dtype": "int8", "fused": False}),
}


class Timer:
    """Raises KeyboardInterrupt in the main thread after a while."""

    def __init__(self) -> None:
        self._armed = False
        self._before = signal.signal(signal.SIGALRM, self._on_alarm)

    def arm(self, seconds: float) -> None:
        """Starts it; `seconds` above 0."""
        self._armed = True
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def disarm(self) -> None:
        """Stops it; a signal that is on its way is ignored."""
        self._armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)

    def restore(self) -> None:
        """Puts back the handler that was there before."""
        self.disarm()
        signal.signal(signal.SIGALRM, self._before)

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        if self._armed:
            self._armed = False
            raise KeyboardInterrupt


def made(dtype: torch.dtype, options: dict[str, Any], seed: int) -> tuple[list[nn.Parameter], Lion]:
    """Parameters with gradients, and an optimizer without state."""
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter((torch.randn(size, generator=generator) * 0.03).to(dtype)) for size in SIZES]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(dtype)
    return params, Lion(params, lr=1e-3, weight_decay=0.1, **options)


def contents(params: Sequence[nn.Parameter], optimizer: Lion) -> list[Tensor]:
    """Copies of all weights and of all state."""
    state = [optimizer.state[param][key] for param in params for key in sorted(optimizer.state[param])]
    return [tensor.detach().clone() for tensor in (*params, *state)]


def alike(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether all tensors agree in every bit."""
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def next_step_is_exact(params: list[nn.Parameter], optimizer: Lion, options: dict[str, Any]) -> bool:
    """Steps the optimizer and a second one made of copies; whether both end alike."""
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    second = Lion(copies, **{**options, "fused": False})
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for twin, param in zip(copies, params, strict=True):
        twin.grad = param.grad
    optimizer.step()
    second.step()
    return alike(contents(params, optimizer), contents(copies, second))


def stress(interrupts: int, seed: int, threads: int) -> dict[str, int]:
    """Interrupts steps of every mode in turn.

    Args:
        interrupts: how many, over all modes.
        seed: of the moments and of the numbers.
        threads: of an interrupted step that is not eager; all else runs on one.

    Returns:
        Counts: interrupts that `came` within a step, what `moved` after one, and next steps that were `wrong`.
    """
    moments, counts = random.Random(seed), {"came": 0, "moved": 0, "wrong": 0}
    timer = Timer()
    try:
        for number, (dtype, options) in enumerate(MODES.values()):
            share = interrupts // len(MODES) + (number < interrupts % len(MODES))
            used = 1 if options.get("fused") is False else threads
            params, optimizer = made(dtype, options, moments.randrange(2**31))
            start = time.perf_counter()
            optimizer.step()
            optimizer.step()
            usual = (time.perf_counter() - start) / 2
            for _ in range(share):
                if moments.random() < FRESH_SHARE:
                    params, optimizer = made(dtype, options, moments.randrange(2**31))
                torch.set_num_threads(used)
                try:
                    timer.arm(1e-5 + moments.random() * usual)
                    while True:
                        optimizer.step()
                except KeyboardInterrupt:
                    pass
                timer.disarm()
                torch.set_num_threads(1)
                counts["came"] += 1
                before = contents(params, optimizer)
                time.sleep(REST_SECONDS)
                counts["moved"] += not alike(before, contents(params, optimizer))
                counts["wrong"] += not next_step_is_exact(params, optimizer, options)
    finally:
        timer.restore()
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--interrupts", type=int, default=2000, help="how many, over all modes")
    parser.add_argument("--seed", type=int, default=1, help="of the moments and the numbers")
    parser.add_argument("--threads", type=int, default=2, help="threads of a step")
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    counts = stress(arguments.interrupts, arguments.seed, arguments.threads)
    print(
        f"seed {arguments.seed}, {arguments.threads} threads: {counts['came']} interrupts, after {counts['moved']} of "
        f"which something moved, and {counts['wrong']} wrong next steps ({time.perf_counter() - start:.0f} s)"
    )
    return int(counts["came"] != arguments.interrupts or counts["moved"] > 0 or counts["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
