"""What the guard costs: step times with and without it, in alternating blocks of one run.

    python scripts/bench/bench_guard.py                                  # digits, vit_micro
    python scripts/bench/bench_guard.py --block-steps 4 --blocks 12 model=bert_mini  # anything that train.py takes

Prints the step of either kind, and the difference: that of the mean steps of neighbouring blocks, its median and
quartiles over all pairs. A machine's speed drifts by more than the guard costs, but little from one block to the next.
Everything else is the same: one process, one model, one optimizer. Without the guard means: none of its methods called,
none of its hooks on the optimizer. The aim: under 1 % of a step of bert_mini and of a ResNet-18 on CIFAR-10.

`--inside` profiles a run instead (cProfile) and prints the time between entering and leaving the guard's functions. On
a CPU, where nothing is asynchronous, that is what it costs, but for caches; the profiler makes it an upper bound.
"""

import argparse
import cProfile
import pstats
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from typing_extensions import override

from lion_lightning import LionGuard
from lion_lightning.__main__ import composed
from lion_lightning.guard import preflight
from lion_lightning.training.build import build_data, build_module, settle_precision

SKIPPED_BLOCKS = 2
HOOKS = ("on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end")


class AlternatingGuard(LionGuard):
    """A guard that sees every other block of steps, and the time that each step takes."""

    def __init__(self, block_steps: int) -> None:
        super().__init__(warmup_steps=0)  # off and on again, a warm-up would go up and down
        self.block_steps = block_steps
        self.times: dict[int, list[float]] = {}
        """Seconds of the steps of each block; the guard is on in the even ones."""
        self._started, self._is_attached = 0.0, True
        for name in HOOKS:
            setattr(self, name, self._alternating(getattr(self, name)))

    def _alternating(self, hook: Any) -> Any:
        def called(trainer: pl.Trainer, *arguments: Any) -> None:
            if self._is_on(trainer.global_step):
                hook(trainer, *arguments)

        return called

    def _is_on(self, step: int) -> bool:
        return step // self.block_steps % 2 == 0

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, *arguments: Any) -> None:
        now, step = time.perf_counter(), trainer.global_step
        # The step before belongs to its own block; the first of a block follows a change and is left out.
        if step >= SKIPPED_BLOCKS * self.block_steps and step % self.block_steps > 1:
            self.times.setdefault(step // self.block_steps, []).append(now - self._started)
        self._started = now
        if self._is_on(step) != self._is_attached:
            self._is_attached = not self._is_attached
            if self._is_attached:
                self.load_state_dict(self.state_dict())
                self.on_train_start(trainer, trainer.lightning_module)
            else:
                self.teardown(trainer, trainer.lightning_module, "fit")
        if self._is_attached:
            super().on_train_batch_start(trainer, *arguments)


def measure(overrides: list[str], block_steps: int = 20, blocks: int = 16) -> dict[int, list[float]]:
    """Seconds of each step by block; the guard is on in the even ones."""
    guard = AlternatingGuard(block_steps)
    _fit(overrides, block_steps * blocks, guard)
    return guard.times


def inside(overrides: list[str], steps: int) -> tuple[float, float]:
    """Seconds per step, and how many of them are spent in the guard."""
    clock = Clock(cProfile.Profile())
    _fit(overrides, steps, LionGuard(warmup_steps=0), clock)
    folder_of_guard = str(Path(preflight.__file__).parent)
    spent = 0.0
    for (file, *_), (*_, callers) in pstats.Stats(clock.profile).stats.items():  # type: ignore[attr-defined]
        if file.startswith(folder_of_guard):
            outside = [times for (caller, *_), times in callers.items() if not caller.startswith(folder_of_guard)]
            spent += sum(cumulative for _, _, _, cumulative in outside)
    return clock.seconds / (steps - clock.SKIPPED), spent / (steps - clock.SKIPPED)


class Clock(pl.Callback):
    """Profiles a run from its third step on."""

    SKIPPED = 2

    def __init__(self, profile: cProfile.Profile) -> None:
        self.profile, self.seconds = profile, 0.0

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.SKIPPED:
            self.seconds = -time.perf_counter()
            self.profile.enable()

    @override
    def on_train_end(self, *_: Any) -> None:
        self.profile.disable()
        self.seconds += time.perf_counter()


def _fit(overrides: list[str], steps: int, *callbacks: pl.Callback) -> None:
    """Train what train.py would with `overrides`, for `steps` steps and with these callbacks alone."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = composed([*overrides, f"run_dir={folder}", f"trainer.max_steps={steps}"])
        settle_precision(cfg)
        pl.seed_everything(cfg.seed, verbose=False)
        data = build_data(cfg)
        module = build_module(cfg, data)
        trainer = pl.Trainer(
            accelerator=cfg.trainer.accelerator,
            devices=1,
            precision=cfg.trainer.precision,
            accumulate_grad_batches=cfg.trainer.accumulate_grad_batches,
            max_steps=steps,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
        )
        trainer.fit(module, datamodule=data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", default=["recipe=image_classification"], help="as for train.py")
    parser.add_argument("--block-steps", type=int, default=20, help="steps of a block (default 20)")
    parser.add_argument("--blocks", type=int, default=16, help="blocks (default 16)")
    parser.add_argument("--inside", action="store_true", help="profile the guard's functions instead")
    options = parser.parse_args()
    if options.inside:
        step, spent = inside(options.overrides, options.block_steps * options.blocks)
        print(
            f"{' '.join(options.overrides)}: {1000 * step:.3f} ms a step, {1000 * spent:.3f} ms of it in the guard, ",
            end="",
        )
        print(f"{spent / step:.2%} ({torch.get_num_threads()} threads, {options.block_steps * options.blocks} steps)")
        return
    times = measure(options.overrides, options.block_steps, options.blocks)
    means = {block: 1000 * statistics.fmean(steps) for block, steps in times.items()}
    pairs = [(means[block], means[block + 1]) for block in means if block % 2 == 0 and block + 1 in means]
    on, off = (statistics.median(kind) for kind in zip(*pairs, strict=True))
    first, cost, third = statistics.quantiles([with_it - without for with_it, without in pairs], n=4)
    print(f"{' '.join(options.overrides)}: {torch.get_num_threads()} threads, {len(pairs)} pairs of blocks")
    print(f"without the guard  {off:8.3f} ms a step (median of blocks)")
    print(f"with the guard     {on:8.3f} ms a step")
    print(f"difference in a pair {cost:+.3f} ms (quartiles {first:+.3f} to {third:+.3f}), {cost / off:+.2%}")


if __name__ == "__main__":
    main()
