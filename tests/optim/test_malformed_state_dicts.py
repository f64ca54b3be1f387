"""Whole state dicts that do not fit, and options in them: refused with nothing changed, or filled in."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lion_lightning.optim import Lion
from tests.forks import in_a_fork
from tests.optim.exactness import assert_refused, assert_step_is_exact
from tests.optim.trained import FP32, SHAPE, random, trained

SIZE = "(250, 400)"
INT8 = {"momentum_dtype": "int8"}
State = dict[str, Any]


Edit = Callable[[dict[str, Any]], Any]
MALFORMED: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "empty": (lambda saved: {}, ("param_groups",)),
    "list": (lambda saved: [1, 2], ("list",)),
    "no state": (lambda saved: saved.pop("state") and saved, ("state",)),
    "state is a list": (lambda saved: saved.update(state=[1]), ("state", "list")),
    "groups are a dict": (lambda saved: saved.update(param_groups={"lr": 1.0}), ("param_groups", "dict")),
    "group is a list": (lambda saved: saved.update(param_groups=[[0, 1]]), ("param_groups", "list")),
    "group without params": (lambda saved: saved["param_groups"][0].pop("params") and saved, ("params",)),
    "params are a number": (lambda saved: saved["param_groups"][0].update(params=2), ("params", "2")),
    "params twice": (lambda saved: saved["param_groups"][0].update(params=[0, 0]), ("params", "[0, 0]")),
    "one parameter less": (lambda saved: saved["param_groups"][0].update(params=[0]), ("sizes [1]", "[2]")),
    "another group": (
        lambda saved: saved["param_groups"].append(dict(saved["param_groups"][0])),
        ("sizes [2, 2]", "[2]"),
    ),
    "state of no parameter": (lambda saved: saved["state"].update({7: {"exp_avg": torch.ones(2)}}), ("7",)),
    "state of an entry is a tensor": (
        lambda saved: saved["state"].update({1: torch.ones(2)}),
        ("parameter 1", "Tensor"),
    ),
    "unknown tensors": (
        lambda saved: saved["state"][1].update(exp_avg_sq=torch.ones(SHAPE), step=torch.tensor(2.0)),
        ("parameter 1", "exp_avg_sq", "exp_avg_scale"),
    ),
    "misspelt": (lambda saved: saved["state"][1].update(exp_avgs=saved["state"][1].pop("exp_avg")), ("exp_avgs",)),
    "exchanged": (
        lambda saved: saved.update(state={0: saved["state"][1], 1: saved["state"][0]}),
        ("parameter 0", "exp_avg", SIZE),
    ),
}
OPTION_VALUES: list[tuple[str, Any]] = [
    ("lr", -1.0),
    ("lr", float("nan")),
    ("lr", "0.1"),
    ("lr", None),
    ("lr", torch.ones(2)),
    ("lr", [0.1]),
    ("betas", (0.9, 1.0)),
    ("betas", (0.9,)),
    ("betas", 0.9),
    ("betas", ("a", "b")),
    ("betas", (0.9, float("nan"))),
    ("weight_decay", -0.1),
    ("weight_decay", float("inf")),
    ("weight_decay", None),
    ("weight_bits", 17),
    ("weight_bits", "32"),
    ("weight_bits", None),
    ("momentum_dtype", "int4"),
    ("momentum_dtype", torch.float16),
    ("momentum_dtype", 8),
    ("cautious", 2),
    ("cautious", "yes"),
    ("maximize", None),
    ("nonfinite", "ignore"),
    ("nonfinite", None),
    ("seed", -1),
    ("seed", 1.5),
    ("seed", 2**64),
    ("seed", None),
    ("step", -1),
    ("step", 1.5),
    ("step", "3"),
    ("step", None),
    ("step", float("nan")),
    ("step", 2**63),
    ("step", torch.ones(2)),
]


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_state_dict_is_refused(name: str) -> None:
    edit, words = MALFORMED[name]

    def check() -> None:
        _, optimizer = trained(FP32)
        saved = copy.deepcopy(optimizer.state_dict())
        result = edit(saved)
        edited = result if isinstance(result, (dict, list)) else saved
        assert_refused(lambda: optimizer.load_state_dict(edited), optimizer, *words)

    in_a_fork(check)


def test_options_out_of_range_are_refused_when_loaded() -> None:
    def check() -> None:
        _, optimizer = trained(FP32)
        for name, value in OPTION_VALUES:
            saved = copy.deepcopy(optimizer.state_dict())
            saved["param_groups"][0][name] = value
            assert_refused(lambda saved=saved: optimizer.load_state_dict(saved), optimizer, name)

    in_a_fork(check)


def test_what_a_tool_around_the_optimizer_keeps_is_loaded_as_it_is() -> None:
    """Lookahead (timm's, for one) has its slow weights in the state of the optimizer inside."""
    params, optimizer = trained(FP32, **INT8)
    optimizer.state[params[1]].update(slow=params[1].detach().half(), count=[3])
    saved = copy.deepcopy(optimizer.state_dict())
    fresh = Lion(params, **INT8)
    fresh.load_state_dict(saved)
    loaded = fresh.state[params[1]]
    assert torch.equal(loaded["slow"], params[1].detach().half())
    assert loaded["count"] == [3]
    assert loaded["slow"].data_ptr() != saved["state"][1]["slow"].data_ptr(), "nothing is shared with what was saved"
    assert loaded["count"] is not saved["state"][1]["count"]
    assert_step_is_exact(fresh, params[1], random(3, FP32), others=(params[0],))


def test_options_of_older_checkpoints_are_filled_in() -> None:
    _, optimizer = trained(FP32, cautious=True)
    saved = copy.deepcopy(optimizer.state_dict())
    for name in ("seed", "nonfinite", "momentum_dtype", "step"):
        saved["param_groups"][0].pop(name, None)
    saved["state"].pop(0)  # a parameter that never had a gradient
    params, fresh = trained(FP32, steps=0)
    fresh.load_state_dict(saved)
    group = fresh.param_groups[0]
    assert (group["seed"], group["nonfinite"], group["step"], group["cautious"]) == (0, "skip", 0, True)
    assert_step_is_exact(Lion(params, lr=1e-3), params[1], random(3, FP32), others=(params[0],))


@pytest.mark.parametrize("spelling", ["int8", torch.int8])
def test_the_momentum_dtype_loads_as_a_name_and_as_a_dtype(spelling: Any) -> None:
    params, optimizer = trained(FP32, **INT8)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["momentum_dtype"] = spelling
    fresh = Lion(params)
    fresh.load_state_dict(saved)
    assert_step_is_exact(fresh, params[1], random(3, FP32), others=(params[0],))
    assert fresh.state[params[1]]["exp_avg"].dtype == torch.int8
