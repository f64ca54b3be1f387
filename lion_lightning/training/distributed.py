"""Several processes that train one model: how they meet, and how their replicas are compared.

They are started from outside: torchrun, srun, submitit.
"""

import atexit
import os
import time
import uuid
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from typing_extensions import override

LAUNCHERS = ("LOCAL_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # set by launchers for their processes
POLL_SECONDS = 0.01
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MULTIPLIER = 0x100000001B3  # of the FNV hash: odd, so that the order of tensors counts


def started_by_launcher() -> bool:
    """Whether a launcher started this process as one of several."""
    return any(variable in os.environ for variable in LAUNCHERS)


class ReplicatedStrategy(DDPStrategy):
    """Lightning's DDP strategy, with a process group that survives restarts by torchrun."""

    @override
    def setup_environment(self) -> None:
        join(self.root_device, self._timeout)
        super().setup_environment()


def join(device: torch.device, timeout: timedelta | None) -> None:
    """Make the process group by a store that only the ranks of this attempt know.

    torchrun's agent keeps one store through all restarts, and torch (2.13) uses it without a prefix for each attempt. A
    restarted rank can then read the address where another one listened before the crash, and the restart fails (pytorch
    issue 135712). `TORCHELASTIC_RESTART_COUNT` cannot serve as the prefix: each machine counts for itself.

    Does nothing where torchrun's store is not used, or a group exists already: Lightning then makes it, or keeps it.

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
    if backend == "nccl":  # which warns of a group that is not destroyed
        atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)


def agree(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that all ranks of this attempt return and no earlier attempt has had.

    Each rank asks under a random name, so an answer to it is new; rank 0 answers every question, old ones too, until
    every rank has acknowledged the name of this attempt.

    Args:
        store: common to all ranks, and to earlier attempts.
        rank, world_size: of this process.
        timeout: so long rank 0 waits for the others, and they for it.
    """
    if rank != 0:
        question = uuid.uuid4().hex
        store.set(f"question/{rank}", question)
        store.wait([f"answer/{question}"], timeout)
        attempt = store.get(f"answer/{question}").decode()
        store.set(f"acknowledged/{attempt}/{rank}", "")
        return attempt
    attempt, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    waiting = set(range(1, world_size))
    while waiting:
        for other in sorted(waiting):
            if store.check([f"question/{other}"]):
                store.set(f"answer/{store.get(f'question/{other}').decode()}", attempt)
        waiting = {other for other in waiting if not store.check([f"acknowledged/{attempt}/{other}"])}
        if waiting and time.monotonic() > deadline:
            missing = ", ".join(map(str, sorted(waiting)))
            raise dist.DistStoreError(f"after {timeout} these ranks had not come: {missing}")
        time.sleep(POLL_SECONDS if waiting else 0)
    return attempt


class ReplicasDiffer(RuntimeError):
    """Ranks that should hold the same weights do not. The message names them."""


class ReplicaCheck(Callback):
    """Compares the replicas of data-parallel ranks every so many optimizer steps, by a hash; skips sharded tensors.

    Reads all weights and optimizer state once and sends 8 bytes a rank.

    Args:
        every_n_steps: optimizer steps between checks; 0 for none.

    Raises:
        ReplicasDiffer: during training, on all ranks.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self._step = 0

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step, before = trainer.global_step, self._step
        self._step = step
        if trainer.world_size == 1 or not self.every_n_steps or step == before or step % self.every_n_steps:
            return
        mine = replica_hash(trainer).view(1)
        hashes = [torch.empty_like(mine) for _ in range(trainer.world_size)]
        dist.all_gather(hashes, mine)
        values = [int(value) for value in hashes]
        if len(set(values)) > 1:
            usual = max(values, key=values.count)
            odd = ", ".join(str(rank) for rank, value in enumerate(values) if value != usual)
            raise ReplicasDiffer(
                f"after step {step} the weights or the optimizer state of rank {odd} differ from those "
                "of the other ranks; the checkpoints from before the last check are alike on all ranks"
            )


def replica_hash(trainer: Trainer) -> Tensor:
    """A hash of every bit of weights and optimizer state that is not sharded; int64 of shape ()."""
    total = torch.zeros((), dtype=torch.int64, device=trainer.strategy.root_device)
    for optimizer in trainer.optimizers:
        for param in (param for group in optimizer.param_groups for param in group["params"]):
            for tensor in (param, *(value for _, value in sorted(optimizer.state.get(param, {}).items()))):
                if isinstance(tensor, Tensor) and not hasattr(tensor, "to_local"):
                    bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
                    total = total * _MULTIPLIER + bits.sum(dtype=torch.int64).to(total.device)
    return total
