"""Sharded checkpoints, read without running code: torch.distributed.checkpoint trusts pickles that are checked here.

torch 2.13 reads the `.metadata` of such a folder with `pickle.load` and its non-tensor items with
`torch.load` with `weights_only` off; a folder from a stranger could run anything.
"""

import pickle
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from typing_extensions import override

META_FILE = "meta.pt"  # as in Lightning's own sharded checkpoints: what is no state of a model or an optimizer
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
            `Exception`, and passes by whoever catches those.)
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

    Raises:
        RuntimeError: see `load_sharded`.
    """
    metadata = _PlainReader(folder).read_metadata()
    flat: dict[str, Any] = {}
    for name, stored in metadata.state_dict_metadata.items():
        if part in ("", metadata.planner_data[name][0]):
            flat[name] = None
            if isinstance(stored, TensorStorageMetadata):
                flat[name] = torch.empty(stored.size, dtype=stored.properties.dtype)
    load_sharded(flat, folder, alone=True)
    whole: dict[str, Any] = {}
    for name, value in flat.items():
        _place(whole, metadata.planner_data[name], value)
    return _with_lists(whole)


def shards_of(folder: Path) -> dict[str, int]:
    """In how many parts each tensor of a sharded checkpoint was saved, by its full name."""
    stored = _PlainReader(folder).read_metadata().state_dict_metadata
    return {name: len(kept.chunks) for name, kept in stored.items() if isinstance(kept, TensorStorageMetadata)}


def _place(tree: dict[Any, Any], path: tuple[str | int, ...], value: Any) -> None:
    """Put `value` at `path` into nested dicts; positions in lists are keys too."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _with_lists(tree: Any) -> Any:
    """Nested dicts with lists again where all keys are positions."""
    if not isinstance(tree, dict) or not tree:
        return tree
    items = {key: _with_lists(value) for key, value in tree.items()}
    return [items[key] for key in sorted(items)] if all(isinstance(key, int) for key in items) else items
