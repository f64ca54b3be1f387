"""What glibc's malloc does with freed memory: kept on request, returned after preparing data."""

import ctypes
import platform
import subprocess
import sys

import pytest

from lion_lightning.data.cache import release_freed_memory
from lion_lightning.training import performance

CHURN = """
import resource, sys
import torch
from lion_lightning.training.performance import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
torch.set_num_threads(1)
def churn():
    for _ in range(20):
        torch.ones(12_000_000) + 1
churn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
churn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how):
    done = subprocess.run([sys.executable, "-c", CHURN, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc of another C library")
def test_large_tensors_are_mapped_once():
    """40 tensors of 48 MB: mapped anew each time, or a new place for one of them where the heap has moved."""
    assert 10 * page_faults("keep") < page_faults("leave")


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: pytest.fail("nothing is to be called"))
    assert not performance.keep_freed_memory()
    release_freed_memory()
