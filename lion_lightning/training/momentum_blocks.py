"""int8 momentum cut into other shards than it was saved in: its scales belong to blocks of 256 elements of a shard.

Where every element of a new block was in one block, levels and scale are taken over and nothing changes in any bit. A
new block that takes from two or more is rounded once more, to nearest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lion_lightning.optim.kernels import storage_formats


@dataclass(frozen=True)
class SavedBlocks:
    """The scales of a whole int8 momentum, as it was cut when it was saved.

    Attributes:
        scales: fp32 (shards * blocks of the largest shard,).
        shards: along the first dimension, each of ceil(rows / shards) rows, the last ones of fewer or none.
        rows: of the parameter.
        elements: of the parameter.
    """

    scales: Tensor
    shards: int
    rows: int
    elements: int

    def of_elements(self, first: int, count: int) -> Tensor:
        """The index in `scales` for each of `count` elements from `first` on, in row-major order; int64 (count,)."""
        in_shard = -(-self.rows // self.shards) * (self.elements // self.rows)
        element = torch.arange(first, first + count)
        shard = element // in_shard
        return (
            shard * (self.scales.numel() // self.shards)
            + (element - shard * in_shard) // storage_formats.BLOCK_ELEMENTS
        )


def reblocked(levels: Tensor, first: int, saved: SavedBlocks) -> tuple[Tensor, Tensor]:
    """The levels and scales of a part of a momentum, in blocks of its own.

    Args:
        levels: int8 (n,) on the CPU: the elements of the part, in row-major order, as they were saved.
        first: index of the first of them in the whole parameter.
        saved: what the levels mean.

    Returns:
        int8 (n,), and fp32 scales (ceil(n / 256),).
    """
    if levels.numel() == 0:
        return levels, saved.scales.new_empty(0)
    of_each = saved.of_elements(first, levels.numel())
    units = storage_formats.dequantize(levels, torch.ones(-(-levels.numel() // storage_formats.BLOCK_ELEMENTS)))
    rounded, scales = storage_formats.quantize(units * saved.scales[of_each], None)
    missing = -levels.numel() % storage_formats.BLOCK_ELEMENTS
    rows = torch.cat([of_each, of_each[-1:].expand(missing)]).view(-1, storage_formats.BLOCK_ELEMENTS)
    whole = (rows == rows[:, :1]).all(1)
    kept = whole.repeat_interleave(storage_formats.BLOCK_ELEMENTS)[: levels.numel()]
    return torch.where(kept, levels, rounded), torch.where(whole, saved.scales[rows[:, 0]], scales)
