"""Where Lion's settings come from: a conversion from AdamW's, published presets, and parameter groups.

Lion moves every weight by the same learning rate, so its rate is smaller than AdamW's and its decay larger: what a
step takes off a weight is `lr * weight_decay * weight`, and the conversion keeps that product.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lion_lightning.errors import check_number
from lion_lightning.optim import Lion

Factor: TypeAlias = Callable[[int], float]
Schedule: TypeAlias = Callable[[int], Factor]

AMOS_ALPHA_0 = 1.11e-3
BERT_BASE_SIGMA = (1 / 768) ** 0.5
# Normalisation layers of torch and of transformers alike end in one of these (LayerNorm, BatchNorm2d, LlamaRMSNorm).
_NORM_SUFFIXES = ("norm", "norm1d", "norm2d", "norm3d")
_POSITION_TABLES = ("position_embeddings", "pos_embed", "position_embedding", "wpe", "cls_token")


def from_adamw(
    lr: float, weight_decay: float = 0.01, *, factor: float | None = None, parameters: int | None = None
) -> dict[str, float]:
    """Lion's learning rate and weight decay for a run that is tuned for AdamW.

    Divides the rate and multiplies the decay by `factor`, so that their product, the strength of the decay, stays. Keep
    the schedule; if it names absolute rates, divide those too. The paper advises 3 to 10 (Chen et al., 2023,
    arXiv:2302.06675, section 5); tuned language models of known size had other factors, see `published_factor`.

    Args:
        lr: AdamW's peak learning rate, above 0.
        weight_decay: AdamW's decoupled decay, at least 0. torch's default is 0.01.
        factor: how much smaller Lion's rate is, at least 1; 10 if neither this nor `parameters` is given.
        parameters: number of the model's parameters, for the factor of `published_factor` instead.

    Returns:
        `{"lr": ..., "weight_decay": ...}`, ready for `Lion(params, **from_adamw(1e-3, 0.1))`.

    Raises:
        ValueError: a value out of range.
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if isinstance(value, str):  # YAML reads 1e-3 as a text, and 1.0e-3 as a number
            raise ValueError(f"{name} must be a number, got the text {value!r}")
        if not isinstance(value, Real):
            raise ValueError(f"{name} must be a number, got {value!r}")
    _check_positive(lr=lr)
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay must be a number of at least 0, got {weight_decay}")
    if factor is not None and parameters is not None:
        raise ValueError(f"give factor or parameters, not both: got factor={factor} and parameters={parameters}")
    if factor is None:
        factor = 10.0 if parameters is None else published_factor(parameters, lr)
    if not (math.isfinite(factor) and factor >= 1):
        raise ValueError(f"factor must be a number of at least 1 (3 to 10 are sound), got {factor}")
    return {"lr": lr / factor, "weight_decay": weight_decay * factor}


USUAL_RATE_FACTORS = ((124e6, 1.0), (210e6, 2.0), (720e6, 5.0), (1.5e9, 10.0))
LARGE_RATE_FACTORS = ((130e6, 4.0), (520e6, 8.0), (1.5e9, 10.0))
LARGE_ADAMW_RATE = 4e-3


def published_factor(parameters: int, lr: float = 1e-3) -> float:
    """AdamW's best learning rate over Lion's in published sweeps of language models, by model size.

    Beside an AdamW rate of 1e-3 Lion's was 1e-3 at 124 M parameters, 5e-4 at 210 M and 2e-4 at 720 M (Semenov et al.,
    2025, arXiv:2509.01440). Beside AdamW's 4e-3 to 8e-3 it was 4 to 8 times smaller from 130 M to 520 M (Wen et al.,
    2025, arXiv:2509.02046). 10 from 1.5 B on is the upper end of what Chen et al. (2023, arXiv:2302.06675) advise.
    Between these sizes the factor is interpolated in the logarithm; beyond them it stays.

    Args:
        parameters: of the model, above 0.
        lr: AdamW's; from 4e-3 on the second of the two sweeps counts.

    Raises:
        ValueError: a value out of range.
    """
    _check_positive(parameters=parameters, lr=lr)
    points = LARGE_RATE_FACTORS if lr >= LARGE_ADAMW_RATE else USUAL_RATE_FACTORS
    if parameters <= points[0][0]:
        return points[0][1]
    for (smaller, low), (larger, high) in itertools.pairwise(points):
        if parameters <= larger:
            return low * (high / low) ** (math.log(parameters / smaller) / math.log(larger / smaller))
    return points[-1][1]


def decay_for_timescale(lr: float, steps: float) -> float:
    """The weight decay with which weights forget over `steps`: `1 / (lr * steps)`.

    Decoupled decay makes the weights an exponential moving average of the updates, whose time scale is 1 / (lr * decay)
    steps (Wang and Aitchison, 2024, arXiv:2405.13698). Its best value is about the same share of a run over model sizes
    and batch sizes (Bergsma et al., 2025, arXiv:2505.13738), where the best decay itself is not.

    Args:
        lr: the peak learning rate, above 0.
        steps: optimizer steps of the time scale, above 0.

    Raises:
        ValueError: a value out of range.
    """
    _check_positive(lr=lr, steps=steps)
    return 1.0 / (lr * steps)


def beta_for_half_life(samples: float, batch_size: int) -> float:
    """The beta with which a momentum halves over `samples`: the same at every batch size.

    Args:
        samples: samples of the half-life, above 0.
        batch_size: samples of an optimizer step, above 0.

    Raises:
        ValueError: a value out of range.
    """
    _check_positive(samples=samples, batch_size=batch_size)
    return 0.5 ** (batch_size / samples)


def for_batch_size(options: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    """Settings for another batch size: the same training, by the square-root rule, over the same samples.

    The rate grows with the square root of the batch and `1 - beta` with the batch, as the SDE limit of Adam demands
    (Malladi et al., 2022, arXiv:2205.10287, definition 5); Lion's update, too, has a size that does not depend on the
    gradient's. The decay keeps its time scale in samples (Bergsma et al., 2025, arXiv:2505.13738), so that it grows
    with the square root as well. The rule holds as long as gradients are mostly noise.

    Args:
        options: `lr`, `betas` and `weight_decay` of a run; other options are kept.
        old: its samples in an optimizer step.
        new: those of the run to come.

    Returns:
        A copy in which `lr`, `betas` and `weight_decay` are scaled, as far as they are given.

    Raises:
        ValueError: a batch size is not above 0, or a beta would fall below 0.
    """
    _check_positive(old=old, new=new)
    ratio = new / old
    scaled = dict(options)
    for name in {"lr", "weight_decay"} & scaled.keys():
        scaled[name] = scaled[name] * math.sqrt(ratio)
    if "betas" in scaled:
        scaled["betas"] = tuple(1.0 - ratio * (1.0 - beta) for beta in scaled["betas"])
        if min(scaled["betas"]) < 0:
            raise ValueError(f"betas={tuple(options['betas'])} cannot be scaled to a batch {ratio:g} times as large")
    return scaled


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive number, got {value}")


@dataclass(frozen=True)
class Preset:
    """Published settings for Lion, and where they were published."""

    lr: float
    weight_decay: float
    betas: tuple[float, float]
    source: str


_QUOTED = "last page of Chen et al., 2023, arXiv:2302.06675, as quoted by Su, 2023, kexue.fm/archives/9473"
_AUTHORS = "google/automl, lion/README.md, by the authors of Chen et al., 2023, arXiv:2302.06675"
_AMOS = "Su, 2023, kexue.fm/archives/9473: the Amos rule with sigma = sqrt(1/768), alpha_0 = 1.11e-3"
PRESETS = MappingProxyType(
    {
        "base": Preset(3e-4, 0.01, (0.9, 0.99), _QUOTED),
        "base_language": Preset(3e-4, 0.01, (0.95, 0.98), _QUOTED),
        "billion_language": Preset(2e-4, 0.01, (0.95, 0.98), f"learning rate: {_QUOTED}; betas and decay: {_AUTHORS}"),
        "bert_base_amos": Preset(4e-5, 0.015, (0.95, 0.98), _AMOS),
        "vit_b16_imagenet": Preset(1e-4, 10.0, (0.9, 0.99), _AUTHORS),
    }
)


def preset(name: str) -> dict[str, Any]:
    """Published settings by name, as keyword arguments for `Lion`; `PRESETS[name].source` says where they are from.

    Raises:
        ValueError: an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"name must be one of {', '.join(PRESETS)}, got {name!r}")
    chosen = PRESETS[name]
    return {"lr": chosen.lr, "weight_decay": chosen.weight_decay, "betas": chosen.betas}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two named parameter groups, `decay` and `no_decay`, of the parameters that are trained.

    Biases, the parameters of normalisation layers, other vectors and scalars, and tables of positions do not decay.
    Tied weights come once, under the first of their names. A group that would be empty is left out.

    Args:
        model: its parameters with `requires_grad` are grouped.
        weight_decay: the decay of the first group.

    Returns:
        Groups for any `torch.optim` optimizer, `params` being (name, parameter) pairs.

    Raises:
        ValueError: the model has no parameter that is trained.
    """
    groups: list[dict[str, Any]] = [
        {"name": "decay", "params": [], "weight_decay": weight_decay},
        {"name": "no_decay", "params": [], "weight_decay": 0.0},
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            owner, *_ = name.rpartition(".")
            is_norm = type(model.get_submodule(owner)).__name__.lower().endswith(_NORM_SUFFIXES)
            is_position_table = any(part in _POSITION_TABLES for part in name.split("."))
            # The shape of a lazy parameter is not known yet; torch has lazy matrices named weight, and vectors.
            is_matrix = name.endswith("weight") if is_lazy(parameter) else parameter.ndim >= 2
            decays = is_matrix and not is_norm and not is_position_table
            groups[0 if decays else 1]["params"].append((name, parameter))
    filled = [group for group in groups if group["params"]]
    if not filled:
        raise ValueError(f"{type(model).__name__} has no parameter with requires_grad=True")
    return filled


def lion_amos(groups: Iterable[dict[str, Any]], alpha_0: float = AMOS_ALPHA_0, q: float = 1.0, **options: Any) -> Lion:
    """Lion with each parameter's learning rate and weight decay read off its scale at the start, by the Amos rule.

    With sigma the root mean square of a parameter, lr = alpha_0 * sigma and weight_decay = alpha_0 / (2 q sigma); the
    schedule that belongs to it is `amos`. Su, 2023, kexue.fm/archives/9473, after Tian and Parikh, 2022,
    arXiv:2210.11693. A parameter that starts at zero has no scale; it takes the median of the matrices' (our choice).

    Args:
        groups: as `parameter_groups` makes them; only the one named `decay` decays.
        alpha_0: relative change of a parameter in one step, about 1e-3.
        q: above 0; larger is less decay.
        **options: other options of `Lion`, such as `betas`.

    Returns:
        Lion with a parameter group for each scale (to two digits), named `<group>/sigma=<scale>`.

    Raises:
        ValueError: a value out of range.
    """
    _check_positive(alpha_0=alpha_0, q=q)
    groups = list(groups)
    matrices = [scale(parameter) for group in groups for _, parameter in group["params"] if parameter.ndim >= 2]
    fallback = statistics.median([sigma for sigma in matrices if sigma] or [BERT_BASE_SIGMA])
    split: dict[str, dict[str, Any]] = {}
    for group in groups:
        for name, parameter in group["params"]:
            sigma = float(f"{scale(parameter) or fallback:.2g}")
            decay = alpha_0 / (2 * q * sigma) if group["name"] == "decay" else 0.0
            label = f"{group['name']}/sigma={sigma:g}"
            fresh = {"name": label, "params": [], "lr": alpha_0 * sigma, "weight_decay": decay}
            split.setdefault(label, fresh)["params"].append((name, parameter))
    return Lion(split.values(), **options)


def scale(parameter: torch.Tensor) -> float:
    """The root mean square of a parameter; for a freshly initialised matrix, its standard deviation."""
    return float(parameter.detach().float().pow(2).mean().sqrt()) if parameter.numel() else 0.0


def constant(total_steps: int) -> Factor:
    """The peak learning rate from start to end."""
    return lambda step: 1.0


def linear(total_steps: int, final: float = 0.0) -> Factor:
    """A straight line from 1 at step 0 to `final` at `total_steps`, and `final` from there on."""
    _check_schedule(total_steps, final)
    return lambda step: 1.0 - (1.0 - final) * min(1.0, step / total_steps)


def cosine(total_steps: int, final: float = 0.0) -> Factor:
    """Half a cosine from 1 at step 0 to `final` at `total_steps` (Loshchilov and Hutter, 2017, arXiv:1608.03983)."""
    _check_schedule(total_steps, final)
    return lambda step: final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / total_steps)))


def wsd(total_steps: int, decay: float = 0.2, final: float = 0.0) -> Factor:
    """Warm-up, stable, decay (Hu et al., 2024, arXiv:2404.06395): the peak, then a decay over the last steps.

    The decay follows `1 - sqrt` of its progress, which ends lower than a line (Hägele et al., 2024, arXiv:2405.18392).
    Runs of different lengths are equal until the shorter one decays, so a checkpoint of a long run from before that
    step is also one of the shorter run.

    Args:
        total_steps: optimizer steps of the run.
        decay: share of the steps that decay, above 0 and at most 1.
        final: factor at `total_steps` and after it.
    """
    _check_schedule(total_steps, final)
    check_number("decay", decay, "(0, 1]")
    stable_steps = total_steps - max(1, round(decay * total_steps))

    def factor(step: int) -> float:
        if step <= stable_steps:
            return 1.0
        return 1.0 - (1.0 - final) * math.sqrt(min(1.0, (step - stable_steps) / (total_steps - stable_steps)))

    return factor


def amos(total_steps: int, final: float = 0.1) -> Factor:
    """`1 / (kappa * step + 1)`, with kappa such that the factor is `final` at `total_steps`.

    The decay of the Amos optimizer (Tian and Parikh, 2022, arXiv:2210.11693); see `lion_amos`.
    """
    _check_schedule(total_steps, final)
    if final == 0:
        raise ValueError("final must be above 0 for the amos schedule, got 0")
    kappa = (1.0 / final - 1.0) / total_steps
    return lambda step: 1.0 / (kappa * step + 1.0)


def _check_schedule(total_steps: int, final: float) -> None:
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    check_number("final", final, "[0, 1]")
