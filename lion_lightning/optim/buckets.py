"""Gradient release under DDP: a parameter steps when the bucket that holds its gradient has been reduced."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, distributed
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel


class BucketStep(Protocol):
    """What a bucket's parameters are handed to."""

    params: dict[Tensor, tuple[int, int]]

    def begin(self) -> None: ...

    def step(self, param: Tensor) -> None: ...

    def release(self) -> None: ...


@dataclass
class Buckets:
    """The state of the communication hook of one wrapper, which DDP lets be registered once and for ever."""

    group: distributed.ProcessGroup
    release: BucketStep | None = None

    def remove(self) -> None:
        """Goes back to plain averaging."""
        self.release = None


_hooked: "weakref.WeakKeyDictionary[DistributedDataParallel, Buckets]" = weakref.WeakKeyDictionary()


def step_buckets(model: DistributedDataParallel, release: BucketStep) -> Buckets:
    """Registers the hook, or finds the one registered earlier.

    Returns:
        Its state, which can be removed.

    Raises:
        ValueError: the wrapper reports zeros for parameters without a gradient, or reduces in another dtype.
    """
    for option in ("find_unused_parameters", "static_graph", "mixed_precision"):
        if getattr(model, option, None):
            raise ValueError(
                f"DistributedDataParallel({option}={getattr(model, option)}) is not allowed in release_gradients: "
                "leave it at its default"
            )
    if model not in _hooked:
        buckets = Buckets(model.process_group)
        model.register_comm_hook(buckets, _reduce_and_step)
        _hooked[model] = buckets
    _hooked[model].release = release
    return _hooked[model]


def _reduce_and_step(state: Buckets, bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Averages a bucket over the ranks, then steps its parameters while other buckets are still on their way."""
    buffer, release = bucket.buffer().div_(state.group.size()), state.release
    future = distributed.all_reduce(buffer, group=state.group, async_op=True).get_future()
    if release is None:
        return future.then(lambda reduced: reduced.value()[0])
    release.begin()  # step hooks run here, in the thread of backward
    _at_end_of_backward(release.release)

    def step(reduced: torch.futures.Future[list[Tensor]]) -> Tensor:
        result = reduced.value()[0]
        for param, grad in zip(bucket.parameters(), bucket.gradients(), strict=True):
            if param in release.params:
                own, param.grad = param.grad, grad
                release.step(param)
                param.grad = own  # DDP is not done with it
        return result

    return future.then(step)


def _at_end_of_backward(action: Callable[[], None]) -> None:
    """Calls it after DDP has put the reduced gradients where they belong, which is itself such a callback."""
    queue = Variable._execution_engine.queue_callback
    queue(lambda: queue(action))
