"""int8 momentum in other shards: nothing changes where blocks are taken over whole, and little where they are cut."""

import pytest
import torch
from torch import Tensor

from lion_lightning.optim.kernels import storage_formats
from lion_lightning.training.checkpoint.sharded_state import reblocked

WIDEST_LEVEL = 0.033  # of the largest value of a block: the widest step between two levels


def cut(momentum: Tensor, shards: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Levels and scales of each shard, and all scales as they are saved: as many for each shard."""
    rows = -(-momentum.shape[0] // shards)
    parts = [momentum[rows * shard : rows * (shard + 1)].flatten() for shard in range(shards)]
    made = [storage_formats.quantize(part, None) for part in parts]
    blocks = -(-rows * momentum.shape[1] // storage_formats.BLOCK_ELEMENTS)
    saved = torch.cat([torch.nn.functional.pad(scales, (0, blocks - len(scales))) for _, scales in made])
    return [levels for levels, _ in made], [scales for _, scales in made], saved


def values(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * torch.logspace(-3, 0, columns)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4), (4, 1), (3, 2), (2, 2), (3, 3)])
@pytest.mark.parametrize(("rows", "columns"), [(48, 128), (101, 67), (3, 4096), (1, 5000), (33, 256), (10, 500)])
def test_a_momentum_means_the_same_in_other_shards(rows: int, columns: int, before: int, after: int) -> None:
    momentum = values(rows, columns)
    levels, scales, kept = cut(momentum, before)
    flat = torch.cat(levels)
    meant = torch.cat([storage_formats.dequantize(*part) for part in zip(levels, scales, strict=True)])
    each = -(-rows // after) * columns
    for first in range(0, each * after, each):
        here = flat[first : first + each]
        new_levels, new_scales = reblocked(here, first, momentum.shape, kept, before)
        assert (new_levels.dtype, new_scales.shape) == (torch.int8, (-(-here.numel() // 256),))
        now = storage_formats.dequantize(new_levels, new_scales)
        for block in range(0, here.numel(), 256):
            expected, found = meant[first + block : first + here.numel()][:256], now[block : block + 256]
            shard = -(-rows // before) * columns
            start = (first + block) % shard
            if start % 256 == 0 and start + len(expected) <= shard:
                assert torch.equal(found, expected), "a block that was taken over whole"
            else:
                assert (found - expected).abs().max() <= WIDEST_LEVEL * expected.abs().max()


def test_whole_blocks_keep_their_very_levels_and_scales() -> None:
    levels, scales, kept = cut(values(48, 128), 2)
    levels[0][:256] //= 3  # no level at the top: what rounding anew would put there
    new_levels, new_scales = reblocked(torch.cat(levels), 0, torch.Size([48, 128]), kept, 2)
    assert torch.equal(new_levels, torch.cat(levels))
    assert torch.equal(new_scales, torch.cat(scales))


def test_a_shard_without_elements_has_no_blocks() -> None:
    levels, scales = reblocked(torch.empty(0, dtype=torch.int8), 4096, torch.Size([1, 4096]), torch.ones(16), 1)
    assert levels.numel() == scales.numel() == 0
