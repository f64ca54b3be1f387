"""Joining the process group under torchrun so that a restarted run meets nothing of the one that crashed.

torchrun's agent keeps one store through all restarts, and torch (seen in 2.13) uses it without a prefix for each
attempt. So a restarted rank can read the address where another one listened before the crash, and the restart fails
(pytorch issue 135712). `TORCHELASTIC_RESTART_COUNT` is no such prefix: each machine counts for itself.
"""

import atexit
import os
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

POLL_SECONDS = 0.01


def join(device: torch.device, timeout: timedelta | None) -> None:
    """Make the process group by a store that only the ranks of this attempt know.

    Does nothing where torchrun's store is not used, or a group is there already: Lightning then makes it, or keeps it.

    Args:
        device: of this rank; its default backend is taken.
        timeout: so long a rank waits for another one, here and in every later collective; None for torch's default.

    Raises:
        torch.distributed.DistStoreError: another rank has not come in time.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    timeout = timeout or default_pg_timeout
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    backend = dist.get_default_backend_for_device(device)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(agree(store, rank, world_size, timeout), store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    if backend == "nccl":
        atexit.register(_leave)


def agree(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that all ranks of this attempt return and no earlier attempt has had.

    Each rank asks under a name of its own, so an answer to it is new; rank 0 answers whatever it finds, old questions
    too, until every rank has thanked it for the name it made.
    """
    if rank == 0:
        return _answer(store, world_size, timeout)
    question = uuid.uuid4().hex
    store.set(f"question/{rank}", question)
    store.wait([f"answer/{question}"], timeout)
    attempt = store.get(f"answer/{question}").decode()
    store.set(f"thanks/{attempt}/{rank}", "")
    return attempt


def _answer(store: dist.Store, world_size: int, timeout: timedelta) -> str:
    attempt, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    waiting = set(range(1, world_size))
    while waiting:
        for rank in sorted(waiting):
            if store.check([f"question/{rank}"]):
                store.set(f"answer/{store.get(f'question/{rank}').decode()}", attempt)
        waiting = {rank for rank in waiting if not store.check([f"thanks/{attempt}/{rank}"])}
        if waiting and time.monotonic() > deadline:
            raise dist.DistStoreError(
                f"after {timeout} these ranks had not come: {', '.join(map(str, sorted(waiting)))}"
            )
        time.sleep(POLL_SECONDS if waiting else 0)
    return attempt


def _leave() -> None:
    """NCCL warns of a group that nobody took down."""
    if dist.is_initialized():
        dist.destroy_process_group()
