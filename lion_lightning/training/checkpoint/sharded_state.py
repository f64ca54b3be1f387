"""State in shards (the folder that FSDP2 writes) and in one piece (a file: DDP, one device), and the ways between them.

The folders are read without running code. torch 2.13 reads the `.metadata` of such a folder with `pickle.load` and its
non-tensor items with `torch.load` with `weights_only` off, so a folder from a stranger could run anything; here both
are restricted.
"""

import itertools
import pickle
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import distribute_tensor
from torch.optim import Optimizer
from typing_extensions import override

from lion_lightning.optim import layout
from lion_lightning.optim.kernels import storage_formats

META_FILE = "meta.pt"  # as in Lightning's own sharded checkpoints: everything but models and optimizers
LEVELS, SCALES = "exp_avg", "exp_avg_scale"  # of an int8 momentum
_METADATA, _FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_ALLOWED = {
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    (_FILES, "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
    ("pathlib._local", "PosixPath"),  # of Python 3.13
}


class _PlainUnpickler(pickle.Unpickler):
    @override
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in the metadata of a checkpoint")


class _PlainReader(FileSystemReader):
    @override
    def read_metadata(self, *arguments: Any, **options: Any) -> Metadata:
        with open(self._get_metadata_path(options.get("rank")), "rb") as file:
            _PlainUnpickler(file).load()
        return super().read_metadata(*arguments, **options)


class _PlainPlanner(DefaultLoadPlanner):
    @override
    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


def load_sharded(state: dict[str, Any], folder: Path, alone: bool = False) -> None:
    """Fill the tensors of `state`, sharded or whole, from a sharded checkpoint, and replace its other values.

    Args:
        state: what to load, by the names it was saved under.
        folder: the checkpoint; from any number of ranks.
        alone: whether this process loads by itself; else every rank takes part.

    Raises:
        RuntimeError: it cannot be loaded, or holds more than tensors and plain values. (torch's own exception is no
            subclass of `Exception`.)
    """
    if alone:
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    try:
        dcp.load(state, storage_reader=_PlainReader(folder), planner=_PlainPlanner(), no_dist=alone)
    except CheckpointException as error:
        told = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
        raise RuntimeError(f"{folder} cannot be loaded: {told}") from error


def read_whole(folder: Path, part: str = "") -> dict[str, Any]:
    """What a sharded checkpoint holds, in one piece on the CPU, by this process alone and without a model.

    Args:
        folder: the checkpoint; from any number of ranks.
        part: one of the parts it was saved in; else all of them.
    """
    metadata = _PlainReader(folder).read_metadata()
    flat: dict[str, Any] = {
        name: torch.empty(kept.size, dtype=kept.properties.dtype) if isinstance(kept, TensorStorageMetadata) else None
        for name, kept in metadata.state_dict_metadata.items()
        if part in ("", metadata.planner_data[name][0])
    }
    load_sharded(flat, folder, alone=True)
    whole: dict[Any, Any] = {}
    for name, value in flat.items():
        tree, path = whole, metadata.planner_data[name]
        for key in path[:-1]:
            tree = tree.setdefault(key, {})
        tree[path[-1]] = value
    return _with_lists(whole)


def _with_lists(tree: Any) -> Any:
    """Nested dicts with lists again where all keys are positions."""
    if not isinstance(tree, dict) or not tree:
        return tree
    items = {key: _with_lists(value) for key, value in tree.items()}
    return [items[key] for key in sorted(items)] if all(isinstance(key, int) for key in items) else items


def whole_checkpoint(folder: Path) -> dict[str, Any]:
    """A sharded checkpoint as the single file that it would have been, read by this process alone."""
    kept, shards = read_whole(folder), _shards_of(folder)
    checkpoint = torch.load(folder / META_FILE, map_location="cpu", weights_only=True)
    checkpoint["state_dict"] = kept.get("state_dict", {})
    names = sorted((name for name in kept if name.startswith("optimizer_")), key=lambda name: int(name[10:]))
    checkpoint["optimizer_states"] = [_by_position(kept[name], shards, name) for name in names]
    return checkpoint


def _shards_of(folder: Path) -> dict[str, int]:
    """In how many parts each tensor of a sharded checkpoint was saved, by its full name."""
    stored = _PlainReader(folder).read_metadata().state_dict_metadata
    return {name: len(kept.chunks) for name, kept in stored.items() if isinstance(kept, TensorStorageMetadata)}


def _by_position(kept: dict[str, Any], shards: dict[str, int], name: str) -> dict[str, Any]:
    """An optimizer's state by parameter names as one by positions, as `Optimizer.state_dict` has it."""
    params = [param for group in kept["param_groups"] for param in group["params"]]
    state = {number: kept["state"][param] for number, param in enumerate(params) if param in kept["state"]}
    for number, entry in state.items():
        if SCALES in entry:
            levels, count = entry[LEVELS], shards[f"{name}.state.{params[number]}.{SCALES}"]
            flat, scales = reblocked(levels.flatten(), 0, levels.shape, entry[SCALES], count)
            state[number] = {**entry, LEVELS: flat.view_as(levels), SCALES: scales}
    positions = itertools.count()
    groups = [{**group, "params": [next(positions) for _ in group["params"]]} for group in kept["param_groups"]]
    return {"state": state, "param_groups": groups}


def load_shards(model: nn.Module, optimizers: Sequence[Optimizer], folder: Path) -> None:
    """Load a sharded checkpoint into sharded parameters; every rank takes part.

    Each rank reads its own shards only, except for an int8 momentum from another number of ranks: its blocks are cut
    elsewhere, and every rank reads the whole checkpoint.

    Args:
        model: sharded.
        optimizers: over its parameters.
        folder: the checkpoint; from any number of ranks.
    """
    weights = {"state_dict": get_model_state_dict(model)}
    states: dict[str, dict[str, Any]] = {
        f"optimizer_{number}": dict(get_optimizer_state_dict(model, one)) for number, one in enumerate(optimizers)
    }
    shards = _shards_of(folder)
    if any(
        shards.get(f"{name}.state.{param}.{SCALES}") not in (None, entry[SCALES].device_mesh.size())
        for name, state in states.items()
        for param, entry in state["state"].items()
        if SCALES in entry
    ):
        load_whole_into_shards(model, optimizers, whole_checkpoint(folder))
        return
    load_sharded(weights, folder)
    model.load_state_dict(weights["state_dict"])
    for optimizer, (name, state) in zip(optimizers, states.items(), strict=True):
        load_sharded({name: state}, folder)
        set_optimizer_state_dict(model, optimizer, optim_state_dict=state)


def load_whole_into_shards(model: nn.Module, optimizers: Sequence[Optimizer], checkpoint: dict[str, Any]) -> None:
    """Load a checkpoint that is in one piece into sharded parameters: each rank takes its part.

    Args:
        model: sharded.
        optimizers: over its parameters, in the order and groups of those that were saved.
        checkpoint: `state_dict` and `optimizer_states`, the latter by positions.
    """
    with torch.no_grad():
        for name, weight in get_model_state_dict(model).items():
            _fill(weight, checkpoint["state_dict"][name])
    for optimizer, kept in zip(optimizers, checkpoint["optimizer_states"], strict=True):
        state: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer))
        names = [name for group in state["param_groups"] for name in group["params"]]
        positions = [position for group in kept["param_groups"] for position in group["params"]]
        for name, position in zip(names, positions, strict=True):
            if name in state["state"]:
                _fill_entry(state["state"][name], kept["state"][position])
        for group, saved in zip(state["param_groups"], kept["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        set_optimizer_state_dict(model, optimizer, optim_state_dict=state)


def _fill_entry(entry: dict[str, Any], kept: dict[str, Any]) -> None:
    """Give a parameter's sharded state this rank's part of `kept`, which is whole."""
    entry.update({key: _fill(entry[key], value) for key, value in kept.items() if key != SCALES})
    if SCALES in kept:
        here, scales = layout.flat(layout.local(entry[LEVELS])), layout.local(entry[SCALES])
        first, shape = layout.element_offset(entry[LEVELS]), kept[LEVELS].shape
        levels, of_blocks = reblocked(here.cpu(), first, shape, kept[SCALES], 1)
        here.copy_(levels)
        scales.zero_()[: of_blocks.numel()].copy_(of_blocks)


def _fill(target: Any, whole: Any) -> Any:
    """`target` with this rank's part of `whole` in it; what is no sharded tensor is replaced."""
    if not layout.is_sharded(target):
        return target.copy_(whole) if isinstance(target, Tensor) else whole
    part = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)  # each rank cuts its own
    layout.local(target).copy_(layout.local(part))
    return target


def reblocked(levels: Tensor, first: int, shape: torch.Size, scales: Tensor, shards: int) -> tuple[Tensor, Tensor]:
    """Cut a part of an int8 momentum into blocks of its own.

    Its scales belong to blocks of 256 elements of a shard. Where every element of a new block was in one block, levels
    and scale are taken over bit for bit; a new block from two or more is rounded once more, to nearest.

    Args:
        levels: int8 (n,) on the CPU: the elements of the part, in row-major order, as they were saved.
        first: index of the first of them in the whole parameter.
        shape: of the whole parameter.
        scales: fp32 (shards * blocks of the largest shard,), as they were saved.
        shards: in how many the parameter was saved, each of ceil(rows / shards) rows, the last ones of fewer or none.

    Returns:
        int8 (n,), and fp32 scales (ceil(n / 256),).
    """
    if levels.numel() == 0:
        return levels, scales.new_empty(0)
    size = storage_formats.BLOCK_ELEMENTS
    in_shard = -(-shape[0] // shards) * (shape.numel() // shape[0])
    element = torch.arange(first, first + levels.numel())
    shard = element // in_shard
    block = shard * (scales.numel() // shards) + (element - shard * in_shard) // size
    units = storage_formats.dequantize(levels, torch.ones(-(-levels.numel() // size)))
    rounded, new_scales = storage_formats.quantize(units * scales[block], None)
    rows = torch.cat([block, block[-1:].expand(-levels.numel() % size)]).view(-1, size)
    whole = (rows == rows[:, :1]).all(1)
    kept = whole.repeat_interleave(size)[: levels.numel()]
    return torch.where(kept, levels, rounded), torch.where(whole, scales[rows[:, 0]], new_scales)
