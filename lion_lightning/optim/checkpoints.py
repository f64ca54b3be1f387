"""Import of other Lion implementations' optimizer states; `peers.py` knows their layouts."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lion_lightning.optim import layout, peers
from lion_lightning.optim.lion import Lion
from lion_lightning.optim.precision import remainder_of

SOURCES = (*peers.PEERS, "lion_lightning")
CONTAINERS = ("optimizer_states", "optimizer_state_dict", "optimizer", "optim")
"""Keys under which checkpoints of Lightning and of plain loops keep an optimizer's state."""

StateDict = Mapping[str, Any]


def read(path: str | os.PathLike[str]) -> Any:
    """Reads a local file of torch.save that holds tensors and plain containers alone (`weights_only=True`), to the CPU.

    Raises:
        ValueError: the path is a URL, no file is there, or it holds anything else.
    """
    if "://" in str(path):
        raise ValueError(f"path={str(path)!r} is not allowed: use a local file; nothing is downloaded")
    if not Path(path).is_file():
        raise ValueError(f"path={str(path)!r} is not allowed: there is no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises almost anything at a broken file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"path={str(path)!r} is not a file of tensors and plain containers: {reason}") from error


def optimizer_state(checkpoint: StateDict) -> StateDict:
    """The optimizer's state in a checkpoint: the checkpoint itself, or what lies under one of `CONTAINERS`.

    Raises:
        ValueError: there is none, or there are several.
    """
    if isinstance(checkpoint, Mapping) and {"state", "param_groups"} <= set(checkpoint):
        return checkpoint
    for key in CONTAINERS:
        found = checkpoint.get(key) if isinstance(checkpoint, Mapping) else None
        if isinstance(found, Sequence) and len(found) > 1:
            raise ValueError(f"{key!r} holds {len(found)} optimizers: hand over the state of one")
        found = found[0] if isinstance(found, Sequence) and found else found
        if isinstance(found, Mapping) and {"state", "param_groups"} <= set(found):
            return found
    keys = sorted(map(str, checkpoint)) if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
    raise ValueError(
        f"no optimizer state ('state', 'param_groups') in {keys}; looked there and under {', '.join(CONTAINERS)}. "
        "Partitions of DeepSpeed ZeRO are to be merged first (ds_to_universal.py)"
    )


def source_of(state_dict: StateDict) -> str:
    """Which of `SOURCES` saved an optimizer state.

    Raises:
        ValueError: none of them.
    """
    groups = list(state_dict["param_groups"])
    if any("weight_bits" in group for group in groups):
        return "lion_lightning"
    return peers.detect(list(state_dict["state"].values()), groups)


def converted(
    state_dict: StateDict,
    weights: Sequence[Tensor] | None,
    source: str | None = None,
    *,
    hyperparameters: bool = True,
    drop_compensation: bool = False,
) -> dict[str, Any]:
    """A peer's optimizer state as one that `Lion.load_state_dict` takes.

    Args:
        state_dict: of the peer's optimizer; not changed.
        weights: the parameters in the order of the optimizer; needed where bf16 weights have a compensation, otherwise
            None leaves shapes unchecked.
        source: one of `SOURCES`; None detects it.
        hyperparameters: whether lr, betas, weight_decay and the like are taken over.
        drop_compensation: leaves out what a peer keeps of a weight beyond bf16.

    Returns:
        `state` and `param_groups`; bf16 weights with a compensation get a `weight_remainder` of int16.

    Raises:
        ValueError: the source is unknown, or a state does not fit; names the parameter and the key.
    """
    source = source or source_of(state_dict)
    if source not in SOURCES:
        raise ValueError(f"source={source!r} is not allowed: use one of {', '.join(SOURCES)}")
    if source == "lion_lightning":
        return dict(state_dict)
    count = sum(len(group["params"]) for group in state_dict["param_groups"])
    if weights is not None and len(weights) != count:
        raise ValueError(f"{source} state of {count} parameters does not fit {len(weights)} parameters")
    state, groups, position = {}, [], 0
    for group in state_dict["param_groups"]:
        entries = [state_dict["state"].get(key, {}) for key in group["params"]]
        for entry, key in zip(entries, group["params"], strict=True):
            if entry:
                weight = None if weights is None else weights[position]
                name = f"parameter {key!r} ({source})"
                state[key] = _entry(source, entry, group, weight, name, drop_compensation)
            position += 1
        options = peers.options(source, group) if hyperparameters else {}
        groups.append({**options, "step": _steps(entries, group), "params": list(group["params"])})
    return {"state": state, "param_groups": groups}


def import_state(
    state: StateDict | str | os.PathLike[str],
    optimizer: Lion,
    source: str | None = None,
    *,
    hyperparameters: bool = True,
) -> str:
    """Loads the optimizer state of another Lion, whose weights the model must hold already.

    Momentum is kept in the dtype found (8-bit forms become fp32) until a step stores it as `momentum_dtype` asks. What
    optimi (Kahan sum) and FlashLion (error bits) keep of a bf16 weight becomes its remainder. The parameters are left
    alone. `weight_bits`, `momentum_dtype`, `nonfinite`, `seed` and `fused` stay those of the optimizer.

    Two peers decay by an option that they do not save: lion-pytorch with `decoupled_weight_decay` and FlashLion with
    `decouple_lr`; divide weight_decay by the first lr after such an import.

    Args:
        state: `state_dict()` of the peer's optimizer, a checkpoint that contains it, or the path of a local file.
        optimizer: over the same parameters in the same order and groups.
        source: one of `SOURCES`; None detects it.
        hyperparameters: whether lr, betas, weight_decay and the like are taken over.

    Returns:
        The source.

    Raises:
        ValueError: the file, the source or a parameter's state does not fit; names what and what is allowed.
    """
    found = optimizer_state(read(state) if isinstance(state, (str, os.PathLike)) else state)
    source = source or source_of(found)
    weights = [param for group in optimizer.param_groups for param in group["params"]]
    if any(layout.is_sharded(weight) for weight in weights):
        raise ValueError("parameters of type DTensor are not allowed: import before sharding")
    fresh = converted(found, weights, source, hyperparameters=hyperparameters)
    if source != "lion_lightning":
        _check_groups(fresh["param_groups"], optimizer)
        current = optimizer.state_dict()["param_groups"]
        pairs = zip(current, fresh["param_groups"], strict=True)
        fresh["param_groups"] = [{**ours, **theirs} for ours, theirs in pairs]
    optimizer.load_state_dict(fresh)
    return source


def _entry(
    source: str, entry: peers.Entry, group: peers.Entry, weight: Tensor | None, name: str, drop_compensation: bool
) -> dict[str, Tensor]:
    """Our state of one parameter."""
    try:
        moments = peers.PEERS[source].moments(entry, group)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if weight is not None and moments.exp_avg.shape != weight.shape:
        raise ValueError(f"{name}: momentum has shape {tuple(moments.exp_avg.shape)}, not {tuple(weight.shape)}")
    state = {"exp_avg": moments.exp_avg}
    if moments.full_weight is None or drop_compensation:
        return state
    if weight is None or weight.dtype != torch.bfloat16:
        given = "no weights were given" if weight is None else f"the weight is {weight.dtype}"
        raise ValueError(f"{name}: the state compensates a bfloat16 weight, but {given}; allowed is that weight")
    full = moments.full_weight(weight.detach())
    state["weight_remainder"] = remainder_of(full, weight.detach())
    return state


def _steps(entries: Sequence[peers.Entry], group: peers.Entry) -> int:
    """Steps taken: the largest count found; 0 for peers that do not count."""
    return max(int(entry.get("step", 0)) for entry in (group, *entries))


def _check_groups(groups: Sequence[Mapping[str, Any]], optimizer: Lion) -> None:
    sizes = [len(group["params"]) for group in groups]
    allowed = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != allowed:
        raise ValueError(f"state has parameter groups of sizes {sizes}; allowed here are {allowed}")
