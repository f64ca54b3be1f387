"""MuonWithLion is torch's Muon and our Lion, each on its parameters, and one optimizer to everybody else."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lion_lightning.hyperparams import parameter_groups
from lion_lightning.optim import Lion
from lion_lightning.optim.muon import MuonWithLion

LION = {"lr": 2e-3, "betas": (0.95, 0.98), "weight_decay": 0.3}


class Net(nn.Module):
    """An embedding, a matrix, a convolution, a norm and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.dense = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.conv, self.norm, self.classifier = nn.Conv1d(8, 8, 3, padding=1), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.relu(self.dense(self.embedding(tokens)))
        return self.classifier(self.norm(self.conv(hidden.mT).mT).mean(1))


def net(seed: int = 1) -> Net:
    torch.manual_seed(seed)
    return Net()


def optimizer_of(model: nn.Module) -> MuonWithLion:
    return MuonWithLion(parameter_groups(model, 0.1), lr=1e-2, momentum=0.9, lion=LION)


def advance(model: nn.Module, *optimizers: Optimizer, steps: int = 3, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens = torch.randint(20, (6, 5), generator=generator)
        model(tokens).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_each_parameter_gets_the_update_of_its_own_optimizer() -> None:
    model, twin = net(), net()
    optimizer = optimizer_of(model)
    named = dict(twin.named_parameters())
    decays = ["embedding.weight", "conv.weight", "classifier.weight"]
    muon = Muon([named["dense.weight"]], lr=1e-2, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    rest = [name for name in named if name not in (*decays, "dense.weight")]
    groups = [
        {"params": [named[name] for name in names], "weight_decay": decay}
        for names, decay in ((decays, 0.3), (rest, 0.0))
    ]
    lion = Lion(groups, lr=2e-3, betas=(0.95, 0.98))
    advance(model, optimizer)
    advance(twin, muon, lion)
    assert same(model, twin)
    assert [group["name"] for group in optimizer.param_groups] == ["decay/muon", "decay/lion", "no_decay/lion"]


def test_without_names_every_matrix_goes_to_muon() -> None:
    optimizer = MuonWithLion(list(net().parameters()))
    assert [len(group["params"]) for group in optimizer.param_groups] == [3, 6]
    assert len(MuonWithLion([torch.ones(3)]).param_groups) == len(MuonWithLion([torch.ones(3, 3)]).param_groups) == 1


def test_a_schedule_and_a_later_group_reach_both() -> None:
    model = net()
    optimizer = optimizer_of(model)
    LambdaLR(optimizer, lambda step: 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-3, 1e-3, 1e-3]
    extra = nn.Linear(4, 4)
    optimizer.add_param_group({"params": list(extra.named_parameters()), "lr": 2e-2})
    assert [group["lr"] for group in optimizer.param_groups[3:]] == [2e-2, 4e-3]
    before = copy.deepcopy(extra)
    extra(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(extra.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("how", ["state_dict", "distributed", "deepcopy", "pickle"])
def test_a_copy_goes_on_bit_for_bit(how: str) -> None:
    model = net()
    optimizer = optimizer_of(model)
    advance(model, optimizer)
    if how == "deepcopy":
        twin, other = copy.deepcopy((model, optimizer))
    elif how == "pickle":
        twin, other = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        twin = copy.deepcopy(model)
        other = MuonWithLion(parameter_groups(twin, 0.5), lr=7.0)
        if how == "state_dict":
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        else:
            options = StateDictOptions(full_state_dict=True)
            saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
            set_optimizer_state_dict(twin, other, saved, options=options)
    advance(model, optimizer, seed=6)
    advance(twin, other, seed=6)
    assert same(model, twin)


def test_a_foreign_state_is_refused_and_changes_nothing() -> None:
    model = net()
    optimizer = optimizer_of(model)
    advance(model, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    foreign = AdamW(parameter_groups(model, 0.1))
    for saved in (foreign.state_dict(), MuonWithLion(list(model.parameters())).state_dict()):
        with pytest.raises(ValueError, match="allowed here are"):
            optimizer.load_state_dict(saved)
    assert str(optimizer.state_dict()) == str(before)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda saved: {}, "param_groups"),
        (lambda saved: [1], "list"),
        (lambda saved: saved["state"][0].update(momentum_buffer=torch.ones(3)), r"parameter 0.*\(3,\)"),
        (lambda saved: saved["state"].update({0: torch.ones(3)}), r"parameter 0.*\(3,\)"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(edit: Any, named: str) -> None:
    model = net()
    optimizer = optimizer_of(model)
    advance(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    advance(model, optimizer, seed=9)  # what is refused is of another time
    before = copy.deepcopy(optimizer.state_dict())
    assert "ns_steps" in optimizer.param_groups[0], "parameter 0 is Muon's"
    edited = edit(saved)
    with pytest.raises(ValueError, match=named):
        optimizer.load_state_dict(saved if edited is None else edited)
    now = optimizer.state_dict()
    assert now["param_groups"] == before["param_groups"]
    torch.testing.assert_close(now["state"], before["state"], rtol=0, atol=0)


def test_hooks_on_load_state_dict_run() -> None:
    """A pre-hook may replace the state dict, as with any optimizer of torch."""
    model = net()
    optimizer = optimizer_of(model)
    advance(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    calls: list[str] = []

    def unpacked(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append("before")
        return state_dict["packed"]

    other = optimizer_of(copy.deepcopy(model))
    other.register_load_state_dict_pre_hook(unpacked)
    other.register_load_state_dict_post_hook(lambda _: calls.append("after"))
    other.load_state_dict({"packed": saved})
    assert calls == ["before", "after"]
    loaded = other.state_dict()
    assert loaded["param_groups"] == saved["param_groups"]
    assert str(sorted(loaded["state"].items())) == str(sorted(saved["state"].items()))


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        MuonWithLion([])
    with pytest.raises(ValueError, match="betas"):
        MuonWithLion([torch.ones(2)], lion={"betas": (0.9, 1.5)})
    with pytest.raises(ValueError, match="Learning rate"):
        MuonWithLion([torch.ones(2, 2)], lr=-1.0)


def test_groups_that_were_replaced_are_those_of_the_step() -> None:
    """Lightning's callbacks that freeze assign a new list of groups to an optimizer that resumes."""
    model = net()
    optimizer = optimizer_of(model)
    model(torch.arange(12).view(3, 4)).square().sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    optimizer.param_groups = [{**group, "lr": 0.0} for group in optimizer.param_groups]
    before = [param.detach().clone() for param in model.parameters()]
    optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert not any(torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))
