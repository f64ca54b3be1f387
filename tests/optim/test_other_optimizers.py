"""Checkpoints of other optimizers: refused, loaded exactly, or refused with the command that converts them."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lion_lightning.optim import Lion
from tests.forks import in_a_fork
from tests.optim.exactness import assert_refused, assert_step_is_exact
from tests.optim.trained import FP32, random, trained

OTHERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-3),
    "Adam, amsgrad": lambda params: torch.optim.Adam(params, lr=1e-3, amsgrad=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "SGD, momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=1e-3),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-3),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=1e-3),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-3),
    "Adamax": lambda params: torch.optim.Adamax(params, lr=1e-3),
    "Rprop": lambda params: torch.optim.Rprop(params, lr=1e-3),
}


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", OTHERS)
def test_the_checkpoint_of_another_optimizer_is_refused(name: str, steps: int) -> None:
    """Its rate alone would be ten times too large for Lion."""

    def check() -> None:
        params, lion = trained(FP32)
        other = OTHERS[name](params)
        for _ in range(steps):
            other.step()
        for saved in (other.state_dict(), {**other.state_dict(), "state": {}}):
            message = assert_refused(lambda saved=saved: lion.load_state_dict(saved), lion, "from_adamw")
            assert "Lion" in message

    in_a_fork(check)


PEER_STATES = Path(__file__).parent / "peer_states"


@pytest.mark.parametrize(
    "name",
    [
        "bitsandbytes_8bit",
        "bitsandbytes_32bit",
        "deepspeed_cpu",
        "optimi",
        "flashlion",
        "lion_pytorch",
        "timm",
        "pytorch_optimizer",
    ],
)
def test_another_lion_loads_exactly_or_with_the_command_that_converts(name: str) -> None:
    def check() -> None:
        for dtype in ("float32", "bfloat16"):
            saved = torch.load(PEER_STATES / f"{name}_{dtype}.pt", weights_only=True)
            params = [nn.Parameter(weight.clone()) for weight in saved["weights"]]
            lion = Lion(params, lr=5e-4)
            before = copy.deepcopy(saved["optimizer"]["state"])
            if name in ("lion_pytorch", "timm", "pytorch_optimizer"):
                lion.load_state_dict(saved["optimizer"])
                exact = before[0]["exp_avg"].double()
                grad = random(3, params[0].dtype, tuple(params[0].shape))
                assert_step_is_exact(lion, params[0], grad, momentum=exact, others=tuple(params[1:]))
            else:
                words = ("import_state", "lion-convert", name.split("_")[0])
                assert_refused(lambda lion=lion, saved=saved: lion.load_state_dict(saved["optimizer"]), lion, *words)

    in_a_fork(check)


def test_an_option_that_a_plain_load_would_lose_is_refused() -> None:
    _, lion = trained(FP32)
    params, plain = trained(FP32)
    saved = {
        "state": {index: {"exp_avg": plain.state[param]["exp_avg"]} for index, param in enumerate(params)},
        "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0, "caution": True, "params": [0, 1]}],
    }
    assert_refused(lambda: lion.load_state_dict(saved), lion, "caution", "import_state")
    saved["param_groups"][0]["caution"] = False
    lion.load_state_dict(saved)
