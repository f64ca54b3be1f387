"""Gradient release changes when a parameter steps, and nothing else."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler

from lion_lightning.guard.lr_warmup import LinearWarmup, WarmupHook
from lion_lightning.optim import Lion, Signum
from lion_lightning.optim.gradient_release import Release, release_gradients

Make = Callable[[nn.Module], Optimizer]


class Network(nn.Module):
    """Tied weights, a frozen parameter, one that gets no gradient, and one large enough for int8 momentum."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(80, 64)
        self.hidden = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(64, 80, bias=False)
        self.head.weight = self.embedding.weight
        self.hidden.bias.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.hidden(self.embedding(tokens))).tanh())


def network(dtype: torch.dtype = torch.float32) -> Network:
    torch.manual_seed(0)
    return Network().to(dtype)


def loss_of(model: nn.Module, step: int) -> Tensor:
    tokens = torch.randint(0, 80, (4, 6), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.roll(1).flatten())


def groups(model: nn.Module) -> list[dict[str, Any]]:
    params = list(model.parameters())
    return [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "lr": 3e-4, "betas": (0.5, 0.7)}]


def train(model: nn.Module, optimizer: Optimizer, *, release: bool, steps: int = 6, extra: Any = None) -> None:
    handle = release_gradients(model, optimizer) if release else None
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        if release:
            assert all(param.grad is None for param in model.parameters())
        optimizer.step()
        if extra is not None:
            extra()
    if handle is not None:
        handle.remove()


def assert_equal_in_every_bit(left: tuple[nn.Module, Optimizer], right: tuple[nn.Module, Optimizer]) -> None:
    for (name, mine), theirs in zip(left[0].named_parameters(), right[0].parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    mine_state, theirs_state = left[1].state_dict(), right[1].state_dict()
    assert mine_state["param_groups"] == theirs_state["param_groups"]
    assert mine_state["state"].keys() == theirs_state["state"].keys()
    for key, state in mine_state["state"].items():
        assert state.keys() == theirs_state["state"][key].keys()
        assert all(torch.equal(state[name], theirs_state["state"][key][name]) for name in state)


def compare(make: Make, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Optimizer]:
    """Trains with and without release; both end alike, and not where they began."""
    pairs = []
    for release in (False, True):
        model = network(dtype)
        optimizer = make(model)
        train(model, optimizer, release=release)
        pairs.append((model, optimizer))
    assert_equal_in_every_bit(*pairs)
    assert not torch.equal(pairs[1][0].hidden.weight, network(dtype).hidden.weight)
    return pairs[1]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"momentum_dtype": "int8", "cautious": True}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"weight_bits": 24, "momentum_dtype": "int8"}),
        (torch.bfloat16, {"weight_bits": 16, "momentum_dtype": "int8", "seed": 3}),
        (torch.bfloat16, {"weight_bits": 16, "fused": False}),
    ],
)
def test_lion_with_release_equals_an_ordinary_step(dtype: torch.dtype, options: dict[str, Any]) -> None:
    _, optimizer = compare(lambda model: Lion(groups(model), lr=1e-3, **options), dtype)
    assert [group["step"] for group in optimizer.param_groups] == [6, 6]


@pytest.mark.parametrize(
    "make",
    [
        lambda model: Signum(model.parameters(), lr=1e-3),
        lambda model: SGD(model.parameters(), lr=0.1, momentum=0.9),
        lambda model: AdamW(model.parameters(), lr=1e-3),
        lambda model: AdamW(model.parameters(), lr=1e-3, fused=True),
        lambda model: torch.optim.Adafactor(model.parameters(), lr=1e-3),
    ],
    ids=["signum", "sgd", "adamw", "fused-adamw", "adafactor"],
)
def test_other_optimizers_with_release_equal_their_ordinary_step(make: Make) -> None:
    compare(make)


@pytest.mark.parametrize("scheduler_first", [True, False])
def test_schedule_warmup_and_hooks_stay_right(scheduler_first: bool, recwarn: pytest.WarningsRecorder) -> None:
    results, calls = [], []
    for release in (False, True):
        model, seen = network(torch.bfloat16), []
        optimizer = Lion(groups(model), lr=1e-3, weight_bits=16)
        warmup = LinearWarmup(4)
        WarmupHook(optimizer, warmup)
        optimizer.register_step_pre_hook(lambda *_, seen=seen: seen.append("before"))
        optimizer.register_step_post_hook(lambda *_, seen=seen: seen.append("after"))
        handle = None
        if release and not scheduler_first:
            handle = release_gradients(model, optimizer)
        schedule = lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / 8)
        if release and scheduler_first:
            handle = release_gradients(model, optimizer)
        for step in range(6):
            loss_of(model, step).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        assert warmup.step == 6
        if handle is not None:
            handle.remove()
        loss_of(model, 9).backward()
        optimizer.step()
        results.append((model, optimizer))
        calls.append(seen)
    assert_equal_in_every_bit(*results)
    assert calls[0] == calls[1] == ["before", "after"] * 7
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]


def test_a_closure_works_when_its_backward_is_the_only_one() -> None:
    results = []
    for release in (False, True):
        model = network()
        optimizer = Lion(model.parameters(), lr=1e-3)
        warmup = LinearWarmup(3)
        WarmupHook(optimizer, warmup)
        if release:
            release_gradients(model, optimizer)
        for step in range(4):

            def closure(model: nn.Module = model, optimizer: Optimizer = optimizer, step: int = step) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            assert optimizer.step(closure) > 0
        assert warmup.step == 4
        results.append((model, optimizer))
    assert_equal_in_every_bit(*results)


def test_telemetry_and_the_count_of_nonfinite_gradients_are_the_same() -> None:
    figures = []
    for release in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 1))
        optimizer = Lion(model.parameters(), lr=1e-3, weight_decay=0.1)
        optimizer.telemetry_every = 2
        if release:
            release_gradients(model, optimizer)
        for step in range(5):
            loss = model(torch.randn(8, 64, generator=torch.Generator().manual_seed(step))).square().sum()
            (loss * (float("nan") if step == 3 else 1.0)).backward()
            optimizer.step()
            optimizer.zero_grad()
        figures.append({**optimizer.telemetry(), "count": optimizer.nonfinite_count})
    assert figures[1].keys() == figures[0].keys()
    for name, value in figures[0].items():
        assert torch.equal(figures[1][name], value), name
    assert figures[1]["count"] > 0
    assert "lion/flip_rate" in figures[1]


def test_only_the_gradients_of_one_layer_live_at_a_time() -> None:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(8)))
    optimizer = Lion(model.parameters())
    alive: list[int] = []

    def count(*_: Any) -> None:
        alive.append(sum(param.grad is not None for param in model.parameters()))

    with release_gradients(model, optimizer):
        for layer in model:
            layer.weight.register_hook(count)
        model(torch.randn(2, 32)).sum().backward()
    assert max(alive) <= 2
    assert len(alive) == 8


def test_parameters_outside_the_model_step_at_step() -> None:
    results = []
    for release in (False, True):
        model, outside = network(), nn.Parameter(torch.ones(80))
        optimizer = Lion([*model.parameters(), outside], lr=1e-3, weight_decay=0.1)
        if release:
            release_gradients(model, optimizer)
        for step in range(3):
            (loss_of(model, step) + outside.square().sum()).backward()
            assert outside.grad is not None
            optimizer.step()
            optimizer.zero_grad()
        results.append((model, optimizer, outside))
    assert_equal_in_every_bit(results[0][:2], results[1][:2])
    assert torch.equal(results[0][2], results[1][2])
    assert results[1][1].param_groups[0]["step"] == 3


def test_a_resumed_run_repeats_itself() -> None:
    whole, parted = network(torch.bfloat16), network(torch.bfloat16)
    options: dict[str, Any] = {"lr": 1e-3, "weight_bits": 16, "momentum_dtype": "int8"}
    first, second = Lion(whole.parameters(), **options), Lion(parted.parameters(), **options)
    train(whole, first, release=False)
    first.load_state_dict(first.state_dict())  # torch adds an option of its own to loaded groups
    with release_gradients(parted, second):
        for step in range(6):
            if step == 3:
                saved = copy.deepcopy(second.state_dict())
                second.load_state_dict(saved)
            loss_of(parted, step).backward()
            second.step()
    assert_equal_in_every_bit((whole, first), (parted, second))


def test_values_are_clipped_as_torch_does() -> None:
    results = []
    for release in (False, True):
        model = network()
        optimizer = Lion(model.parameters(), lr=1e-3)
        handle: Release | None = release_gradients(model, optimizer, clip_value=1e-3) if release else None
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            if handle is None:
                nn.utils.clip_grad_value_(model.parameters(), 1e-3)
            optimizer.step()
        results.append((model, optimizer))
    assert_equal_in_every_bit(*results)
    assert max(state["exp_avg"].abs().max() for state in results[1][1].state.values()) < 1e-3


def released() -> tuple[nn.Module, Lion, Release]:
    model = network()
    optimizer = Lion(model.parameters(), lr=1e-3)
    return model, optimizer, release_gradients(model, optimizer)


def test_accumulation_is_refused_and_the_run_can_go_on() -> None:
    model, optimizer, _ = released()
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"second gradient before optimizer.step\(\)"):
        loss_of(model, 1).backward()
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    optimizer.step()


@pytest.mark.filterwarnings("ignore:GradScaler is going to stop")
def test_a_grad_scaler_is_refused() -> None:
    model, optimizer, _ = released()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(RuntimeError, match="GradScaler is not allowed"):
        scaler.step(optimizer)
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    loss_of(model, 0).backward()
    disabled.step(optimizer)


def test_a_rate_set_between_backward_and_step_is_refused() -> None:
    model, optimizer, _ = released()
    loss_of(model, 0).backward()
    optimizer.param_groups[0]["lr"] = 1e-4
    with pytest.raises(RuntimeError, match="set the learning rate before backward"):
        optimizer.step()


def test_optimizers_that_need_all_gradients_are_refused() -> None:
    class Counting(SGD):
        def step(self, closure: Any = None) -> Any:
            self.param_groups[0]["lr"] = self.param_groups[0]["lr"] * 0.5
            return super().step(closure)

    class Wrapper(torch.optim.Optimizer):
        """As Accelerate's: an Optimizer without what Optimizer's constructor makes."""

        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    model = network()
    with pytest.raises(ValueError, match=r"optimizer=Wrapper is not allowed .* its attribute `optimizer`"):
        release_gradients(model, Wrapper(SGD(model.parameters())))
    with pytest.raises(ValueError, match="optimizer=LBFGS is not allowed"):
        release_gradients(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match="holds no trainable parameter"):
        release_gradients(model, SGD(network().parameters()))
    with pytest.raises(ValueError, match="clip_value=-1 is not allowed"):
        release_gradients(model, SGD(model.parameters()), clip_value=-1)
    optimizer = SGD(model.parameters())
    release_gradients(model, optimizer)
    with pytest.raises(ValueError, match="released already"):
        release_gradients(model, optimizer)
    other = network()
    release_gradients(other, Counting(other.parameters()))
    with pytest.raises(RuntimeError, match="keeps state in its parameter groups"):
        loss_of(other, 0).backward()


def test_a_weight_needed_later_in_backward_is_not_silently_changed() -> None:
    """Autograd must see that the weight was written, also by engines that write memory directly."""
    weight = nn.Parameter(torch.ones(64, 64))
    module = nn.ParameterList([weight])
    optimizer = Lion([weight], lr=1e-3)
    inputs = torch.randn(2, 64, requires_grad=True)
    with release_gradients(module, optimizer):
        early = inputs @ weight.detach()  # backward still needs the old value after the gradient of weight is there
        loss = (early.exp() @ weight).sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_removing_leaves_nothing_behind() -> None:
    model, optimizer = network(), AdamW(network().parameters(), fused=True)
    optimizer = AdamW(model.parameters(), fused=True)
    before = dict(vars(optimizer))
    with release_gradients(model, optimizer) as handle:
        assert handle.active
        loss_of(model, 0).backward()
        optimizer.step()
    assert not handle.active
    handle.remove()
    after = {key: value for key, value in vars(optimizer).items() if key != "step"}
    assert after.keys() == before.keys()
    assert after["_step_supports_amp_scaling"] is True
    loss_of(model, 1).backward()
    assert model.hidden.weight.grad is not None
