"""The fp32 weights behind a bf16 model: exact export, and seeding from fp32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lion_lightning.optim import Lion
from lion_lightning.optim.state import full_precision_state_dict, seed_full_precision
from tests.reference.lion import Lion64
from tests.reference.storage import kept_weight, weight_spacing


class Tied(nn.Module):
    """An embedding tied to the output, a norm, and buffers of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.norm = nn.LayerNorm(16)
        self.output = nn.Linear(16, 40, bias=False)
        self.output.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("count", torch.tensor(7))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.norm(self.embedding(tokens)))


def trained(weight_bits: int = 32, steps: int = 5) -> tuple[Tied, Lion]:
    torch.manual_seed(0)
    model = Tied().bfloat16()
    optimizer = Lion(model.parameters(), lr=4e-5, weight_decay=0.1, weight_bits=weight_bits)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        model(torch.randint(0, 40, (8,), generator=generator)).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("weight_bits", [32, 24, 16])
def test_the_export_is_exact(weight_bits: int) -> None:
    model, optimizer = trained(weight_bits)
    exported = full_precision_state_dict(model, optimizer)
    assert list(exported) == list(model.state_dict())
    for name, param in model.named_parameters():
        assert exported[name].dtype == torch.float32
        exact = kept_weight(param, optimizer.state[param].get("weight_remainder"))
        assert torch.equal(exported[name].double(), exact)
        assert torch.equal(exported[name], param.float()) == (weight_bits == 16)
    assert torch.equal(exported["count"], torch.tensor(7))


def test_at_32_bits_the_export_is_the_fp32_run() -> None:
    param = nn.Parameter(torch.randn(500, generator=torch.Generator().manual_seed(0)).bfloat16())
    optimizer = Lion([param], lr=4e-5, weight_decay=0.1)
    oracle = Lion64(param, 4e-5, 0.9, 0.99, 0.1)
    for step in range(50):
        param.grad = torch.ones(500, dtype=torch.bfloat16) * (-1) ** (step % 3)
        optimizer.step()
        oracle.step(param.grad)
    exported = full_precision_state_dict(nn.ParameterList([param]), optimizer)["0"]
    bound = 50 * weight_spacing(oracle.weight, torch.float32, 32)
    assert ((exported.double() - oracle.weight).abs() <= bound).all()
    assert ((param.double() - oracle.weight).abs() > 100 * bound).any()


def test_tied_weights_are_converted_and_saved_once(tmp_path: Path) -> None:
    model, optimizer = trained()
    exported = full_precision_state_dict(model, optimizer)
    assert exported["embedding.weight"] is exported["output.weight"]
    torch.save(exported, tmp_path / "tied.pt")
    torch.save({**exported, "output.weight": exported["output.weight"].clone()}, tmp_path / "twice.pt")
    assert (tmp_path / "twice.pt").stat().st_size > (tmp_path / "tied.pt").stat().st_size + 40 * 16 * 4
    fp32 = Tied()
    fp32.load_state_dict(exported)
    assert torch.equal(fp32.output.weight, exported["embedding.weight"])
    assert fp32.output.weight is fp32.embedding.weight


def test_exporting_changes_nothing() -> None:
    model, optimizer = trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exported = full_precision_state_dict(model, optimizer)
    for value in exported.values():
        value.zero_()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_seeding_is_the_inverse_of_the_export() -> None:
    model, optimizer = trained()
    exported = full_precision_state_dict(model, optimizer)
    fresh = Tied().bfloat16()
    other = Lion(fresh.parameters(), lr=4e-5)
    seed_full_precision(fresh, other, exported)
    for param, twin in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(param, twin)
        assert torch.equal(optimizer.state[param]["weight_remainder"], other.state[twin]["weight_remainder"])
    again = full_precision_state_dict(fresh, other)
    assert all(torch.equal(again[name], exported[name]) for name in exported)


@pytest.mark.parametrize("weight_bits", [32, 24, 16])
def test_an_fp32_checkpoint_seeds_every_mode_to_its_own_rounding(weight_bits: int) -> None:
    torch.manual_seed(1)
    fp32 = Tied()
    weights = fp32.state_dict()
    model = Tied().bfloat16()
    optimizer = Lion(model.parameters(), lr=1e-4, weight_bits=weight_bits)
    seed_full_precision(model, optimizer, weights)
    for name, param in model.named_parameters():
        kept = kept_weight(param, optimizer.state[param].get("weight_remainder"))
        exact = weights[name].double()
        bound = weight_spacing(exact, torch.bfloat16, weight_bits) / 2
        assert ((kept - exact).abs() <= bound).all()
        if weight_bits == 32:
            assert torch.equal(kept, exact)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert all("exp_avg" in optimizer.state[param] for param in model.parameters())


def test_a_seeded_run_takes_its_first_step_from_the_fp32_weight() -> None:
    model = nn.Linear(64, 64, bias=False).bfloat16()
    full = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    optimizer = Lion(model.parameters(), lr=4e-5, weight_decay=0.1)
    seed_full_precision(model, optimizer, {"weight": full})
    model.weight.grad = torch.ones(64, 64, dtype=torch.bfloat16)
    optimizer.step()
    exported = full_precision_state_dict(model, optimizer)["weight"]
    torch.testing.assert_close(exported, full - 4e-5 * (1 + 0.1 * full), rtol=0, atol=2**-22)


def test_fp32_parameters_and_frozen_ones_are_copied() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).bfloat16())
    optimizer = Lion(model[0].parameters(), lr=1e-4)
    weights = {name: torch.full(value.shape, 0.3) for name, value in model.state_dict().items()}
    seed_full_precision(model, optimizer, weights)
    assert torch.equal(model[0].weight, weights["0.weight"])
    assert torch.equal(model[1].weight, weights["1.weight"].bfloat16())
    assert not optimizer.state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"missing": "norm.bias"}, r"first missing are \['norm.bias'\]"),
        ({"extra": torch.ones(1)}, r"unknown \['extra'\]"),
        ({"norm.bias": torch.ones(5)}, r"weights\['norm.bias'\] has shape \(5,\)"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(change: dict[str, Any], message: str) -> None:
    model, optimizer = trained()
    before = full_precision_state_dict(model, optimizer)
    weights: dict[str, Any] = {name: value + 1 for name, value in before.items()}
    missing = change.pop("missing", None)
    weights.update(change)
    weights.pop(missing, None)
    with pytest.raises(ValueError, match=message):
        seed_full_precision(model, optimizer, weights)
    after = full_precision_state_dict(model, optimizer)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_transposed_storage_is_exported_element_by_element() -> None:
    param = nn.Parameter(torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).bfloat16().t())
    optimizer = Lion([param], lr=4e-5)
    param.grad = torch.ones_like(param)
    optimizer.step()
    exported = full_precision_state_dict(nn.ParameterList([param]), optimizer)["0"]
    words = param.detach().contiguous().view(torch.int16).long() * 65536
    words = words + optimizer.state[param]["weight_remainder"].long()
    assert torch.equal(exported, words.to(torch.int32).view(torch.float32))
