"""Lion follows the conventions of torch.optim, one by one; what a step leaves behind, and what can be given to it."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from lion_lightning.optim import Lion, Signum
from lion_lightning.optim.state import full_precision_state_dict, momentum_slice

MODES: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {}),
    (torch.float32, {"momentum_dtype": "bfloat16"}),
    (torch.float32, {"momentum_dtype": "int8"}),
    (torch.float64, {}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"weight_bits": 24, "momentum_dtype": "int8"}),
    (torch.bfloat16, {"weight_bits": 16, "momentum_dtype": "float32"}),
    (torch.bfloat16, {"weight_bits": 16, "momentum_dtype": "int8", "seed": 7}),
]
each_mode = pytest.mark.parametrize(("dtype", "options"), MODES)


def random_param(dtype: torch.dtype = torch.float32, *shape: int) -> nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    return nn.Parameter((torch.randn(shape or (70, 80), generator=generator) * 0.03).to(dtype))


def advance(optimizer: Lion, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        for group in optimizer.param_groups:
            for param in group["params"]:
                generator = torch.Generator().manual_seed(step)
                param.grad = (torch.randn(param.shape, generator=generator) * 1e-3).to(param.dtype)
        optimizer.step()


def assert_same_future(optimizer: Lion, other: Lion) -> None:
    """Both take two more steps and stay equal in every bit."""
    for lion in (optimizer, other):
        advance(lion, 10, 2)
    left, right = (lion.param_groups[0]["params"][0] for lion in (optimizer, other))
    assert torch.equal(left, right)
    for key, value in optimizer.state[left].items():
        assert other.state[right][key].dtype == value.dtype
        assert torch.equal(other.state[right][key], value)


@each_mode
def test_a_checkpoint_on_disk_is_bit_exact(dtype: torch.dtype, options: dict[str, Any]) -> None:
    optimizer = Lion([random_param(dtype)], lr=1e-4, weight_decay=0.1, **options)
    advance(optimizer, 0, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = nn.Parameter(optimizer.param_groups[0]["params"][0].detach().clone())
    resumed = Lion([twin])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert_same_future(optimizer, resumed)


@each_mode
def test_deepcopy_and_pickle_keep_everything(dtype: torch.dtype, options: dict[str, Any]) -> None:
    optimizer = Lion([random_param(dtype)], lr=1e-4, weight_decay=0.1, **options)
    advance(optimizer, 0, 3)
    copied = copy.deepcopy(optimizer)
    pickled = pickle.loads(pickle.dumps(optimizer))
    advance_twin = copy.deepcopy(optimizer)
    assert_same_future(optimizer, copied)
    assert_same_future(advance_twin, pickled)


@each_mode
def test_a_step_at_lr_zero_without_gradient_changes_nothing(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """What torch.distributed.checkpoint does to make an optimizer's state exist."""
    param = random_param(dtype)
    before = param.detach().clone()
    optimizer = Lion([param], lr=0.0, weight_decay=0.1, **options)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(param, before)
    assert optimizer.param_groups[0]["step"] == 0
    assert not any(value.any() for value in optimizer.state[param].values())


def test_a_state_of_another_lion_with_exp_avg_alone_loads() -> None:
    """lion-pytorch and timm keep one tensor named exp_avg and no step counter."""
    param = random_param(torch.bfloat16)
    optimizer = Lion([{"params": [param], "weight_bits": 16, "name": "decay"}], lr=1e-4, weight_decay=0.1)
    saved = {
        "state": {0: {"exp_avg": torch.ones_like(param)}},
        "param_groups": [{"params": [0], "lr": 3e-4, "betas": (0.95, 0.98), "weight_decay": 0.2}],
    }
    optimizer.load_state_dict(saved)
    advance(optimizer, 0, 1)
    assert optimizer.param_groups[0]["betas"] == (0.95, 0.98)
    assert optimizer.param_groups[0]["step"] == 1
    assert (optimizer.param_groups[0]["weight_bits"], optimizer.param_groups[0]["name"]) == (16, "decay")
    assert optimizer.state[param]["exp_avg"].mean() > 0.9


def test_loading_a_state_of_other_groups_is_refused() -> None:
    saved = Lion([random_param(), random_param()]).state_dict()
    with pytest.raises(ValueError, match=r"sizes \[2\]; allowed here are \[1\]"):
        Lion([random_param()]).load_state_dict(saved)


def test_state_dict_hooks_run() -> None:
    optimizer, seen = Lion([random_param()]), []
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("save"))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append("before"))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("after"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["save", "before", "after"]


def test_step_hooks_and_closures_run() -> None:
    param, seen = random_param(), []
    optimizer = Lion([param])
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    before = param.square().sum().item()
    assert optimizer.step(closure).item() == pytest.approx(before)
    assert seen == ["before", "after"]
    assert param.square().sum() < before


def test_options_differ_per_group() -> None:
    still, descends, ascends = (random_param() for _ in range(3))
    groups = [
        {"params": [still], "lr": 0.0},
        {"params": [descends], "weight_decay": 1.0, "betas": (0.5, 0.5)},
        {"params": [ascends], "maximize": True, "lr": 1e-2, "momentum_dtype": "bfloat16"},
    ]
    optimizer = Lion(groups, lr=1e-3)
    start = still.detach().clone()
    for param in (still, descends, ascends):
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert torch.equal(still, start)
    torch.testing.assert_close(descends.detach(), start - 1e-3 * (1 + start))
    torch.testing.assert_close(ascends.detach(), start + 1e-2)
    assert optimizer.state[ascends]["exp_avg"].dtype == torch.bfloat16


def test_a_group_added_later_takes_part() -> None:
    first, second = random_param(), random_param()
    optimizer = Lion([first], lr=1e-3)
    advance(optimizer, 0, 1)
    optimizer.add_param_group({"params": second, "lr": 1e-2})
    second.grad = torch.ones_like(second)
    start = second.detach().clone()
    optimizer.step()
    torch.testing.assert_close(second.detach(), start - 1e-2)


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2), torch.tensor([1e-2])])
def test_lr_may_be_a_number_or_a_tensor_and_may_change(lr: float | Tensor) -> None:
    param = random_param()
    optimizer = Lion([param], lr=lr)
    start = param.detach().clone()
    param.grad = torch.ones_like(param)
    optimizer.step()
    if isinstance(lr, Tensor):
        lr.mul_(2)
    else:
        optimizer.param_groups[0]["lr"] = 2e-2
    optimizer.step()
    torch.testing.assert_close(param.detach(), start - 3e-2)


def test_schedulers_of_torch_drive_it() -> None:
    param = random_param()
    optimizer = Lion([param], lr=1e-2)
    makers = [
        lambda: lr_scheduler.LambdaLR(optimizer, lambda step: 0.5),
        lambda: lr_scheduler.CosineAnnealingLR(optimizer, 10),
        lambda: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10),
        lambda: lr_scheduler.CyclicLR(optimizer, 1e-3, 1e-2, cycle_momentum=False),
        lambda: lr_scheduler.ReduceLROnPlateau(optimizer),
        lambda: lr_scheduler.SequentialLR(
            optimizer,
            [lr_scheduler.LinearLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)],
            milestones=[2],
        ),
    ]
    for make in makers:
        scheduler = make()
        for step in range(4):
            rate, before = optimizer.param_groups[0]["lr"], param.detach().clone()
            advance(optimizer, step, 1)
            assert (param.detach() - before).abs().max() == pytest.approx(rate, rel=1e-3)
            scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))


def test_tied_weights_step_once() -> None:
    param, other = random_param(), random_param()
    start = param.detach().clone()
    optimizer = Lion([param, other, param], lr=1e-2)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(param), id(other)]
    param.grad = torch.ones_like(param)
    optimizer.step()
    torch.testing.assert_close(param.detach(), start - 1e-2)
    with pytest.raises(ValueError, match="more than one parameter group"):
        Lion([{"params": [param]}, {"params": [param]}])


def test_parameters_without_gradient_are_left_alone() -> None:
    frozen, unused, used = random_param().requires_grad_(False), random_param(), random_param()
    optimizer = Lion([frozen, unused, used], lr=1e-2)
    before = frozen.detach().clone()
    used.grad = torch.ones_like(used)
    optimizer.step()
    assert torch.equal(frozen, before)
    assert torch.equal(unused, before)
    assert set(optimizer.state) == {used}


@each_mode
def test_gradients_are_never_written(dtype: torch.dtype, options: dict[str, Any]) -> None:
    param = random_param(dtype)
    optimizer = Lion([param], maximize=True, cautious=True, **options)
    optimizer.grad_scale = torch.tensor(8.0)
    param.grad = torch.full_like(param, 0.5)
    version = param.grad._version
    optimizer.step()
    assert param.grad._version == version
    assert (param.grad == 0.5).all()


def test_expanded_gradients_and_gaps_in_memory_work() -> None:
    gaps = nn.Parameter(torch.ones(6, 10)[:, ::2])
    gaps.sum().backward()
    assert gaps.grad is not None
    gaps.grad = torch.ones(()).expand(6, 5)
    optimizer = Lion([gaps], lr=1e-2)
    optimizer.step()
    torch.testing.assert_close(gaps.detach(), torch.full((6, 5), 0.99))
    with pytest.raises(ValueError, match="expanded tensor"):
        Lion([torch.ones(1).expand(5).requires_grad_()])


def test_a_state_in_another_layout_is_brought_into_line() -> None:
    values = torch.randn(8, 8, 9, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    contiguous = nn.Parameter(values.clone())
    last = nn.Parameter(values.clone(memory_format=torch.channels_last))
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "momentum_dtype": "float32"}
    optimizer, other = Lion([contiguous], **options), Lion([last], **options)
    advance(optimizer, 0, 2)
    with torch.no_grad():
        last.copy_(contiguous)
    other.load_state_dict(optimizer.state_dict())
    advance(optimizer, 5, 2)
    advance(other, 5, 2)
    assert torch.equal(contiguous, last)


def test_storage_may_change_mid_run() -> None:
    param = random_param(torch.bfloat16)
    optimizer = Lion([param], lr=1e-4)
    for step, change in enumerate(
        [
            {"weight_bits": 24},
            {"weight_bits": 32},
            {"momentum_dtype": "int8"},
            {"weight_bits": 16},
            {"momentum_dtype": None},
        ]
    ):
        advance(optimizer, step, 1)
        before = param.detach().float().clone()
        optimizer.param_groups[0].update(change)
        advance(optimizer, step, 1)
        assert (param.float() - before).abs().max() < 2e-3
    assert "weight_remainder" not in optimizer.state[param]


@pytest.mark.parametrize("fused", [None, False])
def test_cautious_never_moves_a_weight_beyond_its_bound(fused: bool | None) -> None:
    param = nn.Parameter(torch.zeros(5000))
    optimizer = Lion([param], lr=1e-3, cautious=True, fused=fused)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        before = param.detach().clone()
        param.grad = torch.zeros(5000)
        param.grad[:300] = torch.randn(300, generator=generator)  # most elements get no gradient, as in an embedding
        optimizer.step()
        moved = (param - before).abs()
        assert moved.max() <= 2e-3 * (1 + 1e-6)
        assert (moved[300:] == 0).all()
        assert ((param - before) * param.grad <= 0).all()
    assert moved.max() > 1e-3


def test_compiled_step_equals_the_plain_one() -> None:
    param, twin = random_param(), random_param()
    optimizer, other = Lion([param]), Lion([twin])
    compiled = torch.compile(other.step, backend="eager")
    for _ in range(2):
        param.grad, twin.grad = torch.ones_like(param), torch.ones_like(twin)
        optimizer.step()
        compiled()
    assert torch.equal(param, twin)


def test_signum_keeps_its_form_through_a_checkpoint() -> None:
    optimizer = Signum([random_param()], lr=1e-3, momentum=0.8)
    advance(optimizer, 0, 1)
    resumed = Signum([nn.Parameter(optimizer.param_groups[0]["params"][0].detach().clone())])
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["betas"] == (0.8, 0.8)
    assert_same_future(optimizer, resumed)


def test_a_step_counter_on_a_device_counts_and_is_saved_as_a_number() -> None:
    """As on an accelerator, where the counter is a tensor so that a captured graph can advance it."""
    params = [random_param(torch.bfloat16) for _ in range(2)]
    optimizer, other = (Lion([param], lr=1e-5, weight_bits=16, momentum_dtype="int8") for param in params)
    counter = optimizer.param_groups[0]["step"] = torch.tensor(0)
    for lion in (optimizer, other):
        advance(lion, 0, 2)
        lion.param_groups[0]["lr"] = 0.0
        advance(lion, 2, 1)
        lion.param_groups[0]["lr"] = 1e-5
        advance(lion, 3, 1)
    assert torch.equal(*params)
    assert counter.item() == 3
    assert type(optimizer.state_dict()["param_groups"][0]["step"]) is int


@pytest.mark.parametrize("fused", [None, False])
def test_autograd_notices_that_a_step_changed_a_weight(fused: bool | None) -> None:
    weight, still = nn.Parameter(torch.ones(5000)), nn.Parameter(torch.ones(3))
    optimizer = Lion([weight, still], fused=fused)
    loss = (weight * weight).sum()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert still._version == 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_loaded_group_has_the_options_it_was_saved_with() -> None:
    weight = nn.Parameter(torch.ones(5))
    optimizer = Lion([weight])
    names = set(optimizer.param_groups[0])
    optimizer.load_state_dict(optimizer.state_dict())
    assert set(optimizer.param_groups[0]) == names
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(5))]})
    assert set(optimizer.param_groups[1]) == names


def test_full_precision_is_a_method_too() -> None:
    model = nn.Linear(9, 7).to(torch.bfloat16)
    optimizer = Lion(model.parameters(), lr=1e-5)
    model(torch.randn(4, 9).to(torch.bfloat16)).sum().backward()
    optimizer.step()
    exported = optimizer.full_precision_state_dict(model)
    expected = full_precision_state_dict(model, optimizer)
    assert exported.keys() == expected.keys()
    assert all(exported[name].dtype == torch.float32 for name in exported)
    assert all(torch.equal(exported[name], expected[name]) for name in expected)


@pytest.mark.parametrize("momentum_dtype", ["float32", "bfloat16", "int8"])
def test_a_slice_of_the_momentum_is_that_of_the_whole_in_float32(momentum_dtype: str) -> None:
    weight = nn.Parameter(torch.randn(3, 2000, generator=torch.Generator().manual_seed(0)))
    optimizer = Lion([weight], momentum_dtype=momentum_dtype)
    weight.grad = torch.randn(3, 2000, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    whole = momentum_slice(optimizer.state[weight], 0, 6000)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole, weight.grad.flatten() * 0.01, rtol=0.1, atol=1e-4)
    for start, stop in [(0, 256), (512, 700), (5888, 6000), (256, 256)]:
        assert torch.equal(momentum_slice(optimizer.state[weight], start, stop), whole[start:stop])


def test_parameters_stepped_one_by_one_end_as_after_one_step() -> None:
    results = []
    for ahead in ([], [2, 0], [0, 1, 2]):
        params = [nn.Parameter(torch.full((5000,), 0.5 + n, dtype=torch.bfloat16)) for n in range(3)]
        optimizer = Lion(params, lr=1e-3, weight_decay=0.1, weight_bits=16)
        for step in range(3):
            for n, param in enumerate(params):
                param.grad = torch.randn(5000, generator=torch.Generator().manual_seed(3 * step + n)).bfloat16()
            for n in ahead:
                optimizer.step_param(params[n])
                params[n].grad = None
            optimizer.step()
        assert optimizer.param_groups[0]["step"] == 3
        results.append(torch.cat([param.detach() for param in params]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("fused", [None, False])
def test_grad_scale_and_found_inf_act_inside_the_step(fused: bool | None) -> None:
    param, twin = random_param(), random_param()
    optimizer, other = Lion([param], fused=fused), Lion([twin], fused=fused)
    param.grad, twin.grad = torch.full_like(param, 64.0), torch.full_like(twin, 0.5)
    optimizer.grad_scale = torch.tensor(128.0)
    optimizer.step()
    other.step()
    assert torch.equal(optimizer.state[param]["exp_avg"], other.state[twin]["exp_avg"])
    before = param.detach().clone()
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(param, before)
    assert optimizer.param_groups[0]["step"] == 1
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert not torch.equal(param, before)
    assert not hasattr(optimizer, "_step_supports_amp_scaling")


def test_grad_scaler_skips_and_unscales() -> None:
    param = random_param()
    optimizer, scaler = Lion([param], lr=1e-2), torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(param.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    before = param.detach().clone()
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], torch.full_like(param, 0.01))
    param.grad = torch.full_like(param, float("inf"))
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert torch.equal(param, before)


def test_state_dict_hooks_see_and_give_the_final_form() -> None:
    seen: list[Any] = []
    optimizer = Lion([random_param()], momentum_dtype="int8")
    optimizer.register_state_dict_post_hook(lambda _, state: seen.append(state["param_groups"][0]["momentum_dtype"]))
    optimizer.register_state_dict_post_hook(lambda _, state: {"wrapped": state})
    assert optimizer.state_dict()["wrapped"]["param_groups"][0]["fused"] is None
    assert seen == ["int8"]
    assert "wrapped" not in copy.deepcopy(optimizer).state_dict(), "as with torch's, a copy has no hooks"
    assert copy.deepcopy(optimizer).state_dict()["param_groups"][0]["momentum_dtype"] == "int8"


def test_signum_keeps_one_momentum_in_groups_and_schedules() -> None:
    first, second = random_param(), random_param()
    optimizer = Signum([{"params": [first], "momentum": 0.5}, {"params": [second]}], lr=1e-3, momentum=0.9)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.5, 0.5), (0.9, 0.9)]
    with pytest.raises(ValueError, match="betas"):
        optimizer.add_param_group({"params": [random_param()], "momentum": 1.5})
    cycled, plain = random_param(), random_param()
    plain.data.copy_(cycled.data)
    ours, theirs = Signum([cycled], lr=1e-3), Signum([plain], lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(ours, 1e-3, total_steps=10)
    for number in range(5):
        theirs.param_groups[0]["betas"] = (ours.param_groups[0]["betas"][0],) * 2
        theirs.param_groups[0]["lr"] = ours.param_groups[0]["lr"]
        for param in (cycled, plain):
            generator = torch.Generator().manual_seed(number)
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        ours.step()
        theirs.step()
        schedule.step()
    assert ours.param_groups[0]["betas"][0] < 0.9
    assert torch.equal(cycled, plain)


def test_a_group_that_another_rank_owns_counts_its_steps() -> None:
    """As ZeroRedundancyOptimizer has them: rank 0 saves the groups, and owns no parameter of the second."""
    optimizer = Lion([{"params": [random_param()]}, {"params": []}], weight_bits=16)
    optimizer.param_groups[0]["params"][0].grad = torch.ones_like(optimizer.param_groups[0]["params"][0])
    for _ in range(3):
        optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [3, 3]


@pytest.mark.parametrize("wrong", [None, "x", 3])
def test_what_is_no_state_dict_is_named(wrong: Any) -> None:
    with pytest.raises(ValueError, match="which is not allowed: use a dict of 'state' and 'param_groups'"):
        Lion([random_param()]).load_state_dict(wrong)


def test_a_signum_that_loads_unequal_betas_says_which_it_uses() -> None:
    other = Lion([random_param()], betas=(0.9, 0.99))
    optimizer = Signum([random_param()])
    optimizer.load_state_dict(other.state_dict())
    advance(optimizer, 0, 1)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.9)


@pytest.mark.parametrize("betas", [0.9, (), (0.9, 1.5)])
def test_wrong_betas_of_a_signum_are_named_as_those_of_a_lion(betas: Any) -> None:
    optimizer = Signum([random_param()])
    optimizer.param_groups[0]["betas"] = betas
    with pytest.raises(ValueError, match=r"betas=.* is not allowed: use two numbers"):
        advance(optimizer, 0, 1)
