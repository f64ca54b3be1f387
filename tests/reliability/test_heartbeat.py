"""The heartbeat's thread is gone when training has ended: one that is still in the store aborts a Python that ends."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from lion_lightning.training import callbacks
from lion_lightning.training.callbacks import Heartbeat

TRAINER = SimpleNamespace(world_size=2, global_rank=0)
ENDS_IN_THE_STORE = """
import threading, time
import torch.distributed as dist

store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

def beat():
    while True:
        store.set("rank", "beat")

threading.Thread(target=beat, daemon=True).start()
time.sleep(0.3)
"""


class SlowStore:
    """Takes a while for a beat, as under load."""

    def __init__(self, *_: object) -> None:
        self.beats = 0

    def set(self, key: str, value: str) -> None:
        time.sleep(0.3)
        self.beats += 1


@pytest.mark.parametrize("end", ["on_train_end", "on_exception"])
def test_the_thread_has_ended_with_the_training(monkeypatch, end):
    monkeypatch.setattr(dist, "PrefixStore", SlowStore)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: None)
    beating = Heartbeat()
    beating.on_train_start(TRAINER, None)
    assert beating._thread.is_alive()
    getattr(beating, end)(TRAINER, None, *([ValueError("bad data")] if end == "on_exception" else []))
    assert not beating._thread.is_alive()
    assert beating._store.beats >= 1, "a beat under way is finished"


def test_a_store_that_hangs_does_not_keep_the_process(monkeypatch):
    monkeypatch.setattr(dist, "PrefixStore", SlowStore)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: None)
    monkeypatch.setattr(SlowStore, "set", lambda *_: time.sleep(2.0))
    monkeypatch.setattr(callbacks, "PATIENCE_SECONDS", 0.1)
    beating = Heartbeat()
    beating.on_train_start(TRAINER, None)
    began = time.monotonic()
    beating.on_train_end(TRAINER, None)
    assert time.monotonic() - began < 1.0


@pytest.mark.slow
def test_why_it_matters_a_python_that_ends_meanwhile_aborts():
    """Of torch 2.13; when this fails, torch has mended it, and nobody need wait for the thread."""
    done = subprocess.run([sys.executable, "-c", ENDS_IN_THE_STORE], capture_output=True, text=True, check=False)
    assert "terminate called without an active exception" in done.stderr
    assert done.returncode == -6
