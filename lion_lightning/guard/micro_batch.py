"""What the guard reads off a micro-batch, and off what `training_step` made of it."""

from typing import Any

from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor


def samples_in(batch: Any) -> int:
    """Samples of a micro-batch; 0, with a warning, where its structure does not tell."""
    entries = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else (batch,)
    sizes = [entry.size(0) for entry in entries if isinstance(entry, Tensor) and entry.ndim]
    if sizes and sizes.count(sizes[0]) == len(entries):
        return sizes[0]
    try:
        return extract_batch_size(batch)
    except MisconfigurationException:
        rank_zero_warn(
            f"LionGuard cannot tell the size of a batch of type {type(batch).__name__} and does not judge it"
        )
        return 0


def loss_of(outputs: Any) -> Tensor | None:
    """The loss among what `training_step` returned; None where it returned none, as manual optimization may."""
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    return loss if isinstance(loss, Tensor) else None
