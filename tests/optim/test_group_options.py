"""Arguments that are not allowed are refused in one sentence."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from lion_lightning.optim import Lion


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"lr": math.inf}, "lr=inf"),
        ({"lr": torch.tensor(-1.0)}, "lr=-1.0"),
        ({"lr": torch.ones(2)}, "lr is a tensor of shape"),
        ({"betas": (1.0, 0.9)}, r"betas=\(1.0, 0.9\)"),
        ({"betas": (0.9, -0.1)}, r"betas=\(0.9, -0.1\)"),
        ({"betas": (0.9,)}, "two numbers"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"weight_decay": math.nan}, "weight_decay=nan"),
        ({"weight_bits": 8}, "weight_bits=8 is not allowed: use one of 32, 24, 16"),
        ({"momentum_dtype": torch.float16}, "momentum_dtype=torch.float16"),
        ({"momentum_dtype": "int4"}, "momentum_dtype='int4'"),
        ({"nonfinite": "ignore"}, "nonfinite='ignore' is not allowed: use one of 'skip', 'propagate'"),
        ({"fused": "cuda"}, "fused='cuda'"),
        ({"cautious": 2}, "cautious=2"),
        ({"maximize": None}, "maximize=None"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 0.5}, "seed=0.5"),
    ],
)
def test_a_bad_option_is_named_with_its_value(options: dict[str, Any], message: str) -> None:
    param = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=message):
        Lion([param], **options)
    optimizer = Lion([param])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], **options})
    assert len(optimizer.param_groups) == 1


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        Lion([])


def test_a_misspelt_group_option_is_refused_and_a_foreign_one_is_not() -> None:
    with pytest.raises(ValueError, match="'weight_decy' is unknown: did you mean 'weight_decay'"):
        Lion([{"params": [nn.Parameter(torch.zeros(3))], "weight_decy": 0.1}])
    Lion([{"params": [nn.Parameter(torch.zeros(3))], "name": "head", "initial_lr": 1e-3}])


def test_fp16_parameters_are_refused_with_the_ways_out() -> None:
    with pytest.raises(ValueError, match=r"float16.*bfloat16 parameters.*float32 parameters with autocast"):
        Lion([nn.Parameter(torch.zeros(3, dtype=torch.float16))])


def test_parameters_of_other_dtypes_are_refused_where_they_train() -> None:
    with pytest.raises(ValueError, match=r"complex64, which is not allowed"):
        Lion([nn.Parameter(torch.zeros(3, dtype=torch.complex64))])
    Lion([torch.zeros(3, dtype=torch.int8)]).step()


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(10, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"sparse_coo is not allowed"):
        Lion(embedding.parameters()).step()


def test_an_option_made_wrong_mid_run_is_refused_at_the_next_step() -> None:
    param = nn.Parameter(torch.zeros(3))
    optimizer = Lion([param])
    param.grad = torch.ones(3)
    optimizer.param_groups[0]["weight_bits"] = 20
    with pytest.raises(ValueError, match="weight_bits=20"):
        optimizer.step()


def test_an_extreme_rate_warns_once_when_it_is_applied() -> None:
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        optimizer = Lion([param], lr=10)  # the base of a schedule may be as large as it likes
        optimizer.param_groups[0]["lr"] = 1e-3
        optimizer.step()
        assert not seen
        for lr in (10, 9):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
    assert len(seen) == 1
    assert "lr=10 moves every weight" in str(seen[0].message)
    assert "from_adamw" in str(seen[0].message)
