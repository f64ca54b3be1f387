"""States that do not fit: each is exact, converted where that is usual, or refused by one sentence, never a crash.

Every case runs in a forked child: before the checks existed, a part of them ended the process.
"""

import copy
from collections.abc import Callable
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
