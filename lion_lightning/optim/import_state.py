"""Import of optimizer states that other Lion implementations saved.

Each implementation has a reader of its momentum and of its lower bits of bf16 weights, written from the source code of
the packages: lion-pytorch 0.2.5, timm 1.0.31, pytorch_optimizer 4.1.0, bitsandbytes 0.50.2 (and the
2,048-element blocks of its releases before 0.44), DeepSpeed 0.19.8 (CPULion, FusedLion), optimi 0.3.3 and FlashLion of
flashoptim 0.1.4.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lion_lightning.optim import layout

StateDict = Mapping[str, Any]
Entry = Mapping[str, Any]
"""The state of one parameter, or the options of one parameter group, as a peer saved it."""

BITSANDBYTES_WRAPPER = "__bnb_optimizer_quant_state__"
BITSANDBYTES_BLOCK_ELEMENTS = (256, 2048)
FLASHLION_BLOCK_ELEMENTS = 32
SMALLEST_NORMAL_EXPONENT = -126


class Moments(NamedTuple):
    """What a reader returns for one parameter."""

    exp_avg: Tensor
    """fp32, bf16 or fp64, shaped as the parameter."""
    full_weight: Callable[[Tensor], Tensor] | None = None
    """Maps the bf16 weight to the fp32 number that the peer keeps; None where it keeps bf16 alone."""


class Peer(NamedTuple):
    """One implementation: the reader of a parameter's state, and what its group options mean to Lion."""

    moments: Callable[[Entry, Entry], Moments]
    """(parameter's state, its group) -> momentum and weight."""
    names: Mapping[str, str] = {}
    """Its option names -> ours, beside lr, betas and weight_decay."""
    refused: tuple[str, ...] = ()
    """Options that Lion cannot represent; a value other than None, False or 0 is an error."""


def _plain(state: Entry, group: Entry) -> Moments:
    exp_avg = _required(state, "exp_avg")
    return Moments(exp_avg.float() if exp_avg.dtype == torch.float16 else exp_avg)


def _deepspeed(state: Entry, group: Entry) -> Moments:
    second = state.get("exp_avg_sq")  # CPULion allocates it and leaves it alone
    if second is not None and bool(second.any()):
        raise ValueError("exp_avg_sq is not zero: this is the state of an Adam; allowed are states of Lion")
    return _plain(state, group)


def _bitsandbytes(state: Entry, group: Entry) -> Moments:
    state = {**state, **state.get(BITSANDBYTES_WRAPPER, {})}
    levels = _required(state, "state1")
    if levels.dtype != torch.uint8:
        return Moments(levels)
    scales, table = _required(state, "absmax1"), _required(state, "qmap1")
    count = levels.numel()
    for block in BITSANDBYTES_BLOCK_ELEMENTS:
        if scales.numel() == -(-count // block):
            values = table.float()[levels.reshape(-1).long()]
            return Moments((values * _per_element(scales, block, count)).view(levels.shape))
    raise ValueError(f"absmax1 has {scales.numel()} elements for {count} levels; allowed is one for each 256 or 2048")


def _optimi(state: Entry, group: Entry) -> Moments:
    moments = _plain(state, group)
    compensation = state.get("kahan_comp")
    # Without Kahan summation optimi's Triton path keeps a dummy of one element.
    if compensation is None or not group.get("kahan_sum") or compensation.shape != moments.exp_avg.shape:
        return moments
    return Moments(moments.exp_avg, lambda weight: weight.float() + compensation.to(weight.device, torch.float32))


def _flashlion(state: Entry, group: Entry) -> Moments:
    exp_avg = state.get("exp_avg")
    if exp_avg is None:
        exp_avg = _flashlion_momentum(_required(state, "exp_avg::quantized"), _required(state, "exp_avg::scales"))
    errors = state.get("error_bits")
    if errors is None:
        return Moments(exp_avg)
    # Saved in the parameter's dtype: 8 bits as numbers, 16 bits as the bit pattern.
    if errors.is_floating_point():
        errors = errors.to(torch.int8) if int(group["master_bytewidth"]) == 3 else errors.view(torch.int16)
    largest = torch.iinfo(errors.dtype).max

    def full_weight(weight: Tensor) -> Tensor:
        exponent = torch.frexp(weight.float()).exponent - 1
        half_spacing = torch.exp2((exponent.clamp(min=SMALLEST_NORMAL_EXPONENT) - 8).double())
        return (weight.double() + errors.to(weight.device).double() / largest * half_spacing).float()

    return Moments(exp_avg, full_weight)


def _flashlion_momentum(levels: Tensor, scales: Tensor) -> Tensor:
    """Softsign levels in blocks of 32 in memory order; fp16 scales, saved as bf16 bit patterns beside bf16 weights."""
    if scales.dtype == torch.bfloat16:
        scales = scales.view(torch.float16)
    ratio = layout.flat(levels).float() / 127.0
    values = ratio / (2.0 - ratio.abs()) * _per_element(scales, FLASHLION_BLOCK_ELEMENTS, levels.numel())
    return torch.empty_like(levels, dtype=torch.float32).copy_(values.as_strided(levels.shape, levels.stride()))


def _per_element(scales: Tensor, block: int, count: int) -> Tensor:
    """Expands the scales of blocks to one fp32 scale per element: shape (count,)."""
    if scales.numel() != -(-count // block):
        raise ValueError(f"{scales.numel()} scales for {count} elements; allowed is one for each {block}")
    return scales.reshape(-1).float().repeat_interleave(block)[:count]


def _required(state: Entry, key: str) -> Tensor:
    """The tensor under a key; raises a ValueError that names the keys if there is none."""
    value = state.get(key)
    if not isinstance(value, Tensor):
        raise ValueError(f"key {key!r} is missing; the keys are {', '.join(map(repr, state)) or 'none'}")
    return value


PEERS: dict[str, Peer] = {
    "lion-pytorch": Peer(_plain),
    "timm": Peer(_plain, {"caution": "cautious", "maximize": "maximize"}, refused=("corrected_weight_decay",)),
    "pytorch_optimizer": Peer(_plain, {"cautious": "cautious"}, refused=("fixed_decay", "use_gc", "adanorm")),
    "bitsandbytes": Peer(_bitsandbytes),
    "deepspeed": Peer(_deepspeed),
    "optimi": Peer(_optimi),
    "flashlion": Peer(_flashlion),
}


def source_of(state_dict: StateDict) -> str:
    """Which of `SOURCES` saved an optimizer state.

    Raises:
        ValueError: none that is known; names the keys seen.
    """
    groups = state_dict["param_groups"]
    keys = {key for entry in state_dict["state"].values() if isinstance(entry, Mapping) for key in entry}
    options = {key for group in groups for key in group}
    signs: list[tuple[str, bool]] = [
        ("lion_lightning", "weight_bits" in options),
        ("bitsandbytes", bool(keys & {BITSANDBYTES_WRAPPER, "state1"})),
        ("flashlion", "master_bytewidth" in options or "exp_avg::quantized" in keys),
        ("optimi", "kahan_sum" in options or "kahan_comp" in keys),
        ("pytorch_optimizer", "weight_decouple" in options),
        ("timm", "caution" in options),
        ("deepspeed", keys - {"exp_avg_sq"} == {"exp_avg", "step"}),
        ("lion-pytorch", keys == {"exp_avg"}),
    ]
    for name, is_found in signs:
        if is_found:
            return name
    raise ValueError(f"optimizer state with keys {sorted(keys)} is of no Lion known; allowed are {', '.join(PEERS)}")


def _translated_options(peer: str, group: Entry) -> dict[str, Any]:
    """A peer's hyper-parameters under the names of Lion's options; raises a ValueError for those Lion does not have."""
    refused = [name for name in PEERS[peer].refused if group.get(name)]
    if group.get("weight_decouple") is False and group.get("weight_decay"):
        refused.append("weight_decouple")
    if refused:
        given = ", ".join(f"{name}={group[name]!r}" for name in refused)
        raise ValueError(f"{peer} option {given} has no equal here: import with hyperparameters=False and set your own")
    renamed = {ours: group[theirs] for theirs, ours in PEERS[peer].names.items() if theirs in group}
    kept = {name: group[name] for name in ("lr", "weight_decay", "initial_lr", "param_names") if name in group}
    betas = group["betas"] if "betas" in group else (group.get("beta1"), group.get("beta2"))
    if group.get("decouple_lr") and group.get("max_lr"):  # optimi: the decay is lr / max_lr * weight_decay
        kept["weight_decay"] = group["weight_decay"] / group["max_lr"]
    return {**kept, **renamed, **({"betas": tuple(betas)} if betas[0] is not None else {})}


SOURCES = (*PEERS, "lion_lightning")
OTHER_OPTIONS = {
    *("eps", "amsgrad", "momentum", "dampening", "nesterov", "alpha", "centered", "momentum_decay", "lr_decay"),
    *("lambd", "t0", "rho", "etas", "step_sizes", "beta2_decay", "ns_steps", "max_iter"),
}
"""Options of optimizers in torch.optim that no Lion has."""
CONTAINERS = ("optimizer_states", "optimizer_state_dict", "optimizer", "optim")
"""Keys under which checkpoints of Lightning and of plain loops keep an optimizer's state."""


def read(path: str | os.PathLike[str]) -> Any:
    """Reads a local file of torch.save with tensors and plain containers only (`weights_only=True`), to the CPU.

    Raises:
        ValueError: the path is a URL, there is no file, or it contains anything else.
    """
    if "://" in str(path) or not Path(path).is_file():
        reason = "use a local file; nothing is downloaded" if "://" in str(path) else "there is no such file"
        raise ValueError(f"path={str(path)!r} is not allowed: {reason}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises almost anything at a broken file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"path={str(path)!r} is not a file of tensors and plain containers: {reason}") from error


def optimizer_state(checkpoint: StateDict) -> StateDict:
    """The optimizer's state in a checkpoint: the checkpoint itself, or the value of one of the keys in `CONTAINERS`.

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


def check_structure(state_dict: Any) -> None:
    """Refuses what is no state dict of a torch optimizer.

    Raises:
        ValueError: names what was found and what is allowed.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        found = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise ValueError(f"state_dict is {found}, which is not allowed: use a dict of 'state' and 'param_groups'")
    states, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(states, Mapping):
        raise ValueError(f"state is a {type(states).__name__}, which is not allowed: use a dict")
    for group in groups if isinstance(groups, Sequence) else [groups]:
        if not isinstance(group, Mapping) or not isinstance(groups, Sequence):
            raise ValueError(f"param_groups has a {type(group).__name__}, which is not allowed: use a list of dicts")
        params = group.get("params")
        if not isinstance(params, Sequence) or len(set(params)) != len(params):
            raise ValueError(f"params={params!r} of a group is not allowed: use a list of different names or numbers")


def check_loadable(state_dict: Any) -> None:
    """Refuses what `Lion.load_state_dict` cannot load, or could load only with another meaning.

    Raises:
        ValueError: this is no state dict, or the state dict of another optimizer; names the way to convert it.
    """
    check_structure(state_dict)
    states, groups = state_dict["state"], state_dict["param_groups"]
    tensors = {key for entry in states.values() if isinstance(entry, Mapping) for key in entry}
    options = sorted(OTHER_OPTIONS & {key for group in groups for key in group})
    try:
        source = source_of(state_dict)
    except ValueError:
        source = ""
    if source == "lion_lightning":
        return
    if (options and source in ("", "deepspeed")) or (not source and not tensors <= {"exp_avg", "weight_remainder"}):
        raise ValueError(
            f"state_dict is not of a Lion (options {options}, state {sorted(tensors)}), and a Lion cannot continue "
            "from it: begin with a fresh state, with lr and weight_decay from lion_lightning.from_adamw. States of "
            "other Lions are converted by lion_lightning.optim.import_state"
        )
    if not source:
        return
    lost = []
    for group in groups:
        try:
            _translated_options(source, group)
        except ValueError as error:  # an option that Lion does not have
            lost.append(str(error))
        lost += [name for name, ours in PEERS[source].names.items() if name != ours and group.get(name)]
    if lost or PEERS[source].moments is not _plain or not tensors <= {"exp_avg"}:
        raise ValueError(
            f"state_dict is of {source}{''.join(f', with {option}' for option in lost)}: load it by "
            "lion_lightning.optim.import_state.import_state(state_dict, optimizer), or convert the file by "
            "`lion-convert IN OUT`"
        )


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
        weights: the parameters in the order of the optimizer; needed for bf16 weights with a compensation. With None,
            shapes are not checked.
        source: one of `SOURCES`; None detects it.
        hyperparameters: whether lr, betas, weight_decay and the like are taken over.
        drop_compensation: whether the bits that a peer keeps of a weight beyond bf16 are left out.

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
        options = _translated_options(source, group) if hyperparameters else {}
        steps = max(int(entry.get("step", 0)) for entry in (group, *entries))  # 0 where the peer does not count
        groups.append({**options, "step": steps, "params": list(group["params"])})
    return {"state": state, "param_groups": groups}


def import_state(
    state: StateDict | str | os.PathLike[str],
    optimizer: Optimizer,
    source: str | None = None,
    *,
    hyperparameters: bool = True,
) -> str:
    """Loads the optimizer state of another Lion, whose weights the model must hold already.

    Momentum keeps the dtype found (8-bit formats become fp32) until a step stores it in `momentum_dtype`. The lower
    bits of bf16 weights that optimi (Kahan sum) and FlashLion (error bits) keep become remainders. The parameters do
    not change. `weight_bits`, `momentum_dtype`, `nonfinite`, `seed` and `fused` stay those of the optimizer.

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
        sizes = [len(group["params"]) for group in fresh["param_groups"]]
        allowed = [len(group["params"]) for group in optimizer.param_groups]
        if sizes != allowed:
            raise ValueError(f"state has parameter groups of sizes {sizes}; allowed here are {allowed}")
        current = optimizer.state_dict()["param_groups"]
        pairs = zip(current, fresh["param_groups"], strict=True)
        fresh["param_groups"] = [{**ours, **theirs} for ours, theirs in pairs]
    optimizer.load_state_dict(fresh)
    return source


def _entry(
    source: str, entry: Entry, group: Entry, weight: Tensor | None, name: str, drop_compensation: bool
) -> dict[str, Tensor]:
    """Our state of one parameter."""
    try:
        moments = PEERS[source].moments(entry, group)
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
    # A number halfway between two bf16 numbers, of which round-half-even may have stored the lower, loses one fp32 bit.
    # All others are exact. The remainder of a number that is not finite is 0.
    stored = weight.detach()
    full = moments.full_weight(stored)
    low = full.float().view(torch.int32).to(torch.int64) - (stored.view(torch.int16).to(torch.int64) << 16)
    low = torch.where(full.isfinite() & (full.sign() * stored.sign() >= 0), low, 0)
    state["weight_remainder"] = low.clamp(-(2**15), 2**15 - 1).to(torch.int16)
    return state
