"""The triton engine: its cases in the interpreter and on a device, graphs and waits."""

import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lion_lightning.optim import Lion
from lion_lightning.optim.kernels import triton as launch
from lion_lightning.optim.kernels.rule import Settings, TensorUpdate
from lion_lightning.optim.kernels.triton import TritonEngine

ROOT = Path(__file__).parents[3]
CASES = Path(__file__).with_name("triton_cases.py")
MODES = [
    (torch.float32, 32, None),
    (torch.bfloat16, 32, None),
    (torch.bfloat16, 24, None),
    (torch.bfloat16, 16, torch.int8),
]
needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")


def run(arguments: list[str], **environment: str) -> str:
    """Runs Python elsewhere, as TRITON_INTERPRET must be set or not before triton is imported; returns its output."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("TRITON_INTERPRET", "PYTEST_"))}
    inherited |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=inherited, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def run_cases(expression: str, **environment: str) -> None:
    # Without the project's addopts, so that a machine with a GPU needs no more than pytest.
    options = ["-o", "addopts=", "-p", "no:cacheprovider", "--noconftest", "--strict-markers", "-k", expression]
    output = run(["-m", "pytest", str(CASES), *options], **environment)
    assert " passed" in output
    assert " skipped" not in output


def update_like(n: int, device: str) -> TensorUpdate:
    settings = Settings(1e-3, 0.9, 0.99, 0.1, 32, False, False, True, 0, 0)
    zeros = [torch.zeros(n, device=device) for _ in range(3)]
    return TensorUpdate(*zeros, None, None, 0, 0, settings)


@pytest.mark.parametrize("expression", ["bit_for_bit", pytest.param("not bit_for_bit", marks=pytest.mark.slow)])
def test_every_case_passes_in_the_interpreter(expression: str) -> None:
    pytest.importorskip("triton")
    run_cases(expression, TRITON_INTERPRET="1")


def test_triton_is_imported_only_for_a_device_and_says_what_it_runs_on() -> None:
    code = """
import sys
from tests.optim.kernels.test_triton import update_like
from lion_lightning.optim.kernels.triton import engine
assert "triton" not in sys.modules
print(engine.objection(update_like(3, "cpu")))
"""
    pytest.importorskip("triton")
    assert "TRITON_INTERPRET=1 on a CPU, not on cpu" in run(["-c", code])


def test_it_objects_where_triton_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert TritonEngine().objection(update_like(3, "cpu")) == "triton is not installed"


def test_it_objects_to_dtypes_it_cannot_load() -> None:
    update = update_like(3, "cpu")
    update.grad = update.grad.to(torch.float8_e5m2)
    assert str(TritonEngine().objection(update)).startswith("gradients of torch.float8_e5m2 and momentum")


def test_a_scheduled_run_keeps_a_handful_of_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Device meta stands for a GPU: tables are made for it and kept as there."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, make=make, pin_memory=False, **rest: make(*args, **rest))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": 7}))
    tables, device = launch.DeviceTables(), torch.device("meta")
    made: list[weakref.ref[Any]] = []
    lasting = [bytes([number]) * 800 for number in range(6)]
    first = [tables.table(content, device) for content in lasting]
    for step in range(2_000):
        made.append(weakref.ref(tables.table(step.to_bytes(8, "little") * 15, device)))
        assert all(tables.table(content, device) is kept for content, kept in zip(lasting, first, strict=True))
    assert sum(table() is not None for table in made) <= launch.KEPT_TABLES


@pytest.mark.gpu
@needs_device
def test_every_case_passes_on_the_device() -> None:
    run_cases("")


def model(dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter((torch.randn(n, generator=generator) * 0.03).to(dtype).to(device)) for n in (7, 5000, 70_001)]


def gradient(param: Tensor, seed: int) -> Tensor:
    values = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed)) * 1e-3
    return values.to(param.dtype).to(param.device)


def assert_same_run(left: Lion, right: Lion) -> None:
    for groups in zip(left.param_groups, right.param_groups, strict=True):
        for params in zip(*(group["params"] for group in groups), strict=True):
            assert torch.equal(params[0].cpu(), params[1].cpu())
            states = left.state[params[0]], right.state[params[1]]
            assert all(torch.equal(states[0][key].cpu(), states[1][key].cpu()) for key in states[0])


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize(("dtype", "weight_bits", "momentum_dtype"), MODES)
def test_a_step_never_waits_for_the_device(dtype: torch.dtype, weight_bits: int, momentum_dtype: Any) -> None:
    params = model(dtype, "cuda")
    lr = torch.tensor(1e-3, device="cuda")
    optimizer = Lion(params, lr=lr, weight_bits=weight_bits, momentum_dtype=momentum_dtype, fused=True)
    optimizer.telemetry_every = 2
    scale, found_inf = torch.tensor(2.0, device="cuda"), torch.zeros((), device="cuda")
    grads = [[gradient(param, seed) for param in params] for seed in range(4)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step_grads in grads:
            for param, grad in zip(params, step_grads, strict=True):
                param.grad = grad  # at another address every step
            optimizer.grad_scale, optimizer.found_inf = scale, found_inf
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize(("dtype", "weight_bits", "momentum_dtype"), MODES[:2])
def test_a_captured_step_replays_with_new_gradients_and_lr(
    dtype: torch.dtype, weight_bits: int, momentum_dtype: Any
) -> None:
    params, twins = model(dtype, "cuda"), model(dtype, "cpu")
    lr = torch.tensor(1e-3, device="cuda")
    options: dict[str, Any] = dict(weight_decay=0.1, weight_bits=weight_bits, momentum_dtype=momentum_dtype)
    optimizer, reference = Lion(params, lr=lr, fused=True, **options), Lion(twins, lr=1e-3, fused=False, **options)

    def give(seed: int) -> None:
        for param, twin in zip(params, twins, strict=True):
            twin.grad = gradient(twin, seed)
            param.grad = twin.grad.cuda() if param.grad is None else param.grad.copy_(twin.grad)

    give(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    reference.step()
    for param in params:
        param.grad = torch.zeros_like(param)  # elsewhere, so that the graph needs a table of its own
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for seed in range(1, 4):
        give(seed)
        lr.fill_(1e-3 / seed)
        reference.param_groups[0]["lr"] = lr.item()
        graph.replay()
        reference.step()
    assert_same_run(optimizer, reference)


@pytest.mark.gpu
@needs_device
def test_a_captured_step_draws_new_random_bits_as_its_step_number_grows() -> None:
    step = torch.zeros((), dtype=torch.int64, device="cuda")
    settings = Settings(1e-6, 0.9, 0.99, 0.0, 16, False, False, True, 0, step)
    param, grad, exp_avg = (torch.ones(4096, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    update = TensorUpdate(param, grad, exp_avg, None, None, 0, 0, settings)
    engine, count = TritonEngine(), torch.zeros((), dtype=torch.int64, device="cuda")
    engine.step([update], count)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        engine.step([update], count)
        step += 1
    moved = []
    for _ in range(2):
        param.fill_(1.0)
        graph.replay()
        moved.append(param != 1.0)
    assert moved[0].any()
    assert not torch.equal(moved[0], moved[1])


@pytest.mark.gpu
@needs_device
def test_tables_are_copied_only_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    pinned = launch.pinned
    monkeypatch.setattr(launch, "pinned", lambda content: made.append(content.nbytes) or pinned(content))
    engine, count = TritonEngine(), torch.zeros((), dtype=torch.int64, device="cuda")
    updates = [update_like(n, "cuda") for n in (3, 5000)]
    for _ in range(3):
        engine.step(updates, count)
    assert len(made) == 3  # tensors, settings, tiles
    updates[0].grad = torch.zeros(3, device="cuda")
    engine.step(updates, count)
    assert len(made) == 4
