"""State in one piece (a file: DDP, one device) and in shards (a folder: FSDP2), and the way from one to the other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from lion_lightning.optim import layout
from lion_lightning.optim.state import scale_count
from lion_lightning.training.momentum_blocks import SavedBlocks, reblocked
from lion_lightning.training.sharded_files import META_FILE, load_sharded, read_whole, shards_of

LEVELS, SCALES = "exp_avg", "exp_avg_scale"  # of an int8 momentum


def whole_checkpoint(folder: Path) -> dict[str, Any]:
    """A sharded checkpoint as the single file that it would have been, read by this process alone.

    Raises:
        RuntimeError: see `load_sharded`.
    """
    kept, shards = read_whole(folder), shards_of(folder)
    checkpoint = torch.load(folder / META_FILE, map_location="cpu", weights_only=True)
    checkpoint["state_dict"] = kept.get("state_dict", {})
    optimizers = [name for name in kept if name.startswith("optimizer_")]
    checkpoint["optimizer_states"] = [_by_position(kept[name], shards, name) for name in _numbered(optimizers)]
    return checkpoint


def _numbered(names: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda name: int(name.rpartition("_")[2]))


def _by_position(kept: dict[str, Any], shards: dict[str, int], name: str) -> dict[str, Any]:
    """An optimizer's state by parameter names as one by positions, as `Optimizer.state_dict` has it."""
    state: dict[int, Any] = {}
    groups: list[dict[str, Any]] = []
    position = 0
    for group in kept["param_groups"]:
        positions = range(position, position + len(group["params"]))
        position = positions.stop
        for number, param in zip(positions, group["params"], strict=True):
            if param in kept["state"]:
                state[number] = _in_one_block_row(kept["state"][param], shards, f"{name}.state.{param}.{SCALES}")
        groups.append({**group, "params": list(positions)})
    return {"state": state, "param_groups": groups}


def _in_one_block_row(entry: dict[str, Any], shards: dict[str, int], name: str) -> dict[str, Any]:
    if SCALES not in entry:
        return entry
    saved = _saved_blocks(entry[LEVELS], entry[SCALES], shards[name])
    levels, scales = reblocked(entry[LEVELS].flatten(), 0, saved)
    return {**entry, LEVELS: levels.view_as(entry[LEVELS]), SCALES: scales}


def load_shards(model: nn.Module, optimizers: Sequence[Optimizer], folder: Path) -> None:
    """Load a sharded checkpoint into sharded parameters, from any number of ranks; every rank takes part."""
    weights = {"state_dict": get_model_state_dict(model)}
    load_sharded(weights, folder)
    model.load_state_dict(weights["state_dict"])
    shards = shards_of(folder)
    for number, optimizer in enumerate(optimizers):
        name = f"optimizer_{number}"
        state: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer))
        cut_elsewhere = _expect_saved_scales(state["state"], shards, name)
        load_sharded({name: state}, folder)
        for param, scales in cut_elsewhere.items():
            entry = state["state"][param]
            saved = _saved_blocks(entry[LEVELS], entry[SCALES], shards[f"{name}.state.{param}.{SCALES}"])
            entry[SCALES] = scales
            _reblock(entry, saved)
        set_optimizer_state_dict(model, optimizer, optim_state_dict=state)


def _expect_saved_scales(state: dict[str, Any], shards: dict[str, int], name: str) -> dict[str, Tensor]:
    """Ask for the scales as they were saved where the shards are others now; returns those that wait for them."""
    waiting = {}
    for param, entry in state.items():
        count = shards.get(f"{name}.state.{param}.{SCALES}")
        if SCALES in entry and count not in (None, entry[SCALES].device_mesh.size()):
            waiting[param] = entry[SCALES]
            shape = entry[LEVELS].shape
            entry[SCALES] = torch.empty(scale_count(shape, (count, *(1 for _ in shape[1:]))))
    return waiting


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
                state["state"][name] = _cut(state["state"][name], kept["state"][position])
        for group, saved in zip(state["param_groups"], kept["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        set_optimizer_state_dict(model, optimizer, optim_state_dict=state)


def _cut(entry: dict[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
    """`kept`, which is whole, sharded as `entry` is."""
    for key, value in kept.items():
        if key != SCALES:
            entry[key] = _fill(entry[key], value)
    if SCALES in kept:
        _reblock(entry, _saved_blocks(kept[LEVELS], kept[SCALES], 1))
    return entry


def _fill(target: Any, whole: Any) -> Any:
    """`target` with this rank's part of `whole` in it; what is no sharded tensor is replaced."""
    if not layout.is_sharded(target):
        return target.copy_(whole) if isinstance(target, Tensor) else whole
    shape, offsets = compute_local_shape_and_global_offset(whole.shape, target.device_mesh, target.placements)
    part = tuple(slice(offset, offset + size) for offset, size in zip(offsets, shape, strict=True))
    layout.local(target).copy_(whole[part])
    return target


def _saved_blocks(levels: Tensor, scales: Tensor, shards: int) -> SavedBlocks:
    return SavedBlocks(scales, shards, levels.shape[0], levels.numel())


def _reblock(entry: dict[str, Any], saved: SavedBlocks) -> None:
    """Make the levels of this rank's part, which are as they were saved, those of its own blocks."""
    here, scales = layout.flat(layout.local(entry[LEVELS])), layout.local(entry[SCALES])
    levels, of_blocks = reblocked(here.cpu(), layout.element_offset(entry[LEVELS]), saved)
    here.copy_(levels)
    scales.zero_()[: of_blocks.numel()].copy_(of_blocks)
