"""Import of other Lions' states, proved by going on as they did. `peer_states/make.py` made the files.

FusedLion runs on CUDA alone: its file is CPULion's state in the layout of its source.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lion_lightning.optim import Lion
from lion_lightning.optim.import_state import import_state, read, source_of
from lion_lightning.optim.state import full_precision_state_dict
from tests.optim.peer_states.make import OPTIONS, STEPS_BEFORE, gradients

FOLDER = Path(__file__).parent / "peer_states"
SOURCES = {
    "lion_pytorch": "lion-pytorch",
    "timm": "timm",
    "pytorch_optimizer": "pytorch_optimizer",
    "bitsandbytes_32bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",
    "deepspeed_cpu": "deepspeed",
    "deepspeed_fused": "deepspeed",
    "optimi": "optimi",
    "flashlion": "flashlion",
}
BF16_PEERS = [name for name in SOURCES if name != "deepspeed_fused"]


def peer(name: str) -> dict[str, Any]:
    return read(FOLDER / f"{name}.pt")


def resumed(saved: dict[str, Any], **options: Any) -> tuple[list[nn.Parameter], Lion, str]:
    """Our optimizer over the peer's weights, with its state imported; made with settings that are not the peer's."""
    params = [nn.Parameter(weight.clone()) for weight in saved["weights"]]
    optimizer = Lion(params, lr=5.0, weight_decay=3.0, **options)
    return params, optimizer, import_state(saved["optimizer"], optimizer)


def go_on(optimizer: Lion, params: list[nn.Parameter], steps: int, first: int = STEPS_BEFORE) -> None:
    for step in range(first, first + steps):
        for param, grad in zip(params, gradients(step, params[0].dtype), strict=True):
            param.grad = grad
        optimizer.step()


def largest_distance(left: list[Any], right: list[Tensor]) -> float:
    return max(float((a.detach().double() - b.double()).abs().max()) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("name", SOURCES)
def test_a_run_goes_on_as_the_peer_did(name: str) -> None:
    saved = peer(f"{name}_float32")
    params, optimizer, source = resumed(saved)
    assert source == SOURCES[name]
    go_on(optimizer, params, 1)
    assert largest_distance(params, saved["weights_after_one"]) < 1e-7
    if name == "bitsandbytes_8bit":  # quantizes its momentum anew at every step
        assert saved["optimizer"]["state"][0]["__bnb_optimizer_quant_state__"]["state1"].dtype == torch.uint8
        return
    go_on(optimizer, params, 2, first=STEPS_BEFORE + 1)
    assert largest_distance(params, saved["weights_after_three"]) < 1e-7


def test_without_the_import_the_run_goes_elsewhere() -> None:
    saved = peer("lion_pytorch_float32")
    params = [nn.Parameter(weight.clone()) for weight in saved["weights"]]
    go_on(Lion(params, **OPTIONS), params, 1)
    assert largest_distance(params, saved["weights_after_one"]) > 1e-3


@pytest.mark.parametrize("name", BF16_PEERS)
def test_momentum_of_bf16_runs_goes_on_as_the_peers_did(name: str) -> None:
    saved = peer(f"{name}_bfloat16")
    params, optimizer, _ = resumed(saved, momentum_dtype="float32")
    go_on(optimizer, params, 1)
    _, after, _ = resumed({**saved, "optimizer": saved["optimizer_after_one"]})
    for param, entry in zip(params, after.state.values(), strict=True):
        error = (optimizer.state[param]["exp_avg"] - entry["exp_avg"].float()).abs()
        spacing = 2**-8 if entry["exp_avg"].dtype == torch.bfloat16 else 2**-20
        assert error.max() <= (0.02 if name == "bitsandbytes_8bit" else spacing)  # momentum is below 1


@pytest.mark.parametrize("name", ["lion_pytorch", "optimi"])
def test_hyperparameters_and_step_count_come_along(name: str) -> None:
    _, optimizer, _ = resumed(peer(f"{name}_float32"), seed=7, fused=False)
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in OPTIONS} == OPTIONS
    assert (group["seed"], group["fused"]) == (7, False)
    _, counted, _ = resumed(peer("bitsandbytes_32bit_float32"))
    assert counted.param_groups[0]["step"] == STEPS_BEFORE


def test_hyperparameters_may_stay_ours() -> None:
    saved = peer("timm_float32")
    params = [nn.Parameter(weight.clone()) for weight in saved["weights"]]
    optimizer = Lion(params, lr=5.0)
    import_state(saved["optimizer"], optimizer, hyperparameters=False)
    assert optimizer.param_groups[0]["lr"] == 5.0
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], saved["optimizer"]["state"][0]["exp_avg"])


def full_weights(params: list[nn.Parameter], optimizer: Lion) -> list[Tensor]:
    return list(full_precision_state_dict(nn.ParameterList(params), optimizer).values())


def test_the_kahan_sum_of_optimi_becomes_the_remainder() -> None:
    saved = peer("optimi_bfloat16")
    params, optimizer, _ = resumed(saved)
    compensations = [saved["optimizer"]["state"][index]["kahan_comp"] for index in (0, 1)]
    assert any(bool(compensation.any()) for compensation in compensations)
    for full, weight, compensation in zip(
        full_weights(params, optimizer), saved["weights"], compensations, strict=True
    ):
        exact = weight.double() + compensation.double()
        assert ((full.double() - exact).abs() <= 2**-23 * exact.abs()).all()
    assert largest_distance(params, saved["weights"]) == 0.0


def test_the_error_bits_of_flashlion_become_the_remainder() -> None:
    saved = peer("flashlion_24bit_bfloat16")
    params, optimizer, source = resumed(saved, momentum_dtype="float32")
    assert source == "flashlion"
    for full, theirs in zip(full_weights(params, optimizer), saved["full_weights"], strict=True):
        assert ((full - theirs).abs() <= 2**-22 * theirs.abs()).all()
    go_on(optimizer, params, 1)  # a step the wrong way would be 2 lr off; how far the interpreter is off, see make.py
    assert largest_distance(full_weights(params, optimizer), saved["full_weights_after_one"]) < OPTIONS["lr"] / 2


def test_blocks_of_2048_of_early_bitsandbytes_are_read() -> None:
    levels = torch.arange(3000, dtype=torch.int64).remainder(256).to(torch.uint8).view(30, 100)
    table, scales = torch.linspace(-1, 1, 256), torch.tensor([2.0, 5.0])
    entry = {"step": 3, "state1": levels, "qmap1": table, "absmax1": scales}
    state = {"state": {0: entry}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    param = nn.Parameter(torch.zeros(30, 100))
    optimizer = Lion([param])
    import_state(state, optimizer)
    expected = table[levels.long().view(-1)] * torch.cat([torch.full((2048,), 2.0), torch.full((952,), 5.0)])
    assert torch.equal(optimizer.state[param]["exp_avg"], expected.view(30, 100))


def test_decoupled_decay_of_optimi_keeps_its_strength() -> None:
    saved = peer("optimi_float32")
    saved["optimizer"]["param_groups"][0].update(decouple_lr=True, max_lr=2e-3, weight_decay=1e-5)
    _, optimizer, _ = resumed(saved)
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(5e-3)


def changed(name: str, **group: Any) -> dict[str, Any]:
    saved = peer(name)
    saved["optimizer"]["param_groups"][0].update(group)
    return saved


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("pytorch_optimizer_float32", {"fixed_decay": True}),
        ("pytorch_optimizer_float32", {"weight_decouple": False}),
        ("timm_float32", {"corrected_weight_decay": True}),
    ],
)
def test_options_without_an_equal_are_refused(name: str, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        resumed(changed(name, **option))


def test_states_that_do_not_fit_are_refused() -> None:
    saved = peer("lion_pytorch_float32")
    fewer = Lion([nn.Parameter(saved["weights"][0])])
    with pytest.raises(ValueError, match="state of 2 parameters does not fit 1 parameters"):
        import_state(saved["optimizer"], fewer)
    turned = Lion([nn.Parameter(saved["weights"][0].T.contiguous()), nn.Parameter(saved["weights"][1])])
    with pytest.raises(ValueError, match=r"parameter 0 .*shape \(24, 23\), not \(23, 24\)"):
        import_state(saved["optimizer"], turned)
    grouped = Lion([{"params": [nn.Parameter(weight)]} for weight in saved["weights"]])
    with pytest.raises(ValueError, match=r"groups of sizes \[2\]; allowed here are \[1, 1\]"):
        import_state(saved["optimizer"], grouped)
    with pytest.raises(ValueError, match="source='adam' is not allowed: use one of lion-pytorch"):
        import_state(saved["optimizer"], fewer, "adam")
    with pytest.raises(ValueError, match="key 'state1' is missing; the keys are 'exp_avg'"):
        import_state(saved["optimizer"], resumed(saved)[1], "bitsandbytes")


def test_an_adam_is_not_taken_for_a_lion() -> None:
    param = nn.Parameter(torch.ones(4))
    adam = torch.optim.AdamW([param])
    param.grad = torch.ones(4)
    adam.step()
    for source in (None, "deepspeed"):
        with pytest.raises(ValueError, match=r"no Lion known|Adam"):
            import_state(adam.state_dict(), Lion([param]), source)


def test_a_compensation_needs_its_bf16_weight() -> None:
    saved = peer("optimi_bfloat16")
    saved["weights"] = [weight.float() for weight in saved["weights"]]
    with pytest.raises(ValueError, match=r"compensates a bfloat16 weight, but the weight is torch\.float32"):
        resumed(saved)


def test_our_own_state_is_known() -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = Lion([param], seed=3)
    assert source_of(optimizer.state_dict()) == "lion_lightning"
    other = Lion([nn.Parameter(torch.ones(4))])
    import_state({"optimizer_states": [optimizer.state_dict()]}, other)
    assert other.param_groups[0]["seed"] == 3


def test_files_are_read_without_running_code_and_urls_not_at_all(tmp_path: Path) -> None:
    optimizer = Lion([nn.Parameter(torch.ones(4))])
    with pytest.raises(ValueError, match="use a local file"):
        import_state("https://example.org/optimizer.pt", optimizer)
    with pytest.raises(ValueError, match="there is no such file"):
        import_state(tmp_path / "missing.pt", optimizer)
    torch.save({"state": {}, "param_groups": [], "model": nn.Linear(1, 1)}, tmp_path / "pickled.pt")
    with pytest.raises(ValueError, match="is not a file of tensors"):
        import_state(tmp_path / "pickled.pt", optimizer)
    (tmp_path / "text.pt").write_text("text")
    with pytest.raises(ValueError, match="is not a file of tensors"):
        import_state(tmp_path / "text.pt", optimizer)
    with pytest.raises(ValueError, match="no optimizer state"):
        import_state({"model": {}}, optimizer)
