"""`trainer.strategy`: how many processes share the work. They are started from outside: torchrun, srun, submitit."""

import os
from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, Strategy
from omegaconf import DictConfig
from typing_extensions import override

from lion_lightning.errors import ConfigError
from lion_lightning.training import rendezvous
from lion_lightning.training.sharded import ShardedStrategy

LAUNCHERS = ("LOCAL_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # what launchers tell their processes
MULTI_PROCESS = ("ddp", "fsdp2")


class ReplicatedStrategy(DDPStrategy):
    """Lightning's DDP strategy, with a process group that survives restarts by torchrun."""

    @override
    def setup_environment(self) -> None:
        rendezvous.join(self.root_device, self._timeout)
        super().setup_environment()


def build_strategy(cfg: DictConfig) -> Strategy | str:
    """The strategy that `trainer.strategy` names; other names are Lightning's own.

    Raises:
        ConfigError: a strategy of several processes, and nothing has started them.
    """
    name = cfg.trainer.strategy
    if name not in MULTI_PROCESS:
        return name
    if not started_by_launcher():
        raise ConfigError(
            f"trainer.strategy={name}: start its processes with torchrun --standalone --nproc-per-node=N train.py ..., "
            "or with srun (scripts/slurm_train.sh)"
        )
    options: dict[str, Any] = {"timeout": timedelta(minutes=cfg.trainer.timeout_minutes)}
    if name == "ddp":
        return ReplicatedStrategy(gradient_as_bucket_view=True, **options)
    return ShardedStrategy(**options)


def started_by_launcher() -> bool:
    """Whether something outside started this process as one of several."""
    return any(variable in os.environ for variable in LAUNCHERS)
