"""A training step under torch.compile: backward and the optimizer's step break the graph, once each."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from lion_lightning.optim import Lion


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def breaks() -> dict[str, int]:
    """The first line of the reason of each break, and how often it was met while tracing."""
    return {reason.partition("\n")[0]: count for reason, count in torch._dynamo.utils.counters["graph_break"].items()}


@pytest.mark.parametrize("options", [{}, {"weight_bits": 16, "momentum_dtype": "int8"}])
def test_the_optimizer_breaks_a_compiled_training_step_once(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).bfloat16() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [Lion(model.parameters(), lr=1e-2, weight_decay=0.1, **options) for model in models]
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    def train(model: nn.Module, optimizer: Lion, batch: torch.Tensor) -> torch.Tensor:
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    compiled = torch.compile(train, backend=count)
    for step in range(4):
        batch = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).bfloat16()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        assert torch.equal(train(models[0], optimizers[0], batch), compiled(models[1], optimizers[1], batch))
        if step == 0:
            found = breaks()
            assert len(graphs) == 1, "forward and loss are one graph"
            assert sum(count for reason, count in found.items() if "backward" not in reason) == 1, found
            assert sum(found.values()) == 2, found
    assert breaks() == found, "a later step, with another lr, is not traced again"
    assert len(graphs) == 1
    for left, right in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(left, right)
