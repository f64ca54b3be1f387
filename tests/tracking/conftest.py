"""Runs made of numbers, without W&B: what the statistics and the reports are tested on."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from lion_lightning.tracking.runs import Run

EVERY = 10  # steps between the validations of a made run
SAMPLES_A_STEP = 64


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Run]:
    """`make_run("lion", 1, [3.0, 2.0])`: a finished run with these values of `metric`, a validation every 10 steps."""

    def made(
        optimizer: str = "lion",
        seed: int | None = 1,
        values: Sequence[float] = (3.0, 2.0, 1.0),
        *,
        metric: str = "val/loss",
        state: str = "finished",
        exit_code: int | None = 0,
        config: dict[str, Any] | None = None,
        rows: Sequence[dict[str, Any]] = (),
        group: str = "g",
        created: str = "2026-01-01T00:00:00Z",
        run_id: str | None = None,
        seconds_a_step: float = 0.5,
    ) -> Run:
        history: list[dict[str, Any]] = []
        for number, value in enumerate(values, 1):
            step = number * EVERY - 1
            seen = {"data/samples_seen": float((step + 1) * SAMPLES_A_STEP), "perf/step_ms": 500.0}
            history.append({"trainer/global_step": step, "perf/seconds": (step + 1) * seconds_a_step, **seen})
            history.append({"trainer/global_step": step, metric: value})
        settings = {
            "optim": {"name": optimizer, "lr": 1e-3},
            "recipe": {"name": "r", "monitor": metric, "mode": "max" if "top1" in metric else "min"},
            "data": {"name": "d", "batch_size": 64, "seed": seed},
            "trainer": {"max_steps": 40},
            **({} if seed is None else {"seed": seed}),
        }
        return Run(
            source=f"outputs/{optimizer}-{seed}",
            id=run_id or f"{optimizer}{seed}{created}",
            name=f"r-{optimizer}-s{seed}",
            group=group,
            state=state,  # type: ignore[arg-type]
            exit_code=exit_code,
            config={**settings, **(config or {})},
            history=[*history, *rows],
            created=created,
            hardware="Abacus, 2 cores",
        )

    return made
