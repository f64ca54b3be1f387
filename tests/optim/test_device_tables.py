"""Tables of the triton engine: those of a long run with a schedule take no more memory than those of a short one."""

import weakref
from typing import Any

import pytest
import torch

from lion_lightning.optim.kernels import triton


def test_a_scheduled_run_keeps_a_handful_of_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Device meta stands for a GPU: tables are made for it and kept as there."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, make=make, pin_memory=False, **rest: make(*args, **rest))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": 7}))
    tables, device = triton.DeviceTables(), torch.device("meta")
    made: list[weakref.ref[Any]] = []
    lasting = [bytes([number]) * 800 for number in range(6)]
    first = [tables.table(content, device) for content in lasting]
    for step in range(2_000):
        made.append(weakref.ref(tables.table(step.to_bytes(8, "little") * 15, device)))
        assert all(tables.table(content, device) is kept for content, kept in zip(lasting, first, strict=True))
    assert sum(table() is not None for table in made) <= triton.KEPT_TABLES
