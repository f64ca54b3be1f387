"""A run that is stopped by a real signal and resumed ends where the run that was never stopped does, bit for bit.

Every case trains with the stops it names, and everything that its last checkpoint holds (weights, momentum, schedules,
warm-up, counters) and every metric are compared with those of a run without a stop, shared by cases of equal settings.
`make test` runs the first cases of each kind, the others are marked `slow`.
"""

import math
import os
import signal
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

import lion_lightning.training.run as run_module
from lion_lightning.recipes.text import text_chunks as pieces
from lion_lightning.training.checkpoint.files import load
from lion_lightning.training.signals import TrainingInterrupted

STEPS, STEPS_PER_EPOCH, VALIDATION_INTERVAL, WARMUP_STEPS, BATCH = 12, 6, 4, 5, 16
Compose = Callable[..., Any]

DIGITS = (
    "recipe=image_classification", "logger=none", "export=false", f"data.batch_size={BATCH}",
    f"data.limit_train_samples={BATCH * STEPS_PER_EPOCH}", f"trainer.max_steps={STEPS}",
    f"trainer.val_check_interval={VALIDATION_INTERVAL}",
    "model.config.num_hidden_layers=1", "model.config.hidden_size=32", "model.config.num_attention_heads=2",
    "model.config.intermediate_size=32", "model.config.hidden_dropout_prob=0.1", "trainer.log_every_n_steps=1",
    "data.source.val_fraction=0.05",  # validation takes half of the time
)  # fmt: skip
GUARD = (f"guard.warmup_steps={WARMUP_STEPS}",)
ACCUMULATED = ("trainer.accumulate_grad_batches=2", f"data.limit_train_samples={2 * BATCH * STEPS_PER_EPOCH}")
BERT = (
    "recipe=bert_mlm", "data=text_files", "data.path=PROSE", "data.sequence_length=16", "data.vocab_size=300",
    "data.val_fraction=0.5", "model=bert_tiny", "model.config.num_hidden_layers=1", "model.config.hidden_size=32",
    "model.config.intermediate_size=32", "model.config.hidden_dropout_prob=0.1",
    *(one for one in DIGITS if one.startswith(("logger", "export", "data.batch", "data.limit", "trainer."))),
)  # fmt: skip
STREAM = (
    *(setting for setting in BERT if not setting.startswith(("data=", "data.limit", "data.val_fraction"))),
    "data=streaming", "data.num_workers=0", "data.val_fraction=0.05",
)  # fmt: skip
SMALL_PIECES, SMALL_POOL = 500, 1
"""Bytes in a piece and pieces in a pool, so that a dozen steps of a stream see several pools."""


@dataclass(frozen=True)
class Case:
    """Where a run is stopped, and what kind of run it is."""

    name: str
    stops: tuple[int, ...]
    settings: tuple[str, ...] = ()
    base: tuple[str, ...] = DIGITS
    guard: tuple[str, ...] = GUARD
    in_validation: bool = False
    nan_step: int | None = None
    """Its loss is NaN, so the guard skips it."""


CASES = [
    Case("step 1", (1,)),
    Case("epoch's last batch", (STEPS_PER_EPOCH,)),
    Case("twice in one epoch, once before a validation", (7, 8)),
    Case("in validation", (4,), in_validation=True),
    Case("accumulation", (3,), ACCUMULATED),
    Case("2 workers", (5,), ("data.num_workers=2",)),
    Case("after a step that the guard skipped, before and after it knows", (7, 8), nan_step=7),
    Case("a stream, twice", (3, 7), base=STREAM),
]  # fmt: skip
CASES_OF_THE_WHOLE = [
    Case(
        "bf16, 16-bit weights, int8 momentum",
        (5,),
        ("trainer.precision=bf16-true", "optim.weight_bits=16", "optim.momentum_dtype=int8"),
    ),
    Case("in warm-up", (3,)),
    Case("before the first validation", (4,)),
    Case("epoch's first batch", (STEPS_PER_EPOCH + 1,)),
    Case("mid-epoch", (9,)),
    Case("one step before the end", (11,)),
    Case("after every step", tuple(range(1, STEPS))),
    Case("in two validations", (4, 8), in_validation=True),
    Case("accumulation, before a validation", (4,), ACCUMULATED),
    Case("accumulation, twice", (1, 7), ACCUMULATED),
    Case("accumulation, 2 workers", (5,), (*ACCUMULATED, "data.num_workers=2")),
    Case("2 workers, in validation", (8,), ("data.num_workers=2",), in_validation=True),
    Case("accumulation, after a skipped step", (7,), ACCUMULATED, nan_step=7),
    Case(
        "bf16, 16-bit weights, int8 momentum, after a skipped step",
        (7,),
        ("trainer.precision=bf16-true", "optim.weight_bits=16", "optim.momentum_dtype=int8"),
        nan_step=7,
    ),
    Case("skipped in warm-up, before a validation", (4,), nan_step=4),
    Case("no guard", (5,), guard=("guard=none",)),
    Case("bf16, 32-bit weights", (5,), ("trainer.precision=bf16-true",)),
    Case("bf16, 24-bit weights", (5,), ("trainer.precision=bf16-true", "optim.weight_bits=24")),
    Case("fp32, bf16 momentum", (5,), ("optim.momentum_dtype=bfloat16",)),
    Case("fp32, int8 momentum", (5,), ("optim.momentum_dtype=int8",)),
    Case("bf16-mixed", (5,), ("trainer.precision=bf16-mixed",)),
    Case("gradient clipping", (5,), ("trainer.gradient_clip_val=0.1",)),
    Case("AdamW", (5,), ("optim=adamw",)),
    Case("SIGNUM", (5,), ("optim=signum",)),
    Case("Adafactor", (5,), ("optim=adafactor",)),
    Case("SGD", (5,), ("optim=sgd",)),
    Case("Muon", (5,), ("optim=muon",)),
    Case("saved after every step", (5, 8), ("checkpoint.every_n_steps=1",)),
    Case("BERT, mid-epoch", (5,), base=BERT),
    Case("BERT, before a validation", (8,), base=BERT),
    Case("BERT, in validation", (8,), base=BERT, in_validation=True),
    Case("a stream, after every step", tuple(range(1, STEPS)), base=STREAM),
    Case("a stream, in validation", (8,), base=STREAM, in_validation=True),
    Case("a stream, 2 workers", (5,), ("data.num_workers=2",), base=STREAM),
    Case("a stream, accumulation, before a validation", (4,), ("trainer.accumulate_grad_batches=2",), base=STREAM),
    Case("a stream, after a skipped step", (7,), base=STREAM, nan_step=7),
]


class Recorder(Callback):
    """Keeps every metric of every step, spoils the loss of a step, and stops the run by a signal to this process."""

    def __init__(self, case: Case, stops: set[int]) -> None:
        self.stops, self.in_validation, self.nan_step = stops, case.in_validation, case.nan_step
        self.metrics: dict[tuple[str, int], dict[str, float]] = {}

    def on_fit_start(self, trainer: Trainer, module: Any) -> None:
        honest = module.training_step
        module.training_step = lambda *arguments: honest(*arguments) * self._spoiled(trainer.global_step + 1)

    def _spoiled(self, step: int) -> float:
        return math.nan if step == self.nan_step else 1.0

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        key = ("train", trainer.fit_loop.total_batch_idx)
        self.metrics[key] = {"loss": float(outputs["loss"]), "first sample": int(batch["sample"][0])}
        step_is_done = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if step_is_done and not self.in_validation:
            self._stop_at(trainer.global_step)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.in_validation:
            self._stop_at(trainer.global_step)

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        shown = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        self.metrics["validation", trainer.global_step] = shown

    def _stop_at(self, step: int) -> None:
        if step in self.stops:
            self.stops.discard(step)
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def train(
    compose: Compose, prose: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[dict[str, Any], dict[tuple[str, int], dict[str, float]]]]:
    """Train a case to its end, with its stops or without, and return the last checkpoint and all metrics."""
    build = run_module.progress
    monkeypatch.setattr(pieces, "CHUNK_BYTES", SMALL_PIECES)
    monkeypatch.setattr(pieces.FileChunks, "chunks_per_pool", SMALL_POOL)

    def trained(case: Case, folder: Path, stops: set[int]) -> tuple[dict[str, Any], dict[Any, Any]]:
        recorder = Recorder(case, set(stops))
        monkeypatch.setattr(run_module, "progress", lambda *arguments: [recorder, *build(*arguments)])
        settings = [setting.replace("PROSE", str(prose)) for setting in (*case.base, *case.guard, *case.settings)]
        for _ in stops:
            with pytest.raises(TrainingInterrupted) as stopped:
                run_module.run(compose(*settings, f"run_dir={folder}", "resume=auto"))
            assert stopped.value.code == 143
        run_module.run(compose(*settings, f"run_dir={folder}", "resume=auto"))
        assert not recorder.stops, "a stop was never reached"
        return load(folder / "checkpoints/last.ckpt"), recorder.metrics

    return trained


@pytest.fixture(scope="module")
def uninterrupted() -> dict[Any, Any]:
    """The last checkpoint and all metrics of runs without a stop, by their settings."""
    return {}


def events(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    return checkpoint["callbacks"].get("LionGuard", {"events": []})["events"]


def comparable(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """`checkpoint` without what says nothing about the run."""
    # How many validation batches were ever begun; one that a stop cut off was begun twice.
    del checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["total"]
    for optimizer in checkpoint["optimizer_states"]:
        for group in optimizer["param_groups"]:
            group.pop("differentiable", None)  # torch adds this option, False, whenever it loads a state
    return checkpoint


def differences(left: Any, right: Any, where: str = "") -> list[str]:
    """What is not the same in every bit."""
    if isinstance(left, dict) and isinstance(right, dict):
        missing = [f"{where}[{key!r}] is there once" for key in left.keys() ^ right.keys()]
        both = [key for key in left if key in right]
        return missing + [line for key in both for line in differences(left[key], right[key], f"{where}[{key!r}]")]
    if isinstance(left, list | tuple) and len(left) == len(right):
        pairs = enumerate(zip(left, right, strict=True))
        return [line for index, (one, two) in pairs for line in differences(one, two, f"{where}[{index}]")]
    if isinstance(left, torch.Tensor):
        same = left.dtype == right.dtype and left.shape == right.shape
        return [] if same and torch.equal(left, right) else [f"{where}: {left.dtype} tensors differ"]
    same = left == right or (left != left and right != right)  # NaN is no number, and the same as NaN
    return [] if type(left) is type(right) and same else [f"{where}: {left!r} != {right!r}"]


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in CASES_OF_THE_WHOLE)],
    ids=lambda case: case.name,
)
def test_a_resumed_run_equals_the_uninterrupted_one_in_every_bit(
    train: Callable[..., Any], tmp_path: Path, uninterrupted: dict[Any, Any], case: Case
) -> None:
    settings = (case.base, case.guard, case.settings, case.nan_step)
    if settings not in uninterrupted:
        uninterrupted[settings] = train(case, tmp_path / "whole", set())
    whole, whole_metrics = deepcopy(uninterrupted[settings])
    parts, parts_metrics = train(case, tmp_path / "parts", set(case.stops))
    assert whole["global_step"] == parts["global_step"] == STEPS
    assert [key for key in whole_metrics if key[0] == "validation"] == [("validation", 4 * n) for n in (1, 2, 3)]
    noticed = [event["step"] for event in events(whole) if event["kind"] == "nonfinite"]
    assert noticed == [step for step in (case.nan_step,) if step]
    assert not differences(whole_metrics, parts_metrics)
    assert not differences(comparable(whole), comparable(parts))
