"""Flat local views of parameters, gradients and state of any shape, strides and sharding."""

from typing import Any

import torch
from torch import Tensor

from lion_lightning.optim.kernels.rule import Settings, TensorUpdate

PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; does not import torch.distributed."""
    return type(tensor) not in PLAIN_TYPES and hasattr(tensor, "to_local") and hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """The local part of a DTensor, possibly empty; other tensors are returned as they are."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local_grad(grad: Tensor, param: Tensor) -> Tensor:
    """The local part of a gradient, sharded as its parameter is.

    Args:
        grad: of the shape of `param`; redistributed if its placements differ.
        param: a parameter; both are DTensors or neither is.
    """
    if is_sharded(grad) and grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
    return local(grad)


def element_offset(param: Tensor) -> int:
    """Number of the first local element within the whole parameter; exact for shards of the first dimension."""
    if not is_sharded(param):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)  # type: ignore[attr-defined]
    return sum(offset * stride for offset, stride in zip(offsets, param.stride(), strict=True))


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one range of memory, in any order of dimensions, without lazy negation."""
    if tensor.is_neg():
        return False
    # torch keeps the strides of dense tensors, and of no others.
    return tensor.is_contiguous() or same_layout(tensor, torch.empty_like(tensor, device="meta"))


def is_expanded(tensor: Tensor) -> bool:
    """Whether elements share memory, as after `expand`: such a tensor cannot be written."""
    strided = tensor.layout is torch.strided  # others have no strides
    return strided and any(size > 1 and not by for size, by in zip(tensor.shape, tensor.stride(), strict=True))


def same_layout(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape and order of elements in memory."""
    if tensor.shape != other.shape or tensor.stride() == other.stride():
        return tensor.shape == other.shape
    pairs = zip(tensor.shape, tensor.stride(), other.stride(), strict=True)
    return all(size == 1 or left == right for size, left, right in pairs)


def laid_out_like(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor, or a copy of it, with the memory layout of `other`, which is dense and has the same shape."""
    if is_dense(tensor) and same_layout(tensor, other):
        return tensor
    return torch.empty_like(other, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


def flat(tensor: Tensor) -> Tensor:
    """A 1-D view of all elements of a dense tensor in memory order; a 1-D tensor is returned as it is."""
    if tensor.ndim == 1 and tensor.is_contiguous():
        return tensor
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def tensor_update(
    param: Tensor, state: dict[str, Any], index: int, settings: Settings, copies: list[tuple[Tensor, Tensor]]
) -> TensorUpdate:
    """Flat views of a parameter, its gradient and its state.

    Args:
        param: has a gradient; of a DTensor, the local part is updated.
        state: as `state.prepare` leaves it.
        index: position of the parameter over all groups.
        settings: those of its group.
        copies: receives (parameter, copy) if the parameter has gaps in memory; the dense copy is updated, and the
            caller writes it back after the step.
    """
    weight = local(param.detach())
    if not is_dense(weight):
        dense = torch.empty_like(weight).copy_(weight)
        copies.append((weight, dense))
        weight = dense
    assert param.grad is not None
    scale, remainder = state.get("exp_avg_scale"), state.get("weight_remainder")
    return TensorUpdate(
        param=flat(weight),
        grad=flat(laid_out_like(local_grad(param.grad, param), weight)),
        exp_avg=flat(local(state["exp_avg"])),
        exp_avg_scale=None if scale is None else local(scale),
        weight_remainder=None if remainder is None else flat(local(remainder)),
        index=index,
        offset=element_offset(param),
        settings=settings,
        kind=("scalar", "vector")[param.ndim] if param.ndim < 2 else "matrix",
    )
