"""Several processes that train one model, started by torchrun, srun or submitit: the comparison of their replicas."""

import os
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

LAUNCHERS = ("LOCAL_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # set by launchers for their processes
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MULTIPLIER = 0x100000001B3  # of the FNV hash: odd, so that the order of tensors counts


def started_by_launcher() -> bool:
    """Whether a launcher started this process as one of several."""
    return any(variable in os.environ for variable in LAUNCHERS)


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
