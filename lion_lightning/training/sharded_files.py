"""Sharded checkpoints, read without running code: torch.distributed.checkpoint trusts pickles that are checked here.

torch 2.13 reads the `.metadata` of such a folder with `pickle.load` and its non-tensor items with
`torch.load` with `weights_only` off; a folder from a stranger could run anything.
"""

import pickle
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from typing_extensions import override

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
    try:
        dcp.load(state, storage_reader=_PlainReader(folder), planner=_PlainPlanner(), no_dist=alone)
    except CheckpointException as error:
        told = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
        raise RuntimeError(f"{folder} cannot be loaded: {told}") from error
