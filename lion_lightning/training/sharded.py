"""FSDP2 for any LightningModule, and its checkpoints: every rank writes its shard, and all of it counts at once."""

import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
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

from lion_lightning.training import rendezvous
from lion_lightning.training.checkpoint_io import (
    DurableCheckpointIO,
    Placement,
    copied_to_cpu,
    load,
    refuse_url,
    write_weights,
)
from lion_lightning.training.durable import TEMPORARY_PREFIX, link_marked, publish_folder, remove_marked, write_durably
from lion_lightning.training.plain import plain
from lion_lightning.training.sharded_files import META_FILE, load_sharded, read_whole
from lion_lightning.training.sharded_state import load_shards, load_whole_into_shards

STEPS = ("training_step", "validation_step")


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's FSDP2 strategy with all ranks in one data-parallel mesh, and with durable sharded checkpoints.

    Args:
        options: those of `ModelParallelStrategy`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=True, **options)
        self._saving_group: dist.ProcessGroup | None = None

    @override
    def setup_environment(self) -> None:
        assert self.cluster_environment is not None
        rendezvous.join(self.root_device, self._timeout)
        self._data_parallel_size = self.cluster_environment.world_size()
        super().setup_environment()
        assert self.lightning_module is not None
        shard_when_configured(self.lightning_module, self.device_mesh["data_parallel"])

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state by parameter names. Lightning also moves it to the CPU, where torch stumbles over a `torch.dtype`
        among the options, and the writer does that anyway."""
        assert self.model is not None
        return get_optimizer_state_dict(self.model, getattr(optimizer, "_optimizer", optimizer))

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """Write a folder: temporary first, renamed and marked by rank 0 when every rank has written its part.

        In the background, if the plugin says so: then the state is copied here and written while training goes on.
        """
        path, io = Path(filepath), self.checkpoint_io
        assert isinstance(io, DurableCheckpointIO)
        io.wait()
        temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
        if self.is_global_zero:
            io.attempt(lambda: _make_room(temporary))
        self.barrier()
        state = {"state_dict": checkpoint.pop("state_dict")}
        for number, optimizer_state in enumerate(checkpoint.pop("optimizer_states", [])):
            state[f"optimizer_{number}"] = optimizer_state
        writing = self._begin(state, temporary, io.background)
        meta = copied_to_cpu(plain(checkpoint)) if io.background else plain(checkpoint)

        def finish() -> None:
            _written(writing)
            if self.is_global_zero:
                _publish(meta, temporary, path, storage_options or Placement())

        io.run(finish)

    def _begin(self, state: dict[str, Any], folder: Path, background: bool) -> Future[Any]:
        """Write `state`, or copy it and begin to write it; what went wrong is in the future, on every rank."""
        if self._saving_group is None and background:
            # Of its own, since collectives of two threads in one group meet each other's.
            self._saving_group = dist.new_group(backend="gloo")
        done: Future[Any] = Future()
        try:
            if background:
                return dcp.async_save(state, checkpoint_id=folder, process_group=self._saving_group)  # type: ignore[return-value]
            done.set_result(dcp.save(state, checkpoint_id=folder))
        except (Exception, CheckpointException) as error:  # told to all ranks by who asked for the save
            done.set_exception(error)
        return done

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Load every rank's part, whatever the number of ranks that wrote it; also from a file in one piece."""
        path = Path(refuse_url(checkpoint_path))
        assert self.model is not None
        if path.is_dir():
            load_shards(self.model, self.optimizers, path)
            return torch.load(path / META_FILE, map_location="cpu", weights_only=True)
        checkpoint = load(path)
        load_whole_into_shards(self.model, self.optimizers, checkpoint)
        return {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}


def _make_room(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _written(writing: Future[Any]) -> None:
    """Wait, and turn torch's own exception, which is no `Exception`, into one."""
    try:
        writing.result()
    except CheckpointException as error:
        raise RuntimeError(str(error)) from error


def _publish(meta: dict[str, Any], temporary: Path, path: Path, placement: Placement) -> None:
    """What rank 0 does when the shards are there, in the order of `checkpoint_io.write`."""
    write_durably(temporary / META_FILE, lambda file: torch.save(meta, file))
    publish_folder(temporary, path, int(meta["global_step"]))
    if placement.weights:
        write_weights(read_whole(path, "state_dict")["state_dict"], placement.weights)
    for link in placement.links:
        link_marked(path, link)
    for old in placement.remove:
        remove_marked(old)


def shard_when_configured(module: LightningModule, mesh: DeviceMesh) -> None:
    """Give `module` the hook in which Lightning wants a model to be sharded."""
    module.configure_model = _shard_once(module, mesh)  # type: ignore[method-assign]


def _shard_once(module: LightningModule, mesh: DeviceMesh) -> Callable[[], None]:
    def configure_model() -> None:
        if not isinstance(module, FSDPModule):
            shard(module, mesh)

    return configure_model


def shard(module: LightningModule, mesh: DeviceMesh) -> None:
    """Shard each layer of each stack of layers by itself, and what is left with the module as a whole.

    The whole holds embeddings and heads, which may share weights. Its forward is never called: a step is.
    """
    for stack in [part for part in module.modules() if isinstance(part, nn.ModuleList)]:
        for layer in stack:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for name in STEPS:
        register_fsdp_forward_method(module, name)


def load_whole(module: nn.Module, path: Path) -> None:
    """Load the weights of a sharded checkpoint into a module that is not sharded, in this process alone."""
    state = {"state_dict": module.state_dict()}
    load_sharded(state, path, alone=True)
    module.load_state_dict(state["state_dict"])
