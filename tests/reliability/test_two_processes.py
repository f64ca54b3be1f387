"""DDP and FSDP2 on two real processes (gloo, CPU): what one of the same effective batch does, and exact resume."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lion_lightning.training.checkpoint.files import load, newest_valid, verify
from tests.processes import torchrun
from tests.reliability import ranks

WHOLE = os.environ.get("LION_LIGHTNING_WHOLE_MATRIX") == "1"
STEPS = 6
JOBS_AT_A_TIME = 6  # of one start of torchrun, which has two minutes
DIGITS = (
    "recipe=image_classification", "logger=none", "export=false", "recipe.module.crop_padding=0",
    f"trainer.max_steps={STEPS}", "trainer.val_check_interval=3",
    "model.config.num_hidden_layers=2", "model.config.hidden_size=32", "model.config.num_attention_heads=2",
    "model.config.intermediate_size=32", "trainer.accelerator=cpu", "trainer.check_replicas_every=1",
    "data.limit_train_samples=32", "optim.lr=1e-3", "schedule=constant",
)  # fmt: skip
ONE, TWO = ("data.batch_size=32",), ("data.batch_size=16",)
EVERY_MODE = {
    "fp32": (),
    "fp32-bf16-momentum": ("optim.momentum_dtype=bfloat16",),
    "fp32-int8-momentum": ("optim.momentum_dtype=int8",),
    "bf16-32": ("trainer.precision=bf16-true",),
    "bf16-32-int8-momentum": ("trainer.precision=bf16-true", "optim.momentum_dtype=int8"),
    "bf16-24": ("trainer.precision=bf16-true", "optim.weight_bits=24"),
    "bf16-24-int8-momentum": ("trainer.precision=bf16-true", "optim.weight_bits=24", "optim.momentum_dtype=int8"),
    "bf16-16-bf16-momentum": ("trainer.precision=bf16-true", "optim.weight_bits=16"),
    "bf16-16": ("trainer.precision=bf16-true", "optim.weight_bits=16", "optim.momentum_dtype=int8"),
}
MODES = EVERY_MODE if WHOLE else {mode: EVERY_MODE[mode] for mode in ("fp32",)}
TOLERANCE = {"fp32": 1e-4, "bf16": 0.01}
VALIDATION_TOLERANCE = {"fp32": 1e-4, "bf16": 0.02}  # bf16-true keeps its mean in bf16: steps of 1/64 at 2.3


def job(folder: Path, name: str, *settings: str, where: str | None = None, **more: Any) -> dict[str, Any]:
    return {"name": name, "settings": [*DIGITS, *settings, f"run_dir={folder / (where or name)}"], **more}


def jobs_of_two(folder: Path) -> list[dict[str, Any]]:
    made = []
    for strategy in ("ddp", "fsdp2"):
        two = (*TWO, f"trainer={strategy}")
        made += [job(folder, f"{strategy}-{mode}", *two, *settings) for mode, settings in MODES.items()]
        for part, more in (("a", {"signal": [1, 2]}), ("b", {"signal": [0, 3]}), ("c", {})):
            made.append(
                job(folder, f"{strategy}-stopped-{part}", *two, "resume=auto", where=f"{strategy}-stopped", **more)
            )
        made.append(job(folder, f"{strategy}-half", *two, signal=[1, 3]))
    made.append(job(folder, "diverged", *TWO, "trainer=ddp", diverge=[1, 2]))
    return made


def jobs_of_one(folder: Path) -> list[dict[str, Any]]:
    """Under torchrun too, since FSDP2 wants a process group also for one."""
    made = []
    for strategy in ("ddp", "fsdp2"):
        resumed = (*TWO, "trainer.accumulate_grad_batches=2", f"trainer={strategy}", "resume=auto")
        made.append(job(folder, f"{strategy}-half-on-one", *resumed, where=f"{strategy}-half", signal=[0, 5]))
    return made


def jobs_of_two_again(folder: Path) -> list[dict[str, Any]]:
    made = []
    for strategy in ("ddp", "fsdp2"):
        resumed = (*TWO, f"trainer={strategy}", "resume=auto")
        made.append(job(folder, f"{strategy}-half-on-two", *resumed, where=f"{strategy}-half"))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """What all runs left: on two processes, then half of them continued on one, and one of them on two again."""
    folder = tmp_path_factory.mktemp("runs")
    two = jobs_of_two(folder)
    for start in range(0, len(two), JOBS_AT_A_TIME):
        torchrun(2, two[start : start + JOBS_AT_A_TIME], folder, root)
    torchrun(1, jobs_of_one(folder), folder, root)
    torchrun(2, jobs_of_two_again(folder), folder, root)
    return folder


def seen(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"{name}-rank{rank}.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The same runs in this one process."""
    folder = tmp_path_factory.mktemp("alone")
    done = {mode: ranks.carry_out(job(folder, mode, *ONE, *settings), 0) for mode, settings in MODES.items()}
    return json.loads(json.dumps(done))


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_have_the_loss_curve_of_one(
    folder: Path, alone: dict[str, dict[str, Any]], strategy: str, mode: str
) -> None:
    two, one = seen(folder, f"{strategy}-{mode}"), alone[mode]
    assert not two["error"]
    assert two["samples"] == one["samples"], "other samples, or in another order"
    assert len(two["losses"]) == STEPS
    tolerance = TOLERANCE[mode[:4]]
    assert two["losses"] == pytest.approx(one["losses"], rel=tolerance)
    assert two["validation"] == pytest.approx(one["validation"], rel=VALIDATION_TOLERANCE[mode[:4]])
    assert one["losses"]["6"] < 0.97 * one["losses"]["1"], "nothing was learned, so equal curves say nothing"


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_signal_to_one_rank_stops_both_and_the_resumed_run_is_the_same(folder: Path, strategy: str) -> None:
    whole = seen(folder, f"{strategy}-fp32")
    parts = [seen(folder, f"{strategy}-stopped-{part}") for part in "abc"]
    for rank in (0, 1):
        for part, step in (("a", 2), ("b", 3)):
            error = seen(folder, f"{strategy}-stopped-{part}", rank)["error"]
            assert error.startswith(f"TrainingInterrupted: stopped by signal 15 after step {step}: saved"), error
    for key in ("losses", "samples"):
        assert {step: value for part in parts for step, value in part[key].items()} == whole[key]
    assert parts[2]["validation"] == whole["validation"], "the validation that was due when the signal came"


@pytest.mark.distributed
@pytest.mark.slow
def test_the_resumed_weights_on_two_processes_are_equal_in_every_bit(folder: Path) -> None:
    assert_equal_in_every_bit(folder / "ddp-fp32", folder / "ddp-stopped")


def assert_equal_in_every_bit(one: Path, other: Path) -> None:
    """The weights and momenta that two runs ended with."""
    left, right = (load(run / "checkpoints/last.ckpt") for run in (one, other))
    assert left["global_step"] == right["global_step"] == STEPS
    assert left["callbacks"]["LionGuard"]["steps"] == right["callbacks"]["LionGuard"]["steps"] == STEPS
    assert left["state_dict"].keys() == right["state_dict"].keys()
    assert all(torch.equal(value, right["state_dict"][name]) for name, value in left["state_dict"].items())
    momenta, others = (checkpoint["optimizer_states"][0]["state"] for checkpoint in (left, right))
    assert all(torch.equal(momenta[key]["exp_avg"], others[key]["exp_avg"]) for key in momenta)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_then_one_then_two_see_the_same_samples(folder: Path, strategy: str) -> None:
    whole = seen(folder, f"{strategy}-fp32")
    parts = [seen(folder, f"{strategy}-half{part}") for part in ("", "-on-one", "-on-two")]
    assert [list(part["losses"]) for part in parts] == [["1", "2", "3"], ["4", "5"], ["6"]]
    samples = {step: sorted(value) for part in parts for step, value in part["samples"].items()}
    assert samples == {step: sorted(value) for step, value in whole["samples"].items()}
    losses = {**parts[0]["losses"], "6": parts[2]["losses"]["6"]}
    assert losses == pytest.approx({step: whole["losses"][step] for step in losses}, rel=1e-4)
    # Lightning has divided each micro-batch's loss by how many there are.
    assert parts[1]["losses"] == pytest.approx({step: whole["losses"][step] for step in ("4", "5")}, rel=1e-4)


@pytest.mark.distributed
@pytest.mark.slow
def test_replicas_that_differ_end_the_run_and_are_named(folder: Path) -> None:
    for rank in (0, 1):
        error = seen(folder, "diverged", rank)["error"]
        assert error.startswith("ReplicasDiffer: after step 3"), error
    assert seen(folder, "ddp-fp32")["error"] == ""


@pytest.mark.distributed
@pytest.mark.slow
def test_sharded_checkpoints_are_folders_that_are_whole_or_refused(folder: Path) -> None:
    checkpoints = folder / "fsdp2-fp32/checkpoints"
    path, wrong = newest_valid(checkpoints)
    assert path is not None
    assert not wrong
    assert path.is_dir()
    assert verify(checkpoints / "last.ckpt").global_step == STEPS
    shards = sorted(path.glob("*.distcp"))
    assert len(shards) == 2
    data = bytearray(shards[1].read_bytes())
    data[len(data) // 2] ^= 1
    shards[1].unlink()
    shards[1].write_bytes(data)
    older, wrong = newest_valid(checkpoints)
    assert older is not None
    assert verify(older).global_step == 3
    assert str(path) in wrong[0]
    shards[1].write_bytes(b"")
    assert newest_valid(checkpoints)[0] == older


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"] if WHOLE else ["ddp"])
def test_a_rank_that_fails_is_named_by_torchrun_and_ends_the_others(tmp_path: Path, root: Path, strategy: str) -> None:
    broken = job(tmp_path, "broken", *TWO, f"trainer={strategy}", "checkpoint.every_n_steps=1", fail=[1, 3], fatal=True)
    told = torchrun(2, [broken], tmp_path, root, fails=True)
    root_cause = told.split("Root Cause")[1]
    assert "rank      : 1 (local_rank: 1)" in root_cause
    assert "RuntimeError: this rank is broken" in root_cause
    checkpoints = tmp_path / "broken/checkpoints"
    assert verify(checkpoints / "last.ckpt").global_step == 2


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"] if WHOLE else ["ddp"])
def test_torchrun_restarts_a_run_that_lost_a_rank(
    folder: Path, tmp_path: Path, root: Path, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # docs/scaling.md
    settings = (*TWO, f"trainer={strategy}", "checkpoint.every_n_steps=2", "resume=auto")
    torchrun(2, [job(tmp_path, "crashed", *settings, kill=[1, 5])], tmp_path, root, "--max-restarts=1")
    whole, after = seen(folder, f"{strategy}-fp32"), seen(tmp_path, "crashed")
    assert not after["error"]
    for key in ("losses", "samples"):
        assert after[key] == {step: whole[key][step] for step in ("5", "6")}, "not from the checkpoint of step 4"
    assert after["validation"]["6"] == whole["validation"]["6"]
    if strategy == "ddp":
        assert_equal_in_every_bit(folder / "ddp-fp32", tmp_path / "crashed")


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"] if WHOLE else ["ddp"])
def test_the_others_end_when_a_rank_hangs(tmp_path: Path, root: Path, strategy: str) -> None:
    settings = (*TWO, f"trainer={strategy}", "checkpoint.every_n_steps=1", "trainer.timeout_minutes=0.1")
    torchrun(2, [job(tmp_path, "stuck", *settings, hang=[1, 3], fatal=True)], tmp_path, root, fails=True)
    assert verify(tmp_path / "stuck/checkpoints/last.ckpt").global_step == 2
