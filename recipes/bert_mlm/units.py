"""What is hidden together: the words and the spans of a block, and a choice of whole ones."""

import torch
from torch import Tensor


def word_numbers(input_ids: Tensor, special: Tensor, starts_word: Tensor) -> Tensor:
    """The number of each token's word in its block, from 0: int64 (batch, length).

    Args:
        input_ids: int64 (batch, length).
        special: bool (batch, length), tokens that belong to no word; each has a number of its own.
        starts_word: bool (vocabulary,), False for pieces that go on with a word.
    """
    starts = starts_word[input_ids] | special
    starts[:, 1:] |= special[:, :-1]  # a block may begin in the middle of a word
    starts[:, 0] = True
    return starts.long().cumsum(1) - 1


def span_numbers(words: Tensor, drawn: Tensor, p: float, most: int) -> Tensor:
    """The number of each token's span, where spans of 1 to `most` words follow one another: int64 (batch, length).

    The number of words is geometric with parameter `p`, given that it is at most `most`: 3.8 on average for SpanBERT's
    0.2 and 10 (Joshi et al., 2020, arXiv:1907.10529).

    Args:
        words: see `word_numbers`.
        drawn: uniform numbers in [0, 1) of the same shape, from which the lengths are taken.
    """
    upto = [(1 - (1 - p) ** number) / (1 - (1 - p) ** most) for number in range(1, most)]
    lengths = torch.ones_like(words)
    for share in upto:  # comparisons with numbers: no table has to go to the device
        lengths += drawn >= share
    ends = lengths.cumsum(1)
    return torch.searchsorted(ends, words, right=True)


def whole_units(unit: Tensor, key: Tensor, special: Tensor, count: int, cut: bool) -> tuple[Tensor, Tensor]:
    """The tokens of the units with the largest keys, `count` of them in each row.

    Args:
        unit: int64 (batch, length), each token's unit.
        key: float32 (batch, length) in [0, 1), the same for all tokens of a unit.
        special: bool (batch, length), tokens that are never taken.
        count: places in each row.
        cut: whether the last unit may be cut to fit; if not, it is left out.

    Returns:
        positions: int64 (batch, count).
        kept: bool (batch, count), False for places that stay free.
    """
    length = unit.shape[1]
    size = torch.zeros_like(unit).scatter_add(1, unit, (~special).long())
    barred = special if cut else special | (size.gather(1, unit) > count)
    # One integer per token, all different: the key of its unit, then the unit, then its place from the end.
    bits = length.bit_length()
    place = torch.arange(length - 1, -1, -1, device=unit.device)
    order = ((key * 2**24).long() << bits | unit) << bits | place
    order = order.masked_fill(barred, -1)
    chosen = order.topk(count, dim=1)
    kept, positions = chosen.values >= 0, chosen.indices
    if cut:
        return positions, kept
    taken = torch.zeros_like(unit).scatter_add(1, unit.gather(1, positions), kept.long())
    return positions, kept & (taken == size).gather(1, unit.gather(1, positions))
