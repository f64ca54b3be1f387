"""A fixed sample of coordinates of a Lion optimizer: does the sign of its update still flip, and does it agree?"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from lion_lightning.optim import Lion, layout
from lion_lightning.optim.kernels import library, measures, storage_formats
from lion_lightning.optim.kernels.cpu import Tasks

STRETCHES = 6
STRETCH_ELEMENTS = 2048
"""Up to 6 x 2,048 coordinates: a flip rate of 0.2 is then known to 0.004. More are not worth their time every step."""


class SampledCoordinates:
    """Stretches of memory, spread over the parameters, in which the coming update is worked out before it is made.

    Args:
        optimizer: its parameters are sampled; the choice depends on their number and sizes alone.
    """

    def __init__(self, optimizer: Lion) -> None:
        self.optimizer = optimizer
        places = [
            (number, param)
            for number, group in enumerate(optimizer.param_groups)
            for param in group["params"]
            if param.requires_grad and param.numel() >= storage_formats.BLOCK_ELEMENTS
        ] or [(number, param) for number, group in enumerate(optimizer.param_groups) for param in group["params"]]
        spread = len(places) / min(STRETCHES, len(places))
        chosen = [places[int(number * spread)] for number in range(min(STRETCHES, len(places)))]
        dice = random.Random(0)
        # With the numbers of groups: the groups themselves are new ones after a load_state_dict.
        self._stretches = [(number, param, *_stretch(param, dice)) for number, param in chosen]
        self._probe = measures.Probe([(start, stop) for *_, start, stop in self._stretches])
        numbers = {param: n for n, param in enumerate(p for group in optimizer.param_groups for p in group["params"])}
        self._survey = measures.Survey([(numbers[param], start, stop) for _, param, start, stop in self._stretches])
        self._last = max(numbers[param] for _, param, *_ in self._stretches)
        self._signs: Tensor | None = None

    @torch.no_grad()
    def measure(self) -> Sequence[float] | Sequence[Tensor]:
        """Sums over the sample, in the order of `MEASURES`, numbers or float32 of shape ().

        Empty without gradients or momentum. To be called when gradients are final and the step is still to come.
        """
        aimed = self._aim()
        if aimed is None:
            return self._measure()
        if not aimed:
            self._signs = None
            return ()
        return self._probe.measure(self._known_signs())

    def survey(self, tasks: Tasks) -> Sequence[float] | None:
        """The sum of squares of all gradients and then what `measure` gives; None where the tasks do not tell.

        A parameter with its first gradient counts here, as it has a momentum, of zeros, by then.
        """
        # Tasks are in the order of parameters. After one that has no gradient or no elements they have other numbers.
        updates, last = tasks.updates, self._last
        known = len(updates) > last and updates[last].index == last
        return self._survey.measure(tasks, self._known_signs()) if known else None

    def _known_signs(self) -> Tensor:
        if self._signs is None:
            self._signs = torch.zeros(sum(stop - start for *_, start, stop in self._stretches))
        return self._signs

    def _aim(self) -> int | None:
        """Points the probe at what is to be measured; how many stretches that are, None where it is for torch."""
        if library.load() is None:
            return None
        aimed, states = 0, self.optimizer.state
        for index, (number, param, *_) in enumerate(self._stretches):
            group = self.optimizer.param_groups[number]
            grad, state = param.grad, states.get(param)
            if grad is None or not state:
                self._probe.skip(index)
                continue
            exp_avg = state["exp_avg"]
            if "exp_avg_scale" in state or type(exp_avg) not in layout.PLAIN_TYPES or not param.is_contiguous():
                return None
            if not self._probe.aim(index, grad, exp_avg, float(group["betas"][0]), -1.0 if group["maximize"] else 1.0):
                return None
            aimed += 1
        return aimed

    def _measure(self) -> Sequence[Tensor]:
        """With torch."""
        pieces = [self._piece(*stretch) for stretch in self._stretches]
        known = next((piece[0] for piece in pieces if piece is not None), None)
        if known is None:
            self._signs = None
            return ()
        # A parameter that has no gradient or momentum counts as one at rest: it has no sign.
        rest = [known.new_zeros(stop - start) for *_, start, stop in self._stretches] if None in pieces else []
        filled = [piece or (rest[number], rest[number]) for number, piece in enumerate(pieces)]
        grad, momentum = torch.cat([piece[0] for piece in filled]), torch.cat([piece[1] for piece in filled])
        beta1 = self._beta1(grad)
        update = (momentum * beta1).add_(grad * (1 - beta1)).sign_()
        old, self._signs = self._signs if self._signs is not None else torch.zeros_like(update), update
        # Sums of products: comparisons of whole tensors are slow on a CPU. A sign is -1, 0 or 1, and 0 for NaN; where
        # both signs are there, their product is 1 if they agree and -1 if they have flipped.
        moved, had_gradient = update * update, grad.sign().square_()
        both = moved.dot(old * old)
        squares = moved.sum()
        flips, dead = (both - update.dot(old)) / 2, squares - moved.dot(had_gradient)
        return flips, both, update.dot(grad), squares, grad.dot(grad), dead

    def _piece(self, number: int, param: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor] | None:
        state, grad = self.optimizer.state.get(param), param.grad
        if grad is None or not state:
            return None
        momentum = layout.flat(layout.local(state["exp_avg"]))[start:stop]
        if "exp_avg_scale" in state:
            scale = layout.local(state["exp_avg_scale"])
            first, last = start // storage_formats.BLOCK_ELEMENTS, -(-stop // storage_formats.BLOCK_ELEMENTS)
            momentum = storage_formats.dequantize(momentum, scale[first:last])
        if not (param.is_contiguous() and grad.is_contiguous()) or layout.is_sharded(grad):
            weight, grad = layout.local(param.detach()), layout.local_grad(grad, param)
            grad = layout.laid_out_like(grad, weight if layout.is_dense(weight) else layout.local(state["exp_avg"]))
        piece = layout.flat(grad)[start:stop].float()
        return -piece if self.optimizer.param_groups[number]["maximize"] else piece, momentum.float()

    def _beta1(self, like: Tensor) -> Tensor | float:
        """beta1 of each coordinate; a number where all groups share one."""
        values = {float(group["betas"][0]) for group in self.optimizer.param_groups}
        if len(values) == 1:
            return values.pop()
        groups = self.optimizer.param_groups
        sizes = [(float(groups[number]["betas"][0]), stop - start) for number, _, start, stop in self._stretches]
        return torch.cat([like.new_full((size,), beta1) for beta1, size in sizes])

    def state_dict(self) -> Tensor | None:
        """Signs of the last update, int8 of shape (coordinates,); they belong to this process if it holds shards."""
        sharded = any(layout.is_sharded(param) for _, param, *_ in self._stretches)
        return None if self._signs is None or sharded else self._signs.to("cpu", torch.int8)

    def load_state_dict(self, state: Tensor | None) -> None:
        expected = sum(stop - start for *_, start, stop in self._stretches)
        fits = state is not None and state.numel() == expected
        self._signs = (
            None if state is None or not fits else state.to(layout.local(self._stretches[0][1]).device, torch.float32)
        )

    def forget(self) -> None:
        """The weights were put back: the signs of before mean nothing."""
        self._signs = None


def _stretch(param: Tensor, dice: random.Random) -> tuple[int, int]:
    """First and last element of a stretch of the local part, whole int8 blocks."""
    elements = layout.local(param.detach()).numel()
    blocks = max(0, elements - STRETCH_ELEMENTS) // storage_formats.BLOCK_ELEMENTS
    start = dice.randint(0, blocks) * storage_formats.BLOCK_ELEMENTS
    return start, min(start + STRETCH_ELEMENTS, elements)
