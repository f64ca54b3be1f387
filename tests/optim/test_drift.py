"""Step and decay survive in every mode and engine; a broken Lion fails the same checks."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from lion_lightning.optim import Lion
from tests.optim.checks import Factory, check_directions, check_drift

MODES: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {}),
    (torch.float32, {"momentum_dtype": "int8"}),
    (torch.float64, {}),
    (torch.bfloat16, {"weight_bits": 32}),
    (torch.bfloat16, {"weight_bits": 24}),
    (torch.bfloat16, {"weight_bits": 16}),
    (torch.bfloat16, {"weight_bits": 24, "momentum_dtype": "int8"}),
    (torch.bfloat16, {"weight_bits": 16, "momentum_dtype": "int8"}),
    (torch.bfloat16, {"weight_bits": 16, "momentum_dtype": "float32"}),
]


def lion(**options: Any) -> Factory:
    return lambda param, lr, decay: Lion([param], lr, weight_decay=decay, **options)


@pytest.mark.parametrize("weight_decay", [0.1, 1.0])
@pytest.mark.parametrize(("dtype", "options"), MODES)
def test_step_and_decay_survive_a_thousand_steps(
    dtype: torch.dtype, options: dict[str, Any], weight_decay: float
) -> None:
    check_drift(lion(**options), dtype, weight_decay)


@pytest.mark.parametrize("options", [{"weight_bits": 32}, {"weight_bits": 24}, {"weight_bits": 16}])
def test_the_eager_engine_drifts_as_little(options: dict[str, Any]) -> None:
    check_drift(lion(fused=False, **options), torch.bfloat16, 0.1)


@pytest.mark.parametrize("fused", [False, None])
@pytest.mark.parametrize(("dtype", "options"), MODES)
def test_directions_follow_the_oracle(dtype: torch.dtype, options: dict[str, Any], fused: bool | None) -> None:
    rounding = 4e-4 if options.get("weight_bits") == 16 else 1e-4  # the spacing of bf16 is 1.2e-4 to 4.9e-4 here
    check_directions(lion(fused=fused, **options), dtype, rounding)


class Broken(Optimizer):
    """A plain Lion with one fault."""

    def __init__(self, param: nn.Parameter, lr: float, weight_decay: float, fault: str) -> None:
        super().__init__([param], {})
        self.lr, self.weight_decay, self.fault = lr, 0.0 if fault == "decay-less" else weight_decay, fault
        self.momentum = torch.zeros_like(param, dtype=torch.float64)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        if self.fault == "no-op":
            return
        param = self.param_groups[0]["params"][0]
        grad = param.grad.double()
        beta1, beta2 = {"one beta": (0.99, 0.99), "swapped betas": (0.99, 0.9)}.get(self.fault, (0.9, 0.99))
        if self.fault == "momentum first":
            self.momentum.mul_(beta2).add_(grad, alpha=1 - beta2)
        update = (self.momentum * beta1 + grad * (1 - beta1)).sign()
        if self.fault == "sign-flipped":
            update = -update
        if self.fault == "coupled decay":
            update = (update + self.weight_decay * param.double()).sign()
            param.copy_(param.double() - self.lr * update)
        elif self.fault == "twice rounded":
            param.mul_(1 - self.lr * self.weight_decay).add_(update.to(param.dtype), alpha=-self.lr)
        else:  # "once-rounded" is this line alone, where the parameter is bf16
            param.copy_(param.double() - self.lr * (update + self.weight_decay * param.double()))
        if self.fault != "momentum first":
            self.momentum.mul_(beta2).add_(grad, alpha=1 - beta2)


def broken(fault: str) -> Factory:
    return lambda param, lr, decay: Broken(param, lr, decay, fault)


def test_the_control_passes() -> None:
    check_drift(broken("none"), torch.float32, 1.0)
    check_directions(broken("none"), torch.float32)


@pytest.mark.parametrize("fault", ["no-op", "sign-flipped", "decay-less", "coupled decay"])
def test_a_broken_lion_fails_the_drift_check(fault: str) -> None:
    with pytest.raises(AssertionError, match="drift"):
        check_drift(broken(fault), torch.float32, 1.0)


@pytest.mark.parametrize("fault", ["once-rounded", "twice rounded", "no-op", "sign-flipped", "decay-less"])
def test_a_broken_bf16_lion_fails_the_drift_check(fault: str) -> None:
    with pytest.raises(AssertionError, match="drift"):
        check_drift(broken(fault), torch.bfloat16, 1.0)


@pytest.mark.parametrize("fault", ["no-op", "sign-flipped", "one beta", "swapped betas", "momentum first"])
def test_a_broken_lion_fails_the_direction_check(fault: str) -> None:
    with pytest.raises(AssertionError, match="mean distance"):
        check_directions(broken(fault), torch.float32)
