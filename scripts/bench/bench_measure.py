"""Measurements for bench_step.py: times of interleaved repeats, bytes, and what survives in bf16."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lion_lightning.optim import import_state
from lion_lightning.optim.kernels import storage_formats
from scripts.bench.bench_models import Shape
from scripts.bench.bench_peers import DTYPES, Params, Subject, quiet
from scripts.bench.bench_streaming import BYTES_PER_ELEMENT, Streaming

LR, WEIGHT_DECAY = 1e-6, 0.1
STREAMED_ELEMENTS = 64 * 1024 * 1024
SURVIVAL_STEPS, SURVIVAL_LR, SURVIVAL_ELEMENTS = 200, 4e-5, 8192
COMPENSATED = {"optimi": "optimi", "flashoptim": "flashlion"}
"""Peers that keep more than bf16 of a weight -> the name of their reader."""


@dataclass
class Result:
    """Figures of one subject; times by round in ms."""

    subject: Subject
    times: list[float] = field(default_factory=list)
    bytes_moved: float = 0.0
    """Per parameter and step: parameter and state read and written once, gradient read once."""
    bytes_kept: float = 0.0
    """Per parameter: weight and state."""
    step_kept: float = 0.0
    decay_kept: float = 0.0
    error: str | None = None
    missing: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, in ms."""
        if len(self.times) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.times, n=4, method="inclusive")
        return (third - first) / 2


class Clock:
    """Times a call in ms: CUDA events on a GPU, the wall clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def __call__(self, work: Callable[[], Any]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            work()
            return (time.perf_counter() - start) * 1e3
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        work()
        after.record()
        torch.cuda.synchronize()
        return float(before.elapsed_time(after))


class Arena:
    """Parameters and gradients of one model, made once per dtype and shared by all subjects."""

    def __init__(self, shapes: Sequence[Shape], device: torch.device) -> None:
        self.shapes, self.device = shapes, device
        self.count = sum(torch.Size(shape).numel() for shape in shapes)
        self._made: dict[str, tuple[Params, list[Tensor], list[int]]] = {}

    def params(self, dtype: str) -> Params:
        """The parameters with their gradients; a gradient that an optimizer has written is filled anew."""
        if dtype not in self._made:
            params = [nn.Parameter(self._random(shape, dtype)) for shape in self.shapes]
            self._made[dtype] = params, [self._random(shape, dtype) for shape in self.shapes], [0] * len(params)
        params, grads, versions = self._made[dtype]
        for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
            if grad._version != versions[index]:
                grad.copy_(self._random(grad.shape, dtype))
            versions[index] = grad._version
            param.grad = grad
        return params

    def _random(self, shape: Sequence[int], dtype: str) -> Tensor:
        return (torch.randn(tuple(shape), device=self.device) * 0.02).to(DTYPES[dtype])


def captured(work: Callable[[], Any]) -> Callable[[], None]:
    """The replay of `work` as a CUDA graph, after three calls on a stream of their own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def run(
    subjects: Sequence[Subject],
    arena: Arena,
    repeats: int,
    steps: int,
    tell: Callable[[str], None],
    survival: bool = True,
) -> tuple[list[Result], dict[str, list[float]]]:
    """Measures all subjects, one after the other in every round.

    Each round makes the optimizer anew, takes a step to make its state, and times `steps` steps; the round's time is
    their smallest. So states of all subjects need not fit into memory at once.

    Args:
        subjects: optimizers.
        arena: the parameters that they share.
        repeats: rounds.
        steps: timed steps of a round.
        tell: called with what is under way.
        survival: whether what survives in bf16 is measured too, which takes 400 steps.

    Returns:
        Results in the order of `subjects`, and GB/s of each way to stream, by round.
    """
    clock = Clock(arena.device)
    results = [Result(subject) for subject in subjects]
    streaming = Streaming(min(STREAMED_ELEMENTS, max(arena.count, 1024)), arena.device)
    limits: dict[str, list[float]] = {way: [] for way in streaming.ways}
    for number in range(repeats):
        for way, work in streaming.ways.items():
            fastest = min(clock(work) for _ in range(steps + 1))
            limits[way].append(streaming.elements * BYTES_PER_ELEMENT / fastest / 1e6)
        for result in results:
            tell(f"round {number + 1} of {repeats}: {result.subject.name}")
            if result.error is None:
                attempt(result, lambda result: _round(result, arena, clock, steps))
    for result in results:
        if survival and result.error is None:
            attempt(result, lambda result: survive(result, arena.device))
    return results, limits


def attempt(result: Result, work: Callable[[Result], None]) -> None:
    """A subject that is missing or fails is named in the report and left out from then on."""
    try:
        work(result)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        result.missing = package == result.subject.family
        result.error = f"{package} is not installed"
    except Exception as error:  # a peer may raise anything; the run goes on without it
        result.error = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _round(result: Result, arena: Arena, clock: Clock, steps: int) -> None:
    subject = result.subject
    params = arena.params(subject.dtype)
    with quiet():
        optimizer = subject.make(params, LR, WEIGHT_DECAY)
        optimizer.step()
    result.times.append(min(clock(optimizer.step) for _ in range(steps)))
    stored = sum(size for param in params for size in _sizes(optimizer.state[param], subject.untouched))
    kept = sum(size for param in params for size in _sizes(optimizer.state[param], ()))
    weights = arena.count * params[0].element_size()
    result.bytes_moved = (2 * (stored + weights) + weights) / arena.count
    result.bytes_kept = (kept + weights) / arena.count


def _sizes(state: Any, untouched: Sequence[str]) -> Iterator[int]:
    """Bytes of the tensors in a parameter's state: plain ones, wrapper subclasses and objects that hold tensors."""
    if isinstance(state, Tensor):
        if hasattr(state, "__tensor_flatten__"):
            names, _ = state.__tensor_flatten__()
            for name in names:
                yield from _sizes(getattr(state, name), ())
        elif state.numel() > 1:
            yield state.numel() * state.element_size()
    elif isinstance(state, dict):
        for key, value in state.items():
            if key not in untouched and key != "qmap1":  # the map of bitsandbytes is one for all parameters
                yield from _sizes(value, untouched)
    elif hasattr(state, "__dict__"):
        yield from _sizes(vars(state), ())


def survive(result: Result, device: torch.device) -> None:
    """Share of the exact step, and of the exact decay, found in the weights after 200 steps of 4e-5 (decay 1.0)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine threads wait for each other far longer than such steps take
    try:
        result.step_kept = _survived(result.subject, device, weight_decay=0.0, slope=1.0)
        result.decay_kept = _survived(result.subject, device, weight_decay=1.0, slope=0.0)
    finally:
        torch.set_num_threads(threads)


def _survived(subject: Subject, device: torch.device, weight_decay: float, slope: float) -> float:
    """Realised over exact mean movement toward zero, of weights between 0.02 and 0.08 with balanced signs."""
    magnitude = torch.linspace(0.02, 0.08, SURVIVAL_ELEMENTS)
    signs = torch.ones(SURVIVAL_ELEMENTS)
    signs[::2] = -1.0
    start = (magnitude * signs).to(device, DTYPES[subject.dtype])
    param = nn.Parameter(start.clone())
    with quiet():
        optimizer = subject.make([param], SURVIVAL_LR, weight_decay)
    signs = signs.to(device)
    for _ in range(SURVIVAL_STEPS):
        param.grad = (signs * slope).to(param.dtype)
        optimizer.step()
    moved = ((start.double() - full_weight(subject, optimizer, param)) * signs).mean()
    shrunk = start.double().abs().mean() * (1 - (1 - SURVIVAL_LR * weight_decay) ** SURVIVAL_STEPS)
    return float(moved / (shrunk if slope == 0.0 else SURVIVAL_LR * SURVIVAL_STEPS))


def full_weight(subject: Subject, optimizer: Any, param: nn.Parameter) -> Tensor:
    """The float64 weight that parameter and state stand for."""
    weight = param.detach()
    if weight.dtype != torch.bfloat16:
        return weight.double()
    remainder = optimizer.state[param].get("weight_remainder")
    if subject.family in COMPENSATED:
        found = import_state.converted(
            optimizer.state_dict(), [weight], COMPENSATED[subject.family], hyperparameters=False
        )
        remainder = found["state"][0].get("weight_remainder")
    return storage_formats.join_weight(weight, remainder).double()
