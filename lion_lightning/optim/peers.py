"""Readers of other implementations' optimizer states: how each stores momentum and the lower bits of bf16 weights.

Layouts read off the packages themselves: lion-pytorch 0.2.5, timm 1.0.31, pytorch_optimizer 4.1.0, bitsandbytes 0.50.2
(and the 2,048-element blocks of its releases before 0.44), DeepSpeed 0.19.8 (CPULion, FusedLion), optimi 0.3.3 and
FlashLion of flashoptim 0.1.4.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lion_lightning.optim import layout

Entry = Mapping[str, Any]
"""The state of one parameter, or the options of one parameter group, as a peer saved it."""

BITSANDBYTES_WRAPPER = "__bnb_optimizer_quant_state__"
BITSANDBYTES_BLOCK_ELEMENTS = (256, 2048)
FLASHLION_BLOCK_ELEMENTS = 32
SMALLEST_NORMAL_EXPONENT = -126


class Moments(NamedTuple):
    """What a reader finds for one parameter."""

    exp_avg: Tensor
    """fp32, bf16 or fp64, shaped as the parameter."""
    full_weight: Callable[[Tensor], Tensor] | None = None
    """Maps the bf16 weight to the fp32 number that the peer keeps; None where it keeps bf16 alone."""


@dataclass(frozen=True)
class Peer:
    """One implementation: the reader of a parameter's state, and what its group options mean to Lion."""

    moments: Callable[[Entry, Entry], Moments]
    """(parameter's state, its group) -> momentum and weight."""
    names: Mapping[str, str]
    """Its option names -> ours, beside lr, betas and weight_decay."""
    refused: tuple[str, ...] = ()
    """Options that have no equal here when they are set."""


def _plain(state: Entry, group: Entry) -> Moments:
    exp_avg = required(state, "exp_avg")
    return Moments(exp_avg.float() if exp_avg.dtype == torch.float16 else exp_avg)


def _deepspeed(state: Entry, group: Entry) -> Moments:
    second = state.get("exp_avg_sq")  # CPULion allocates it and leaves it alone
    if second is not None and bool(second.any()):
        raise ValueError("exp_avg_sq is not zero: this is the state of an Adam; allowed are states of Lion")
    return _plain(state, group)


def _bitsandbytes(state: Entry, group: Entry) -> Moments:
    state = {**state, **state.get(BITSANDBYTES_WRAPPER, {})}
    levels = required(state, "state1")
    if levels.dtype != torch.uint8:
        return Moments(levels)
    scales, table = required(state, "absmax1"), required(state, "qmap1")
    count = levels.numel()
    for block in BITSANDBYTES_BLOCK_ELEMENTS:
        if scales.numel() == -(-count // block):
            values = table.float()[levels.reshape(-1).long()]
            return Moments((values * per_element(scales, block, count)).view(levels.shape))
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
        exp_avg = _flashlion_momentum(required(state, "exp_avg::quantized"), required(state, "exp_avg::scales"))
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
    values = ratio / (2.0 - ratio.abs()) * per_element(scales, FLASHLION_BLOCK_ELEMENTS, levels.numel())
    return torch.empty_like(levels, dtype=torch.float32).copy_(values.as_strided(levels.shape, levels.stride()))


def per_element(scales: Tensor, block: int, count: int) -> Tensor:
    """fp32 scales, one for each of `count` elements in blocks of `block`."""
    if scales.numel() != -(-count // block):
        raise ValueError(f"{scales.numel()} scales for {count} elements; allowed is one for each {block}")
    return scales.reshape(-1).float().repeat_interleave(block)[:count]


def required(state: Entry, key: str) -> Tensor:
    """The tensor under a key; a ValueError that names what is there instead."""
    value = state.get(key)
    if not isinstance(value, Tensor):
        raise ValueError(f"key {key!r} is missing; the keys are {', '.join(map(repr, state)) or 'none'}")
    return value


PEERS: dict[str, Peer] = {
    "lion-pytorch": Peer(_plain, {}),
    "timm": Peer(_plain, {"caution": "cautious", "maximize": "maximize"}, refused=("corrected_weight_decay",)),
    "pytorch_optimizer": Peer(_plain, {"cautious": "cautious"}, refused=("fixed_decay", "use_gc", "adanorm")),
    "bitsandbytes": Peer(_bitsandbytes, {}),
    "deepspeed": Peer(_deepspeed, {}),
    "optimi": Peer(_optimi, {}),
    "flashlion": Peer(_flashlion, {}),
}


def detect(states: list[Entry], groups: list[Entry]) -> str:
    """Name of the implementation that saved these states and groups.

    Raises:
        ValueError: none that is known; names the keys seen.
    """
    keys = {key for state in states for key in state}
    options = {key for group in groups for key in group}
    signs: list[tuple[str, bool]] = [
        ("bitsandbytes", bool(keys & {BITSANDBYTES_WRAPPER, "state1"})),
        ("flashlion", "master_bytewidth" in options or "exp_avg::quantized" in keys),
        ("optimi", "kahan_sum" in options or "kahan_comp" in keys),
        ("pytorch_optimizer", "weight_decouple" in options),
        ("timm", "caution" in options),
        ("deepspeed", keys - {"exp_avg_sq"} == {"exp_avg", "step"}),
        ("lion-pytorch", keys == {"exp_avg"}),
    ]
    for name, found in signs:
        if found:
            return name
    raise ValueError(f"optimizer state with keys {sorted(keys)} is of no Lion known; allowed are {', '.join(PEERS)}")


def options(peer: str, group: Entry) -> dict[str, Any]:
    """A peer's hyper-parameters under our names.

    Raises:
        ValueError: an option is set that has no equal here; names it.
    """
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
