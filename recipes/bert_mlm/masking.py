"""Masked language modelling: the hidden tokens are a pure function of (seed, sample number).

No random state is kept: a resumed run, another number of ranks or workers, and the CPU and the GPU all hide the same
tokens. The number of hidden tokens per sequence is fixed, so shapes never change and the device is never synchronised.
The 15 % and 80/10/10 are those of BERT (Devlin et al., 2019, arXiv:1810.04805).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lion_lightning.errors import ConfigError, check_number

UNITS = ("token", "word", "span")
IGNORED = -100  # what torch's cross_entropy leaves out
_MASK32 = 0xFFFFFFFF
_STREAM_WHICH, _STREAM_HOW, _STREAM_RANDOM_TOKEN, _STREAM_SPAN_LENGTH = 1, 2, 3, 4


@dataclass(frozen=True)
class Masking:
    """How many tokens are hidden, and how.

    Attributes:
        rate: share of the tokens that the loss is computed on.
        mask_share: share of those that become [MASK].
        random_share: share of those that become a random token; the rest stay as they are.
        unit: what is hidden together. `token`; `word`, all pieces of a word, or none (Google's whole-word BERT of
            2019); `span`, several words (SpanBERT, Joshi et al., 2020, arXiv:1907.10529), all of which become [MASK],
            random tokens or stay.
        span_p: parameter of the geometric distribution of a span's number of words.
        span_max: most words of a span.
    """

    rate: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    unit: str = "token"
    span_p: float = 0.2
    span_max: int = 10

    def __post_init__(self) -> None:
        check_number("rate", self.rate, "(0, 1)")
        check_number("mask_share", self.mask_share, "[0, 1]")
        check_number("random_share", self.random_share, "[0, 1]")
        if self.mask_share + self.random_share > 1:
            raise ConfigError(
                f"mask_share and random_share must add up to at most 1, got {self.mask_share} and {self.random_share}"
            )
        if self.unit not in UNITS:
            raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {self.unit!r}")
        check_number("span_p", self.span_p, "(0, 1)")
        check_number("span_max", self.span_max, "[1, inf)", whole=True)


@dataclass(frozen=True)
class MaskedBatch:
    """A batch ready for the model.

    Attributes:
        input_ids: int64 (batch, length), some tokens replaced.
        positions: int64 (batch, hidden), where the loss is computed.
        targets: int64 (batch, hidden), the tokens that stood there, IGNORED where none could be hidden.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor


def mask_tokens(
    input_ids: Tensor,
    sample: Tensor,
    *,
    masking: Masking,
    seed: int,
    mask_id: int,
    special_tokens: Tensor,
    replacement_ids: Tensor,
    starts_word: Tensor | None = None,
) -> MaskedBatch:
    """Hide the same tokens of the same sample every time.

    Whole words make the count an upper bound: a word that does not fit into what is left stays visible, and the places
    that stay free are IGNORED.

    Args:
        input_ids: int64 (batch, length).
        sample: int64 (batch,), the number of each sequence in the run.
        masking: rate and shares.
        seed: keys the choice.
        mask_id: id of [MASK].
        special_tokens: bool (vocabulary,), the ids that are never hidden.
        replacement_ids: int64, the ids that are drawn as random tokens.
        starts_word: bool (vocabulary,), False for pieces that continue a word; only words and spans need it.

    Raises:
        ValueError: words or spans are to be hidden and `starts_word` is not given.
    """
    length = input_ids.shape[1]
    hidden = max(1, round(masking.rate * length))
    special = special_tokens[input_ids]
    how = uniform(seed, _STREAM_HOW, sample, length)
    if masking.unit == "token":
        order = uniform(seed, _STREAM_WHICH, sample, length).masked_fill(special, -1.0)
        positions = order.topk(hidden, dim=1).indices
        kept = ~special.gather(1, positions)  # a special token is chosen only where there is almost nothing else
        how = how.gather(1, positions)
    else:
        if starts_word is None:
            raise ValueError(f"unit={masking.unit!r} needs starts_word: which tokens begin a word")
        unit = word_numbers(input_ids, special, starts_word)
        if masking.unit == "span":
            drawn = uniform(seed, _STREAM_SPAN_LENGTH, sample, length)
            unit = span_numbers(unit, drawn, masking.span_p, masking.span_max)
        key = uniform(seed, _STREAM_WHICH, sample, length).gather(1, unit)
        positions, kept = whole_units(unit, key, special, hidden, cut=masking.unit == "span")
        how = how.gather(1, unit.gather(1, positions) if masking.unit == "span" else positions)
    targets = input_ids.gather(1, positions)
    drawn = uniform(seed, _STREAM_RANDOM_TOKEN, sample, length).gather(1, positions)
    random_ids = replacement_ids[(drawn * len(replacement_ids)).long()]
    replaced = torch.where(how < masking.mask_share + masking.random_share, random_ids, targets)
    replaced = torch.where(how < masking.mask_share, mask_id, replaced)
    replaced = torch.where(kept, replaced, targets)
    return MaskedBatch(input_ids.scatter(1, positions, replaced), positions, targets.masked_fill(~kept, IGNORED))


def uniform(seed: int, stream: int, sample: Tensor, length: int) -> Tensor:
    """Counter-based uniform numbers in [0, 1): float32 (batch, length), a function of the arguments alone.

    The mixing is MurmurHash3's 32-bit finaliser (Appleby, public domain), carried out in int64.
    """
    position = torch.arange(length, device=sample.device)
    key = (seed * 0x9E3779B1 + stream * 0x7F4A7C15 + (seed >> 32)) & _MASK32
    counter = _mix(sample & _MASK32) ^ _mix((sample >> 32) ^ key)
    bits = _mix(_mix(counter.unsqueeze(1) ^ (position * 0x9E3779B1 & _MASK32)))
    return (bits >> 8).float() * 2.0**-24


def _mix(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)


def word_numbers(input_ids: Tensor, special: Tensor, starts_word: Tensor) -> Tensor:
    """The number of each token's word in its block, from 0: int64 (batch, length).

    Args:
        input_ids: int64 (batch, length).
        special: bool (batch, length), tokens that belong to no word; each has a number of its own.
        starts_word: bool (vocabulary,), False for pieces that continue a word.
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
