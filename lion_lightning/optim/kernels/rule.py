"""The Lion rule on plain tensors, and the objects that an engine receives.

For gradient g, momentum m, parameter p, learning rate eta, betas (b1, b2) and decoupled weight decay lam:

    c = b1*m + (1-b1)*g          u = sign(c)          sign(0) = 0
    p <- p - eta*(u + lam*p)
    m <- b2*m + (1-b2)*g

Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675. Arithmetic is fp32 whatever is
stored, and float64 for float64 parameters; products and sums are rounded one by one (no fused multiply-add), so that
engines agree bit for bit. A stored weight is rounded once, after step and decay together.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lion_lightning.optim.kernels import storage_formats
from lion_lightning.optim.kernels.storage_formats import BLOCK_ELEMENTS

CAUTIOUS_LIMIT = 2.0
"""With `cautious`, no element moves further than this multiple of lr (and its decay)."""


@dataclass(frozen=True)
class Settings:
    """The options of one parameter group in one step.

    `lr`, `grad_scale`, `found_inf` and `step` are Python numbers if the host knows them, and 0-d tensors on the device
    if reading them would synchronise. On a CPU they are numbers.
    """

    lr: float | Tensor
    beta1: float
    beta2: float
    weight_decay: float
    weight_bits: int
    cautious: bool
    maximize: bool
    skip_nonfinite: bool
    seed: int
    step: int | Tensor
    """Steps taken before this one: keys the random bits."""
    grad_scale: float | Tensor = 1.0
    """Gradients are divided by it (multiplied by its fp32 reciprocal), as in torch's fused optimizers."""
    found_inf: Tensor | None = None
    """If it is a tensor other than 0, the step changes nothing. A step that the host knows to skip runs no engine."""
    cautious_decay: bool = False

    @property
    def decay_threshold(self) -> float:
        """A weight p decays unless u * p is below it; see `ruled`."""
        return 0.0 if self.cautious_decay else -math.inf


@dataclass
class TensorUpdate:
    """One parameter with its gradient and state as dense, flat (1-D, stride 1) tensors that share memory with them.

    Shapes: all (n,), except `exp_avg_scale` of (ceil(n / BLOCK_ELEMENTS),) or longer. Engines write `param`, `exp_avg`,
    `exp_avg_scale` and `weight_remainder` in place and never `grad`.
    """

    param: Tensor
    """bfloat16, float32 or float64."""
    grad: Tensor
    """Any floating dtype; usually that of `param`."""
    exp_avg: Tensor
    """float64, float32, bfloat16, or int8 with `exp_avg_scale`."""
    exp_avg_scale: Tensor | None
    weight_remainder: Tensor | None
    """int16 at 32 bits, int8 at 24; None at 16 and for parameters that are not bf16."""
    index: int
    """Position of the parameter over all groups: keys the random bits."""
    offset: int
    """Index of the first element within the whole parameter (not 0 for a shard): keys the random bits."""
    settings: Settings
    kind: str = "matrix"
    """"scalar", "vector" or "matrix" (two dimensions and more), for telemetry."""

    def part(self, start: int, stop: int) -> "TensorUpdate":
        """The elements from `start`, a multiple of BLOCK_ELEMENTS, to `stop`, in the same memory."""
        scale, remainder = self.exp_avg_scale, self.weight_remainder
        return replace(
            self,
            param=self.param[start:stop],
            grad=self.grad[start:stop],
            exp_avg=self.exp_avg[start:stop],
            exp_avg_scale=None if scale is None else scale[start // BLOCK_ELEMENTS : -(-stop // BLOCK_ELEMENTS)],
            weight_remainder=None if remainder is None else remainder[start:stop],
            offset=self.offset + start,
        )

    @property
    def is_random(self) -> bool:
        """Whether what is stored is rounded stochastically."""
        low_weight = self.param.dtype == torch.bfloat16 and self.settings.weight_bits != 32
        return low_weight or self.exp_avg.dtype == torch.int8

    def random_bits(self) -> Tensor | None:
        """int32 words of shape (n,) where storage is rounded stochastically, else None."""
        if not self.is_random:
            return None
        keys = storage_formats.random_keys(self.settings.seed, self.settings.step, self.index)
        return storage_formats.random_bits(keys, self.offset, self.param.numel(), self.param.device)


def caution(update: Tensor, grad: Tensor) -> Tensor:
    """Masks the elements of u whose sign differs from the gradient's, and scales up the others of the same block.

    Liang et al., "Cautious Optimizers", arXiv:2411.16085, scale by 1/mean(mask) over the tensor, which is unbounded.
    Here the mean is over BLOCK_ELEMENTS elements and the factor is at most CAUTIOUS_LIMIT.

    Args:
        update: u, of shape (n,).
        grad: of shape (n,), to descend along.
    """
    count = update.numel()
    mask = update * grad > 0
    shared = storage_formats.blocked(mask.to(update.dtype)).sum(1)
    elements = torch.full_like(shared, BLOCK_ELEMENTS)
    elements[-1] = count - (shared.numel() - 1) * BLOCK_ELEMENTS
    factor = (elements / shared).clamp_(max=CAUTIOUS_LIMIT).repeat_interleave(BLOCK_ELEMENTS)[:count]
    return update * torch.where(mask, factor, 0.0)


def ruled(weight: Tensor, grad: Tensor, momentum: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """The rule, in the precision of its arguments; gradients that are not finite propagate.

    With `cautious_decay` a weight decays only where the step takes it towards zero too, or does not move it: where u
    and p have the same sign, or one is 0 (Chen et al., "Cautious Weight Decay", arXiv:2510.12402).

    Args:
        weight, grad, momentum: before the step, of shape (n,) and one dtype; `grad` times `gradient_factor`.
        settings: of the parameter's group.

    Returns:
        New weight, new momentum, and u after caution, of shape (n,).
    """
    mixed = (momentum * settings.beta1).add_(grad * (1 - settings.beta1))
    update = torch.where(mixed.isnan(), mixed, mixed.sign())  # torch's sign of NaN is 0
    if settings.cautious:
        update = caution(update, grad)
    decay = weight * settings.weight_decay
    if settings.cautious_decay:
        decay = torch.where(update * weight < settings.decay_threshold, 0.0, decay)
    new_weight = weight - decay.add_(update).mul_(settings.lr)
    new_momentum = (momentum * settings.beta2).add_(grad * (1 - settings.beta2))
    return new_weight, new_momentum, update


def gradient_factor(settings: Settings, dtype: torch.dtype) -> float | Tensor:
    """The factor of the gradients: the reciprocal of `grad_scale`, negated to ascend.

    Args:
        settings: of a parameter group.
        dtype: of the arithmetic, in which the reciprocal is rounded.
    """
    sign = -1.0 if settings.maximize else 1.0
    if isinstance(settings.grad_scale, Tensor):
        return settings.grad_scale.to(dtype).reciprocal() * sign
    if settings.grad_scale == 1.0:
        return sign
    return sign * torch.tensor(settings.grad_scale, device="cpu", dtype=dtype).reciprocal().item()


def update_mask(grad: Tensor, settings: Settings) -> Tensor:
    """Which elements the step may change: bool of shape (n,).

    Args:
        grad: times `gradient_factor`, shape (n,).
        settings: of the parameter's group.
    """
    mask = grad.isfinite() if settings.skip_nonfinite else torch.ones_like(grad, dtype=torch.bool)
    return mask if settings.found_inf is None else mask & (settings.found_inf == 0)


def decode(update: TensorUpdate) -> tuple[Tensor, Tensor]:
    """Weight and momentum in the precision of the arithmetic, shape (n,); may share memory with what is stored."""
    weight = update.param
    if weight.dtype == torch.bfloat16:
        weight = storage_formats.join_weight(weight, update.weight_remainder)
    momentum = update.exp_avg
    if update.exp_avg_scale is not None:
        momentum = storage_formats.dequantize(momentum, update.exp_avg_scale)
    return weight, momentum.to(weight.dtype)


def without_memory(update: TensorUpdate) -> str | None:
    """Why compiled code cannot reach the tensors of an update; None if it can.

    Fake tensors, tensors that wrap others, and torch's zero tensors have no memory of their own.
    """
    have_memory = update.param.data_ptr() and update.grad.data_ptr() and update.exp_avg.data_ptr()
    return None if have_memory or not update.param.numel() else "tensors without memory of their own are not supported"


def address(tensor: Tensor | None) -> int:
    """Address of a tensor's first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
