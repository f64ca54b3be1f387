"""The coming update of Lion at some coordinates: whether its sign still flips, and whether the gradient agrees."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lion_lightning.optim import Lion, layout
from lion_lightning.optim.state import momentum_slice

SLICES, SLICE_ELEMENTS, BLOCK_ELEMENTS = 6, 2048, 256
"""Up to 6 x 2,048 coordinates are sampled: a flip rate of 0.2 is then known to 0.004."""


class SampledCoordinates:
    """Slices of memory, spread over the parameters of a Lion, in which the coming update is computed before it is made.

    Tells whether the sign of the update still flips from step to step, and whether it agrees with the gradient.

    Args:
        optimizer: its parameters are sampled; the choice depends on their number and sizes alone.
    """

    def __init__(self, optimizer: Lion) -> None:
        self.optimizer = optimizer
        groups = enumerate(optimizer.param_groups)
        everything = [(number, param) for number, group in groups for param in group["params"] if not is_lazy(param)]
        large = [pair for pair in everything if pair[1].requires_grad and pair[1].numel() >= BLOCK_ELEMENTS]
        places = large or everything
        spread = len(places) / min(SLICES, len(places)) if places else 0.0
        chosen = [places[int(number * spread)] for number in range(min(SLICES, len(places)))]
        dice = random.Random(0)
        # With the numbers of groups: the groups themselves are new objects after a load_state_dict.
        self.slices = [(number, param, *_slice(param, dice)) for number, param in chosen]
        self._signs: Tensor | None = None

    @torch.no_grad()
    def measure(self) -> Sequence[Tensor]:
        """Sums over the sample in the order of `UPDATE_SUMS`, float32 of shape (); empty without gradients or momentum.

        To be called when gradients are final and the step is still to come.
        """
        pieces = [self._piece(*place) for place in self.slices]
        known = next((piece[0] for piece in pieces if piece is not None), None)
        if known is None:
            self._signs = None
            return ()
        # A parameter that has no gradient or momentum counts as one that does not move: its signs are 0.
        rest = [known.new_zeros(stop - start) for *_, start, stop in self.slices]
        filled = [piece or (zeros, zeros) for piece, zeros in zip(pieces, rest, strict=True)]
        grad, momentum = torch.cat([piece[0] for piece in filled]), torch.cat([piece[1] for piece in filled])
        groups = self.optimizer.param_groups
        beta1 = torch.cat(
            [zeros + float(groups[place[0]]["betas"][0]) for place, zeros in zip(self.slices, rest, strict=True)]
        )
        update = (momentum * beta1).add_(grad * (1 - beta1)).sign_()
        old, self._signs = self._signs if self._signs is not None else torch.zeros_like(update), update
        # A sign is -1, 0 or 1, and 0 for NaN; the product of two is 1 where they agree and -1 where one has flipped.
        moved, had_gradient = update * update, grad.sign().square_()
        both = moved.dot(old * old)
        squares = moved.sum()
        flips, dead = (both - update.dot(old)) / 2, squares - moved.dot(had_gradient)
        return flips, both, update.dot(grad), squares, grad.dot(grad), dead

    def _piece(self, number: int, param: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor] | None:
        """Gradient and momentum of a slice, float32 of shape (stop - start,)."""
        state, grad = self.optimizer.state.get(param), param.grad
        if grad is None or not state:
            return None
        if not (param.is_contiguous() and grad.is_contiguous()) or layout.is_sharded(grad):
            weight, grad = layout.local(param.detach()), layout.local_grad(grad, param)
            grad = layout.laid_out_like(grad, weight if layout.is_dense(weight) else layout.local(state["exp_avg"]))
        piece = layout.flat(grad)[start:stop].float()
        signed = -piece if self.optimizer.param_groups[number]["maximize"] else piece
        return signed, momentum_slice(state, start, stop)

    def state_dict(self) -> Tensor | None:
        """Signs of the last update, int8 of shape (coordinates,); None for shards, whose signs differ by process."""
        sharded = any(layout.is_sharded(param) for _, param, *_ in self.slices)
        return None if self._signs is None or sharded else self._signs.to("cpu", torch.int8)

    def load_state_dict(self, state: Tensor | None) -> None:
        expected = sum(stop - start for *_, start, stop in self.slices)
        fits = state is not None and self.slices and state.shape == (expected,)
        device = layout.local(self.slices[0][1]).device if self.slices else None
        self._signs = state.to(device, torch.float32) if state is not None and fits else None

    def forget(self) -> None:
        """Drops the signs of the last update, which do not compare with those of a rewound run."""
        self._signs = None


def _slice(param: Tensor, dice: random.Random) -> tuple[int, int]:
    """First element and the one after the last of a slice of the local part, starting at a whole int8 block."""
    elements = layout.local(param.detach()).numel()
    start = dice.randint(0, max(0, elements - SLICE_ELEMENTS) // BLOCK_ELEMENTS) * BLOCK_ELEMENTS
    return start, min(start + SLICE_ELEMENTS, elements)
