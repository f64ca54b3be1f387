"""States that do not fit: each is exact, converted where that is usual, or refused by one sentence, never a crash.

Every case runs in a forked child: before the checks existed, a part of them ended the process.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lion_lightning.optim import Lion, state
from tests.forks import in_a_fork
from tests.optim.exactness import assert_refused, assert_step_is_exact
from tests.optim.trained import BF16, FP32, FP64, SHAPE, random, trained

BLOCKS = 391
"""Of 256 elements in a tensor of that shape."""
INT8 = {"momentum_dtype": "int8"}
State = dict[str, Any]


class Case(NamedTuple):
    """A state made ill-fitting, and the words that refuse it; no words where it has to work."""

    name: str
    dtype: torch.dtype
    options: dict[str, Any]
    edit: Callable[[State], Tensor | None]
    """Changes the state of the large parameter; returns the momentum it then stands for, or None for what it was."""
    words: tuple[str, ...] = ()


def put(key: str, make: Callable[[Tensor], Any]) -> Callable[[State], None]:
    """Replaces a tensor by what is made of it."""

    def edit(state: State) -> None:
        state[key] = make(state[key])

    return edit


def momentum(make: Callable[[Tensor], Tensor]) -> Callable[[State], Tensor]:
    """Replaces the momentum by another one, which is then what the step has to start from."""

    def edit(state: State) -> Tensor:
        state["exp_avg"] = make(state["exp_avg"])
        return state["exp_avg"].double()

    return edit


def without(key: str) -> Callable[[State], None]:
    def edit(state: State) -> None:
        del state[key]

    return edit


def gapped(tensor: Tensor) -> Tensor:
    """Equal numbers, each followed by one that is another's."""
    return torch.stack([tensor, torch.full_like(tensor, 9)], -1)[..., 0]


def column_major(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


EXP_AVG, SCALE, REMAINDER = "exp_avg", "exp_avg_scale", "weight_remainder"
SIZE = "(250, 400)"
CASES = [
    # The momentum's dtype.
    Case("fp64 momentum of an fp32 weight", FP32, {}, momentum(lambda m: m.double() * 1.5)),
    Case("fp64 momentum of a bf16 weight", BF16, {}, momentum(lambda m: m.double() * 1.5)),
    Case("fp16 momentum", FP32, {}, momentum(lambda m: m.half())),
    Case("fp16 momentum of a bf16 weight", BF16, {}, momentum(lambda m: m.half())),
    Case("fp16 momentum of an fp64 weight", FP64, {}, momentum(lambda m: m.half())),
    Case("bf16 momentum of an fp64 weight", FP64, {}, momentum(lambda m: m.bfloat16())),
    Case("fp32 momentum of an fp64 weight", FP64, {}, momentum(lambda m: m.float())),
    Case(
        "fp16 momentum where int8 is asked for",
        FP32,
        INT8,
        lambda s: [s.pop(SCALE), momentum(lambda m: m.half())(s)][1],
    ),
    Case("fp32 momentum of a bf16 weight", BF16, {}, momentum(lambda m: m.float() * 1.001)),
    Case("bf16 momentum of an fp32 weight", FP32, {}, momentum(lambda m: m.bfloat16())),
    *(
        Case(
            f"{dtype} momentum",
            FP32,
            {},
            put(EXP_AVG, lambda m, dtype=dtype: (m * 100).to(dtype)),
            (EXP_AVG, str(dtype), "float32"),
        )
        for dtype in (
            torch.int16,
            torch.int32,
            torch.int64,
            torch.uint8,
            torch.bool,
            torch.complex64,
            torch.float8_e4m3fn,
        )
    ),
    Case(
        "uint8 momentum with its scale",
        FP32,
        INT8,
        put(EXP_AVG, lambda m: m.to(torch.uint8)),
        (EXP_AVG, "uint8", "int8"),
    ),
    # Its shape.
    *(
        Case(
            f"momentum of shape {shape}",
            FP32,
            {},
            put(EXP_AVG, lambda m, shape=shape: torch.zeros(shape)),
            (EXP_AVG, str(shape), SIZE),
        )
        for shape in (
            (1, 400),
            (250, 1),
            (400,),
            (400, 250),
            (100_000,),
            (250, 400, 1),
            (1, 250, 400),
            (),
            (1,),
            (0,),
            (249, 400),
            (251, 400),
        )
    ),
    Case("bf16 momentum of one row", BF16, {}, put(EXP_AVG, lambda m: m[:1]), (EXP_AVG, "(1, 400)", SIZE)),
    Case("int8 momentum of one row", FP32, INT8, put(EXP_AVG, lambda m: m[:1].clone()), (EXP_AVG, "(1, 400)", SIZE)),
    # Its memory.
    Case("expanded momentum", FP32, {}, momentum(lambda m: m[:1].expand(250, 400))),
    Case("transposed momentum", FP32, {}, momentum(column_major)),
    Case("momentum with gaps", FP32, {}, momentum(gapped)),
    Case("fp64 momentum with gaps", FP32, {}, momentum(lambda m: gapped(m.double()))),
    Case("reversed momentum", FP32, {}, momentum(lambda m: m.flip(1))),
    Case("momentum lazily negated", FP32, {}, momentum(torch._neg_view)),
    Case(
        "momentum at an odd address",
        FP32,
        {},
        momentum(lambda m: torch.cat([m.new_zeros(1), m.flatten()])[1:].view(SHAPE)),
    ),
    Case("momentum that requires a gradient", FP32, {}, momentum(lambda m: nn.Parameter(m.clone()))),
    Case("sparse momentum", FP32, {}, put(EXP_AVG, lambda m: m.to_sparse()), (EXP_AVG, "sparse", "dense")),
    Case("momentum without data", FP32, {}, put(EXP_AVG, lambda m: m.to("meta")), (EXP_AVG, "meta")),
    Case("list for a momentum", FP32, {}, put(EXP_AVG, lambda m: m.tolist()), (EXP_AVG, "list", "tensor")),
    Case("array for a momentum", FP32, {}, put(EXP_AVG, lambda m: m.numpy()), (EXP_AVG, "ndarray", "tensor")),
    Case("number for a momentum", FP32, {}, put(EXP_AVG, lambda m: 0.0), (EXP_AVG, "float", "tensor")),
    Case("None for a momentum", FP32, {}, put(EXP_AVG, lambda m: None), (EXP_AVG, "None", "tensor")),
    # The scales of an int8 momentum.
    Case("int8 momentum without scales", FP32, INT8, without(SCALE), (SCALE, str(BLOCKS))),
    Case("int8 momentum without scales, bf16", BF16, {"weight_bits": 16, **INT8}, without(SCALE), (SCALE, str(BLOCKS))),
    *(
        Case(
            f"{count} scales",
            FP32,
            INT8,
            put(SCALE, lambda s, count=count: s.new_ones(count)),
            (SCALE, f"({count},)", f"({BLOCKS},)"),
        )
        for count in (0, 1, 10, BLOCKS - 1, BLOCKS + 1)
    ),
    Case(
        "scales of two dimensions", FP32, INT8, put(SCALE, lambda s: s[None]), (SCALE, f"(1, {BLOCKS})", f"({BLOCKS},)")
    ),
    Case(
        "scales of two dimensions, the other way",
        FP32,
        INT8,
        put(SCALE, lambda s: s[:, None]),
        (SCALE, f"({BLOCKS}, 1)", f"({BLOCKS},)"),
    ),
    Case("a single scale of no dimension", FP32, INT8, put(SCALE, lambda s: s.mean()), (SCALE, "()", f"({BLOCKS},)")),
    Case("scales of int32", FP32, INT8, put(SCALE, lambda s: s.to(torch.int32)), (SCALE, "int32", "float32")),
    Case("scales without data", FP32, INT8, put(SCALE, lambda s: s.to("meta")), (SCALE, "meta")),
    Case("list for scales", FP32, INT8, put(SCALE, lambda s: s.tolist()), (SCALE, "list", "tensor")),
    Case("scales of fp64", FP32, INT8, put(SCALE, lambda s: s.double())),
    Case("scales with gaps", FP32, INT8, put(SCALE, gapped)),
    Case(
        "scales beside fp32 momentum",
        FP32,
        {},
        lambda s: s.update({SCALE: torch.ones(BLOCKS)}),
        (SCALE, "float32", "int8"),
    ),
    Case("scales without momentum", FP32, INT8, without(EXP_AVG), (SCALE, EXP_AVG)),
    # What a bf16 weight cannot hold.
    *(
        Case(
            f"remainder of {dtype}",
            BF16,
            {},
            put(REMAINDER, lambda r, dtype=dtype: r.to(dtype)),
            (REMAINDER, str(dtype), "int16"),
        )
        for dtype in (torch.int32, torch.int64, torch.uint8, torch.float32, torch.bfloat16, torch.bool)
    ),
    Case("remainder of one row", BF16, {}, put(REMAINDER, lambda r: r[:1].clone()), (REMAINDER, "(1, 400)", SIZE)),
    Case(
        "remainder of 8 bits of one row",
        BF16,
        {"weight_bits": 24},
        put(REMAINDER, lambda r: r[:1].clone()),
        (REMAINDER, "(1, 400)", SIZE),
    ),
    Case("remainder of another shape", BF16, {}, put(REMAINDER, lambda r: r.flatten()), (REMAINDER, "(100000,)", SIZE)),
    Case("remainder without data", BF16, {}, put(REMAINDER, lambda r: r.to("meta")), (REMAINDER, "meta")),
    Case("sparse remainder", BF16, {}, put(REMAINDER, lambda r: r.to_sparse()), (REMAINDER, "sparse", "dense")),
    Case("list for a remainder", BF16, {}, put(REMAINDER, lambda r: r.tolist()), (REMAINDER, "list", "tensor")),
    Case(
        "remainder of an fp32 weight",
        FP32,
        {},
        lambda s: s.update({REMAINDER: torch.zeros(SHAPE, dtype=torch.int16)}),
        (REMAINDER, "float32", "bfloat16"),
    ),
    Case(
        "remainder of an fp64 weight",
        FP64,
        {},
        lambda s: s.update({REMAINDER: torch.zeros(SHAPE, dtype=torch.int8)}),
        (REMAINDER, "float64", "bfloat16"),
    ),
    Case("column-major remainder", BF16, {}, put(REMAINDER, column_major)),
    Case("no remainder", BF16, {}, without(REMAINDER)),
    Case("no momentum", BF16, {}, lambda s: [s.pop(EXP_AVG), torch.zeros(SHAPE, dtype=FP64)][1]),
]


@pytest.mark.parametrize("route", ["step", "load"])
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_state_is_exact_or_refused(case: Case, route: str) -> None:
    """By the step, where somebody put it into `optimizer.state`, and by `load_state_dict`."""
    in_a_fork(lambda: put_to(case, route))


def put_to(case: Case, route: str) -> None:
    params, optimizer = trained(case.dtype, **case.options)
    grads = [random(7, case.dtype, tuple(param.shape)) for param in params]
    saved = copy.deepcopy(optimizer.state_dict())
    expected = None
    if route == "load":
        edited = copy.deepcopy(saved)
        expected = case.edit(edited["state"][1])
        twins, loading = trained(case.dtype, seed=5, **case.options)
        if case.words:
            assert_refused(lambda: loading.load_state_dict(edited), loading, "parameter 1", *case.words)
        loading.load_state_dict(saved if case.words else edited)
        with torch.no_grad():
            for twin, param in zip(twins, params, strict=True):
                twin.copy_(param)
        params, optimizer = twins, loading
    elif case.words:
        case.edit(optimizer.state[params[1]])
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        assert_refused(optimizer.step, optimizer, "parameter 1", *case.words)
        optimizer.load_state_dict(saved)
    else:
        expected = case.edit(optimizer.state[params[1]])
    assert_step_is_exact(optimizer, params[1], grads[1], momentum=expected, others=(params[0],))


def test_messages_name_the_parameter() -> None:
    def check() -> None:
        model = nn.Linear(400, 250)
        optimizer = Lion(model.named_parameters())
        model(torch.ones(2, 400)).sum().backward()
        optimizer.step()
        optimizer.state[model.bias]["exp_avg"] = torch.zeros(3)
        assert_refused(optimizer.step, optimizer, "parameter 1", "bias", "exp_avg", "(3,)", "(250,)")

    in_a_fork(check)


# The parameter changes after a step.


class Change(NamedTuple):
    name: str
    dtype: torch.dtype
    make: Callable[[Tensor], Tensor]
    words: tuple[str, ...] = ()


CHANGES = [
    Change("fp64 to fp32", FP64, lambda p: p.float()),
    Change("fp64 to bf16", FP64, lambda p: p.bfloat16()),
    Change("fp32 to fp64", FP32, lambda p: p.double()),
    Change("fp32 to bf16", FP32, lambda p: p.bfloat16()),
    Change("fp32 to fp16", FP32, lambda p: p.half(), ("float16",)),
    Change("bf16 to fp32", BF16, lambda p: p.float(), ("weight_remainder", "float32", "bfloat16")),
    Change("column-major", FP32, column_major),
    Change("column-major bf16", BF16, column_major),
    Change("with gaps", FP32, gapped),
    Change("transposed", FP32, lambda p: p.t(), ("exp_avg", "(250, 400)", "(400, 250)")),
    Change("flattened", FP32, lambda p: p.flatten(), ("exp_avg", "(250, 400)", "(100000,)")),
    Change("fewer rows", FP32, lambda p: p[:100].clone(), ("exp_avg", "(250, 400)", "(100, 400)")),
    Change("more rows", BF16, lambda p: torch.cat([p, p]), ("exp_avg", "(250, 400)", "(500, 400)")),
    Change("one row for all", FP32, lambda p: p[:1].expand(250, 400), ("expanded",)),
]


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("change", CHANGES, ids=[change.name for change in CHANGES])
def test_a_changed_parameter_goes_on_exactly_or_is_refused(change: Change, fused: bool | None) -> None:
    def check() -> None:
        params, optimizer = trained(change.dtype, fused=fused)
        _, momentum = params[1], optimizer.state[params[1]]["exp_avg"].double()
        params[1].grad = None
        params[1].data = change.make(params[1].data)
        grad = torch.full_like(params[1], 0.03)
        if change.words:
            params[1].grad = grad
            assert_refused(optimizer.step, optimizer, "parameter 1", *change.words)
        else:
            assert_step_is_exact(optimizer, params[1], grad, momentum=momentum, others=(params[0],))

    in_a_fork(check)


def test_a_gradient_left_from_another_shape_or_dtype() -> None:
    def check() -> None:
        _, optimizer = trained(FP32)
        fresh = nn.Parameter(torch.ones(300, 400))
        optimizer.add_param_group({"params": [fresh]})
        fresh.grad = torch.ones(300, 400)
        fresh.data = torch.ones(900, 400)
        assert_refused(optimizer.step, optimizer, "parameter 2", "gradient", "(300, 400)", "(900, 400)")
        fresh.grad = None
        double, other = trained(FP64)
        grad = double[1].grad
        assert grad is not None
        double[1].data = double[1].data.float()  # the gradient stays fp64
        momentum = other.state[double[1]]["exp_avg"].clone()
        weight = double[1].detach().double()
        other.step()
        mixed = 0.9 * momentum + 0.1 * grad
        expected = weight - 1e-3 * (mixed.sign() + 0.1 * weight)
        assert ((double[1] - expected).abs() < 1e-7).float().mean() > 0.9999

    in_a_fork(check)


# Whole state dicts.

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


# Checkpoints of other optimizers.

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


@pytest.mark.parametrize("key", [EXP_AVG, SCALE, REMAINDER])
def test_a_step_refuses_state_on_another_device(key: str) -> None:
    """Both devices are named; here the parameter is on `meta`, which no machine lacks."""
    param = nn.Parameter(torch.ones(8192, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    optimizer = Lion([param], momentum_dtype=torch.int8)
    optimizer.step()
    away = nn.Parameter(torch.empty_like(param, device="meta"))
    with pytest.raises(ValueError, match=rf"{key} is on cpu, .* parameter on meta: move the model"):
        state.check_device({key: optimizer.state[param][key]}, away)
    state.check_device(optimizer.state[param], param)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_that_moved_after_a_step_is_refused_and_a_load_moves_the_state() -> None:
    param = nn.Parameter(torch.ones(8))
    param.grad = torch.ones_like(param)
    optimizer = Lion([param])
    optimizer.step()
    param.data = param.data.cuda()
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="exp_avg is on cpu"):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
