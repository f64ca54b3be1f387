"""Runs what may crash or hang in a forked child, so that a test fails instead of the process that runs the tests."""

import faulthandler
import functools
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lion_lightning.optim import Lion


def in_a_fork(action: Callable[[], None], limit_seconds: float = 120.0) -> None:
    """Calls `action` in a forked child and fails if it raises, dies or does not end.

    Args:
        action: takes and returns nothing; what it changes stays in the child.
        limit_seconds: after which the child is killed.
    """
    _import_all()
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _run(action, writer)
    os.close(writer)
    status, deadline = None, time.monotonic() + limit_seconds
    while status is None:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
        elif time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reader)
            pytest.fail(f"the child process did not end within {limit_seconds:g} s")
        else:
            time.sleep(0.002)
    with os.fdopen(reader, "r", errors="replace") as pipe:
        report = pipe.read()
    if status != 0:
        cause = f"died of signal {-status}" if status < 0 else f"ended with {status}"
        pytest.fail(f"the child process {cause}\n{report}", pytrace=False)


@functools.cache
def _import_all() -> None:
    """What a first step imports and compiles, seconds of work, is there before the fork."""
    param = nn.Parameter(torch.ones(2))
    optimizer = Lion([param])
    param.square().sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())


def _run(action: Callable[[], None], writer: int) -> None:
    """The child's part; ends the process without the parent's exit handlers."""
    code = 1
    try:
        faulthandler.disable()  # a crash that a test expects is not to fill the log
        signal.signal(signal.SIGINT, signal.default_int_handler)
        action()
        code = 0
    except BaseException:
        os.write(writer, traceback.format_exc()[-8000:].encode())
    finally:
        os._exit(code)
