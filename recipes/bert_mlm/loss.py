"""The cross-entropy of scores over a large vocabulary, in the memory of the scores alone.

Torch's own keeps the scores, their log-probabilities and two gradients of that size: four times 38 MiB for 64 blocks
of 128 tokens and 8,192 words. On a CPU one of them is enough. The numbers are those of torch's function bit for bit:
its own kernels are called, on a few rows at a time, and each row is computed by itself.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

VALUES_AT_ONCE = 2**18  # a megabyte, which stays in a processor's cache
_MEAN = 1  # torch's number for reduction="mean"


def mean_cross_entropy(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """Mean cross-entropy in nats of the rows whose target is not `ignored`.

    On a CPU the memory of `logits` is used up, so nobody may read them afterwards; a second backward pass is an error.

    Args:
        logits: float32 (rows, vocabulary), no leaf.
        targets: int64 (rows,).
        ignored: the target of rows that do not count.
    """
    if torch.compiler.is_compiling() or logits.device.type != "cpu" or not logits.requires_grad or logits._is_view():
        return cross_entropy(logits, targets, ignore_index=ignored)
    loss, _ = _MeanCrossEntropy.apply(logits, targets, ignored)
    return loss


def row_cross_entropy(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """Cross-entropy in nats of each row, 0 where the target is `ignored`: float32 (rows,).

    Args:
        logits: floating-point (rows, vocabulary); no gradient goes back to them.
        targets: int64 (rows,).
        ignored: see `mean_cross_entropy`.
    """
    size = _rows_at_once(logits) if logits.device.type == "cpu" else len(logits)
    parts = zip(logits.split(size), targets.split(size), strict=True)
    losses = [cross_entropy(rows.float(), wanted, ignore_index=ignored, reduction="none") for rows, wanted in parts]
    return torch.cat(losses)


class _MeanCrossEntropy(torch.autograd.Function):
    """Turns the scores into log-probabilities in place, and these into the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
        for rows in logits.split(_rows_at_once(logits)):
            rows.copy_(torch.log_softmax(rows, 1))
        loss, count = torch.ops.aten.nll_loss_forward(logits, targets, None, _MEAN, ignored)
        ctx.mark_dirty(logits)
        ctx.save_for_backward(logits, targets, count)
        ctx.ignored = ignored
        ctx.set_materialize_grads(False)
        return loss, logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor, _: None) -> tuple[Tensor, None, None]:
        logs, targets, count = ctx.saved_tensors
        size = _rows_at_once(logs)
        for rows, wanted in zip(logs.split(size), targets.split(size), strict=True):
            of_logs = torch.ops.aten.nll_loss_backward(of_loss, rows, wanted, None, _MEAN, ctx.ignored, count)
            rows.copy_(torch.ops.aten._log_softmax_backward_data(of_logs, rows, 1, rows.dtype))
        return logs, None, None


def _rows_at_once(logits: Tensor) -> int:
    return max(1, VALUES_AT_ONCE // logits.shape[1])
