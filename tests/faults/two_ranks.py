"""One of two processes: Lightning runs over gloo, each with a fault, and what came of them as JSON."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lion_lightning import LionGuard
from lion_lightning.optim import layout
from tests.faults.injected import NaNBatch, Outlier
from tests.faults.task import Student, teacher_data

STEPS, BATCH = 60, 32
FAULTS: dict[str, Any] = {
    "nan": lambda: NaNBatch([40], rank=1),
    "outlier": lambda: Outlier(40, 1e4),
}


class ShardedStudent(Student):
    def configure_model(self) -> None:
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            if isinstance(layer, torch.nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def fsdp2() -> ModelParallelStrategy:
    return ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo", save_distributed_checkpoint=False
    )


STRATEGIES: dict[str, tuple[type[LightningModule], Any]] = {
    "ddp": (Student, lambda: DDPStrategy(process_group_backend="gloo")),
    "fsdp2": (ShardedStudent, fsdp2),
    "one": (Student, lambda: "auto"),
}


def run(strategy_name: str, fault: str, world_size: int) -> dict[str, Any]:
    seed_everything(1, verbose=False)
    module_class, make_strategy = STRATEGIES[strategy_name]
    strategy: Strategy | str = make_strategy()
    guard = LionGuard(warmup_steps=5)
    trainer = Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[FAULTS[fault](), guard],
    )
    data = TensorDataset(*teacher_data(1, STEPS * BATCH * 2))
    rank = int(os.environ.get("LOCAL_RANK", 0))
    sampler = DistributedSampler(data, world_size, rank, shuffle=False)
    module = module_class(steps=STEPS)
    trainer.fit(module, DataLoader(data, batch_size=2 * BATCH // world_size, sampler=sampler))
    weights = [_whole(param) for param in module.parameters()]
    return {
        "events": [[event.step, event.kind, event.message, event.remedy] for event in guard.events],
        "weights": [float(weight.double().sum()) for weight in weights],
        "first": weights[0].flatten()[:16].tolist(),
        "batch": guard.batch.last,
        "norms": guard.state_dict()["monitors"][0]["gate"]["norms"]["values"][:STEPS],
    }


def _whole(param: Tensor) -> Tensor:
    param = param.detach()
    return param.full_tensor() if layout.is_sharded(param) else param  # type: ignore[attr-defined]


if __name__ == "__main__":
    torch.set_num_threads(1)
    outcomes = {fault: run(sys.argv[1], fault, int(os.environ["WORLD_SIZE"])) for fault in FAULTS}
    Path(sys.argv[2]).write_text(json.dumps(outcomes))
    if dist.is_initialized():  # a thread of gloo that outlives the interpreter would end the process with an abort
        dist.barrier()
        dist.destroy_process_group()
