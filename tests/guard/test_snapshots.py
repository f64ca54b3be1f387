"""A run that was put back goes on bit for bit as it did the first time, in the tensors that everybody holds."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from lion_lightning import Lion
from lion_lightning.guard.rules import Thresholds
from lion_lightning.guard.snapshots import Snapshot, SnapshotRing, repair, restore

LIMITS = Thresholds()
WIDE = 80  # matrices above the 4,096 elements from which on int8 momentum is used
OPTIMIZERS = {
    "lion fp32": (torch.float32, partial(Lion, lr=1e-3, weight_decay=0.1)),
    "lion fp32 int8": (torch.float32, partial(Lion, lr=1e-3, momentum_dtype="int8")),
    "lion fp32 bf16 momentum": (torch.float32, partial(Lion, lr=1e-3, momentum_dtype="bfloat16")),
    "lion bf16 32 bits": (torch.bfloat16, partial(Lion, lr=1e-3, weight_decay=0.1, weight_bits=32)),
    "lion bf16 24 bits": (torch.bfloat16, partial(Lion, lr=1e-3, weight_bits=24, momentum_dtype="int8")),
    "lion bf16 16 bits": (torch.bfloat16, partial(Lion, lr=1e-3, weight_bits=16, seed=3)),
    "adamw": (torch.float32, partial(AdamW, lr=1e-3)),
    "adamw fused": (torch.float32, partial(AdamW, lr=1e-3, fused=True)),
    "adamw amsgrad": (torch.float32, partial(AdamW, lr=1e-3, amsgrad=True)),
    "sgd momentum": (torch.float32, partial(SGD, lr=1e-2, momentum=0.9)),
    "sgd": (torch.float32, partial(SGD, lr=1e-2)),
}


class Net(nn.Sequential):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(1)
        super().__init__(nn.Linear(WIDE, WIDE), nn.BatchNorm1d(WIDE), nn.GELU(), nn.Linear(WIDE, 1))
        self.to(dtype)


def step(module, optimizer, number, scale=1.0):
    """One training step on a batch that depends on its number alone."""
    dice = torch.Generator().manual_seed(number)
    inputs = scale * torch.randn(16, WIDE, generator=dice).to(module[0].weight.dtype)
    optimizer.zero_grad()
    module(inputs).float().square().mean().backward()
    optimizer.step()


def everything(module, optimizer):
    """All that a run is: weights, buffers, optimizer state, counters of groups; as bits that compare, NaN included."""
    tensors = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    for index, param in enumerate(module.parameters()):
        for key, value in optimizer.state.get(param, {}).items():
            tensors[f"{index}.{key}"] = torch.as_tensor(value).clone()
    for index, group in enumerate(optimizer.param_groups):
        tensors[f"group {index}"] = torch.as_tensor(group.get("step", 0)).clone()
    return tensors


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor.view(-1).view(torch.uint8), right[name].view(-1).view(torch.uint8)), name


def run(name, steps=3):
    dtype, make = OPTIMIZERS[name]
    module = Net(dtype)
    optimizer = make(module.parameters())
    for number in range(steps):
        step(module, optimizer, number)
    ring = SnapshotRing(LIMITS)
    ring.ring.append(Snapshot.of_run(steps, module, [optimizer], [{}]))
    return module, optimizer, ring.newest


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_put_back_is_what_was_and_goes_on_the_same(name):
    module, optimizer, snapshot = run(name)
    then = everything(module, optimizer)
    for number in range(3, 6):
        step(module, optimizer, number)
    later = everything(module, optimizer)
    assert not torch.equal(then["0.weight"], later["0.weight"])
    for number in range(6, 9):
        step(module, optimizer, number, scale=1e3)
    restore(snapshot, module, [optimizer])
    assert_same(then, everything(module, optimizer))
    for number in range(3, 6):
        step(module, optimizer, number)
    assert_same(later, everything(module, optimizer))


@pytest.mark.parametrize("name", ["lion fp32", "lion bf16 24 bits", "adamw"])
def test_tensors_stay_where_they_are(name):
    module, optimizer, snapshot = run(name)
    places = [tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())]
    held = [value for state in optimizer.state.values() for value in state.values()]
    step(module, optimizer, 3)
    restore(snapshot, module, [optimizer])
    assert [tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())] == places
    assert all(
        now is before
        for now, before in zip((v for state in optimizer.state.values() for v in state.values()), held, strict=True)
    )


def test_a_snapshot_does_not_change_with_the_run_nor_with_what_is_put_back():
    module, optimizer, snapshot = run("lion fp32")
    kept = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
    for _ in range(2):
        step(module, optimizer, 3)
        restore(snapshot, module, [optimizer])
        step(module, optimizer, 4)
        assert_same(kept, snapshot.tensors)


@pytest.mark.parametrize("name", ["lion fp32", "adamw", "sgd momentum"])
def test_state_that_did_not_exist_yet_is_gone_again(name):
    module, optimizer, snapshot = run(name, steps=0)
    step(module, optimizer, 0)
    after_one = everything(module, optimizer)
    restore(snapshot, module, [optimizer])
    assert not any(optimizer.state.get(param) for param in module.parameters())
    step(module, optimizer, 0)
    assert_same(after_one, everything(module, optimizer))


def test_the_learning_rate_is_the_schedules_and_stays():
    module, optimizer, snapshot = run("lion fp32")
    optimizer.param_groups[0]["lr"] = 7e-5
    restore(snapshot, module, [optimizer])
    assert optimizer.param_groups[0]["lr"] == 7e-5


def test_several_optimizers_are_put_back_each_with_its_own():
    module = Net()
    optimizers = [Lion(module[0].parameters(), lr=1e-3), AdamW(module[3].parameters(), lr=1e-3)]
    ring = SnapshotRing(LIMITS)

    def both(number):
        for optimizer in optimizers:
            step(module, optimizer, number)

    both(0)
    ring.ring.append(Snapshot.of_run(1, module, optimizers, [{}, {}]))
    before = [everything(module, optimizer) for optimizer in optimizers]
    both(1)
    restore(ring.newest, module, optimizers)
    for optimizer, then in zip(optimizers, before, strict=True):
        assert_same(then, everything(module, optimizer))


def test_repair_puts_back_what_is_not_finite_and_nothing_else():
    module, optimizer, snapshot = run("adamw")
    step(module, optimizer, 3)
    now = everything(module, optimizer)
    first = next(module.parameters())
    with torch.no_grad():
        first.view(-1)[[0, 7]] = torch.tensor([torch.nan, torch.inf])
        optimizer.state[first]["exp_avg"].view(-1)[5] = -torch.inf
        module[1].running_var[2] = torch.nan
    assert repair(snapshot, module, [optimizer]) == 4
    repaired = everything(module, optimizer)
    old = snapshot.optimizers[0]["state"][0]["exp_avg"]
    assert torch.equal(first.view(-1)[[0, 7]], snapshot.tensors["0.weight"].view(-1)[[0, 7]])
    assert repaired["0.exp_avg"].view(-1)[5] == old.view(-1)[5]
    assert repaired["1.running_var"][2] == snapshot.tensors["1.running_var"][2]
    for name in now:
        differs = (now[name] != repaired[name]).sum()
        assert differs <= {"0.weight": 2, "0.exp_avg": 1, "1.running_var": 1}.get(name, 0), name


def test_repair_of_what_did_not_exist_starts_at_zero():
    module, optimizer, snapshot = run("lion fp32", steps=0)
    step(module, optimizer, 0)
    momentum = optimizer.state[next(module.parameters())]["exp_avg"]
    momentum.view(-1)[3] = torch.nan
    others = momentum.view(-1)[4:].clone()
    assert repair(snapshot, module, [optimizer]) == 1
    assert momentum.view(-1)[3] == 0
    assert torch.equal(momentum.view(-1)[4:], others)


def test_repair_reaches_the_scales_of_an_int8_momentum():
    module, optimizer, snapshot = run("lion fp32 int8")
    state = optimizer.state[next(module.parameters())]
    state["exp_avg_scale"][1] = torch.nan
    assert repair(snapshot, module, [optimizer]) == 1
    assert state["exp_avg_scale"][1] == snapshot.optimizers[0]["state"][0]["exp_avg_scale"][1]


def ring_of(*steps, trusted=()):
    ring = SnapshotRing(LIMITS)
    for at in steps:
        ring.ring.append(Snapshot.of_run(at, nn.Linear(1, 1), [], [], trusted=at in trusted))
    return ring


def test_a_snapshot_is_due_at_once_and_then_every_hundred_steps():
    ring = SnapshotRing(LIMITS)
    assert ring.is_due(0)
    assert [ring_of(0).is_due(step) for step in (1, 99, 100)] == [False, False, True]


def test_the_ring_keeps_the_newest_three():
    assert [kept.step for kept in ring_of(0, 100, 200, 300).ring] == [100, 200, 300]


def test_the_newest_with_a_hundred_healthy_steps_behind_it_is_proven_and_what_is_newer_is_dropped():
    ring = ring_of(0, 100, 200)
    assert ring.proven(step=250).step == 100
    assert [kept.step for kept in ring.ring] == [0, 100]


def test_the_older_one_is_the_oldest():
    ring = ring_of(0, 100, 200)
    assert ring.proven(step=350, older=True).step == 0
    assert [kept.step for kept in ring.ring] == [0]


def test_none_is_proven_too_early_unless_it_is_trusted():
    assert ring_of(0).proven(step=99) is None
    assert SnapshotRing(LIMITS).proven(step=500) is None
    assert ring_of(0, trusted=(0,)).proven(step=5).step == 0


def test_a_restored_ring_restores_the_run():
    module, optimizer, snapshot = run("lion bf16 24 bits")
    then, ring, again = everything(module, optimizer), SnapshotRing(LIMITS), SnapshotRing(LIMITS)
    ring.ring.append(snapshot)
    again.load_state_dict(ring.state_dict())
    step(module, optimizer, 3)
    restore(again.newest, module, [optimizer])
    assert_same(then, everything(module, optimizer))


def test_lists_of_tensors_in_a_state_go_back_too():
    """LBFGS keeps its history in lists, which it changes in place."""
    net, inputs = nn.Linear(WIDE, 1), torch.randn(16, WIDE)
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = (net(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    kept, before = Snapshot.of_run(1, net, [optimizer], [{}]), copy.deepcopy(optimizer.state_dict()["state"][0])
    twice = []
    for _ in range(2):
        optimizer.step(closure)
        twice.append(net.weight.detach().clone())
        assert restore(kept, net, [optimizer]) == []
        after = optimizer.state_dict()["state"][0]
        assert after.keys() == before.keys()
        for key, value in before.items():
            if isinstance(value, list):
                assert len(after[key]) == len(value)
                pairs = zip(after[key], value, strict=True)
                assert all(torch.equal(one, other) for one, other in pairs if isinstance(one, torch.Tensor)), key
    assert torch.equal(*twice)


def test_a_parameter_that_was_frozen_since_goes_back_with_its_state():
    net = nn.Linear(2, 2)
    optimizer = SGD(net.parameters(), lr=1.0, momentum=0.9)
    kept, before = Snapshot.of_run(0, net, [optimizer], [{}]), net.weight.detach().clone()
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    net.weight.requires_grad_(False)
    assert restore(kept, net, [optimizer]) == []
    assert torch.equal(net.weight, before)


def test_a_repair_leaves_alone_what_cannot_be_written_or_has_no_values():
    net = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))
    net.register_buffer("mask", torch.full((1,), -torch.inf).expand(4, 4))
    net.register_parameter("spectrum", nn.Parameter(torch.ones(2, dtype=torch.complex64)))
    optimizer = SGD([*net[0].parameters(), net.spectrum], lr=0.1, momentum=0.9)
    (net[0](torch.ones(1, 2)).sum() + net.spectrum.abs().sum()).backward()
    optimizer.step()
    kept = Snapshot.of_run(1, net, [optimizer], [{}])
    weights = [net[0].weight, net.spectrum]
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        weights[0].fill_(torch.nan)
        weights[1][1] = complex(1.0, math.nan)
    optimizer.state[weights[0]]["momentum_buffer"].fill_(torch.nan)
    assert repair(kept, net, [optimizer]) == 9
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
    assert bool(optimizer.state[weights[0]]["momentum_buffer"].isfinite().all())
