"""Signals, threads, exits and forks around a step: nothing is left running, nothing hangs, the next step is exact."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lion_lightning.optim import Lion
from scripts.interrupt_stress import stress
from tests.forks import in_a_fork

ELEMENTS = 2_000_000
"""Several chunks: a step of them is shared among threads."""


def large(seed: int = 0) -> tuple[nn.Parameter, Lion]:
    param = nn.Parameter(torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(seed)))
    param.grad = torch.ones_like(param)
    return param, Lion([param], lr=1e-3, weight_decay=0.1)


def after(steps: int, seed: int = 0) -> Tensor:
    """The weight after this many steps on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    param, optimizer = large(seed)
    for _ in range(steps):
        optimizer.step()
    torch.set_num_threads(threads)
    return param.detach()


def test_after_an_interrupt_nothing_moves_and_the_next_step_is_exact() -> None:
    """A short form of `scripts/interrupt_stress.py`."""

    def check() -> None:
        torch.set_num_threads(2)
        assert stress(24, seed=3, threads=2) == {"came": 24, "moved": 0, "wrong": 0}

    in_a_fork(check, 120)


def test_ctrl_c_surfaces_from_a_step() -> None:
    def check() -> None:
        torch.set_num_threads(3)
        param, optimizer = large()
        optimizer.step()
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()

        def train() -> None:
            for _ in range(100_000):
                optimizer.step()

        with pytest.raises(KeyboardInterrupt):
            train()
        taken = param.detach().clone()
        time.sleep(0.02)
        assert torch.equal(param, taken)
        optimizer.step()

    in_a_fork(check)


EXIT_PROGRAM = """
import atexit, threading, time, torch
from lion_lightning.optim import Lion

torch.set_num_threads(3)
param = torch.nn.Parameter(torch.zeros(2_000_000))
param.grad = torch.ones_like(param)
optimizer = Lion([param], lr=0.5)
optimizer.step()

def late_step(where):
    for _ in range(3):
        optimizer.step()
    print(where, param.unique().tolist(), flush=True)

def other_thread():
    threading.main_thread().join()
    time.sleep(0.1)
    late_step("thread")

threading.Thread(target=other_thread).start()
atexit.register(late_step, "atexit")
"""


def test_steps_after_the_main_thread_has_ended_and_at_exit(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EXIT_PROGRAM], cwd=root, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.split("\n")[:2] == ["thread [-2.0]", "atexit [-3.5]"], done.stderr[-2000:]
    assert done.returncode == 0


def test_two_threads_step_at_the_same_time() -> None:
    def check() -> None:
        expected = [after(20, seed) for seed in (1, 2)]
        torch.set_num_threads(2)
        pairs = [large(seed) for seed in (1, 2)]
        failures: list[BaseException] = []

        def train(optimizer: Lion) -> None:
            torch.set_num_threads(2)
            try:
                for _ in range(20):
                    optimizer.step()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=train, args=(optimizer,)) for _, optimizer in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        for (param, _), exact in zip(pairs, expected, strict=True):
            assert torch.equal(param, exact)

    in_a_fork(check)


def test_a_fork_after_a_step_and_one_during_a_step_of_another_thread() -> None:
    def check() -> None:
        expected = after(4)
        torch.set_num_threads(2)
        param, optimizer = large()
        optimizer.step()
        optimizer.step()
        others = [large(seed) for seed in (1, 2)]
        stop = threading.Event()

        def train() -> None:
            while not stop.is_set():
                for _, other in others:
                    other.step()

        background = threading.Thread(target=train)
        background.start()
        try:
            for _ in range(5):
                child = os.fork()
                if child == 0:
                    code = 1
                    try:
                        optimizer.step()
                        optimizer.step()
                        torch.set_num_threads(1)  # torch's own threads do not survive a fork
                        code = 0 if torch.equal(param, expected) else 2
                    finally:
                        os._exit(code)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        finally:
            stop.set()
            background.join()
        optimizer.step()
        optimizer.step()
        assert torch.equal(param, expected)

    in_a_fork(check)


def test_more_threads_than_chunks_and_than_cores() -> None:
    def check() -> None:
        expected = after(3)
        for threads in (2, 3, 7, 64):
            torch.set_num_threads(threads)
            param, optimizer = large()
            for _ in range(3):
                optimizer.step()
            assert torch.equal(param, expected)

    in_a_fork(check)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="limits of processes as Linux has them")
def test_where_no_thread_can_be_had_the_calling_one_does_the_work() -> None:
    def check() -> None:
        import resource

        expected = after(3)
        param, optimizer = large()
        torch.set_num_threads(1)
        optimizer.step()  # makes the state, which needs memory
        torch.set_num_threads(4)
        if not os.getuid():
            os.setuid(65534)  # the limit is not for root
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        with pytest.raises(RuntimeError, match="start new thread"):
            threading.Thread(target=int).start()
        for _ in range(2):
            optimizer.step()
        torch.set_num_threads(1)  # torch itself ends the process where it finds no thread
        assert torch.equal(param, expected)

    in_a_fork(check)
