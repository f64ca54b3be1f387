"""FSDP2 for any LightningModule, and its checkpoints: every rank writes its shard, and all of them count at once."""

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer
from typing_extensions import override

from lion_lightning.training.checkpoint import files
from lion_lightning.training.checkpoint.sharded_state import META_FILE, load_shards, load_whole_into_shards


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's FSDP2 strategy with all ranks in one data-parallel mesh, and with durable sharded checkpoints.

    Args:
        options: those of `ModelParallelStrategy`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=True, **options)

    @override
    def setup_environment(self) -> None:
        assert self.cluster_environment is not None
        self._data_parallel_size = self.cluster_environment.world_size()  # unknown when a strategy is made
        super().setup_environment()
        module, mesh = self.lightning_module, self.device_mesh["data_parallel"]
        assert module is not None

        def configure_model() -> None:
            if not isinstance(module, FSDPModule):
                shard(module, mesh)

        module.configure_model = configure_model  # type: ignore[method-assign]  # where Lightning wants it sharded

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state by parameter names. Lightning also moves it to the CPU, where torch fails on a `torch.dtype` among
        the options; the writer moves it anyway."""
        assert self.model is not None
        return get_optimizer_state_dict(self.model, getattr(optimizer, "optimizer", optimizer))

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Write a temporary folder, which rank 0 renames and marks when every rank has written its part."""
        path, io = Path(filepath), self.checkpoint_io
        assert isinstance(io, files.DurableCheckpointIO)
        temporary = path.with_name(f"{files.TEMPORARY_PREFIX}{path.name}")
        state = {"state_dict": checkpoint.pop("state_dict")}
        for number, optimizer_state in enumerate(checkpoint.pop("optimizer_states", [])):
            state[f"optimizer_{number}"] = optimizer_state

        def make_room() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

        def write_parts() -> None:
            try:
                dcp.save(state, checkpoint_id=temporary)
            except CheckpointException as error:  # is no subclass of `Exception`
                raise RuntimeError(str(error)) from error
            if self.is_global_zero:
                meta = files.plain(checkpoint)
                files.write_durably(temporary / META_FILE, lambda file: torch.save(meta, file))
                files.publish_folder(temporary, path, int(meta["global_step"]))

        if self.is_global_zero:
            io.attempt(make_room)
        self.barrier()
        io.attempt(write_parts)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Load every rank's part, whatever the number of ranks that wrote it; also from a file in one piece."""
        path = Path(files.refuse_url(checkpoint_path))
        assert self.model is not None
        assert isinstance(self.checkpoint_io, files.DurableCheckpointIO)
        self.checkpoint_io.loaded = path
        if path.is_dir():
            load_shards(self.model, self.optimizers, path)
            checkpoint = torch.load(path / META_FILE, map_location="cpu", weights_only=True)
        else:
            checkpoint = files.load(path)
            load_whole_into_shards(self.model, self.optimizers, checkpoint)
            del checkpoint["state_dict"], checkpoint["optimizer_states"]
        files.require_parts(checkpoint)
        return checkpoint


def shard(module: LightningModule, mesh: DeviceMesh) -> None:
    """Shard each layer of each stack of layers by itself, and the rest with the module as a whole.

    The whole holds embeddings and heads, which may share weights. Its forward is never called; its steps are.

    Args:
        module: not sharded yet.
        mesh: of one dimension, over which every parameter is sharded.
    """
    for stack in [part for part in module.modules() if isinstance(part, nn.ModuleList)]:
        for layer in stack:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for name in ("training_step", "validation_step"):
        register_fsdp_forward_method(module, name)
