"""Two shards, one, two again; shards and files: state that is opened in other parts is what was saved, bit for bit."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lion_lightning.training.checkpoint.files import verify
from tests.processes import torchrun
from tests.reliability.resharding import CUT, STORAGE
from tests.reliability.test_two_processes import JOBS_AT_A_TIME, TWO, job

WHOLE = os.environ.get("LION_LIGHTNING_WHOLE_MATRIX") == "1"
MODES = tuple(STORAGE) if WHOLE else ("fp32", "fp32, int8 momentum", "bf16, 24 bits")


def stored(
    folder: Path, name: str, mode: str, strategy: str, processes: int, steps: int, **more: Any
) -> dict[str, Any]:
    """A job of `resharding`."""
    common = {"mode": mode, "strategy": strategy, "processes": processes, "steps": steps, "folder": str(folder)}
    return {"name": f"{name}-{mode}", **common, **more}


def saving(folder: Path) -> list[dict[str, Any]]:
    """On two processes; training goes on after the save."""
    lost = ("trainer=fsdp2", "checkpoint.every_n_steps=1")
    made = [job(folder, "lost", *TWO, *lost, lose=[0, 4])]
    for mode in MODES:
        made += [stored(folder, f"{strategy}-saved", mode, strategy, 2, 4, save_at=2) for strategy in ("ddp", "fsdp2")]
    return made


def on_one_process(folder: Path) -> list[dict[str, Any]]:
    made = []
    for mode in MODES:
        made.append(stored(folder, "on-one", mode, "fsdp2", 1, 3, save_at=0, resume=f"fsdp2-saved-{mode}"))
        made.append(stored(folder, "whole-on-one", mode, "ddp", 1, 3, resume=f"fsdp2-saved-{mode}"))
    return made


def on_two_again(folder: Path) -> list[dict[str, Any]]:
    made = []
    for mode in MODES:
        made.append(stored(folder, "back", mode, "fsdp2", 2, 4, resume=f"on-one-{mode}"))
        made.append(stored(folder, "sharded", mode, "fsdp2", 2, 4, resume=f"ddp-saved-{mode}"))
        made.append(stored(folder, "whole", mode, "ddp", 2, 4, resume=f"fsdp2-saved-{mode}"))
    return made


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    folder = tmp_path_factory.mktemp("states")
    for processes, jobs in ((2, saving(folder)), (1, on_one_process(folder)), (2, on_two_again(folder))):
        for start in range(0, len(jobs), JOBS_AT_A_TIME):
            torchrun(processes, jobs[start : start + JOBS_AT_A_TIME], folder, root)
    return folder


def seen(folder: Path, name: str, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"{name}-rank{rank}.json").read_text())


def state(states: Path, name: str, moment: str) -> dict[str, torch.Tensor]:
    return torch.load(states / f"{name}.pt", weights_only=True)[moment]


def changed(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    """What is not the same in every bit. The scales of a block that is cut are as many as the shards have."""
    keys = {key for key in one.keys() | other.keys() if key != f"{CUT}: exp_avg_scale"}
    return {key for key in keys if one[key].dtype != other[key].dtype or not torch.equal(one[key], other[key])}


def assert_as_saved(saved: dict[str, torch.Tensor], loaded: dict[str, torch.Tensor]) -> None:
    """Equal in every bit; but where a shard cuts an int8 block, the momentum is as good as int8 can be."""
    assert saved["steps"].tolist() == [2, 2]
    assert saved[f"{CUT}: exp_avg"].any(), "a momentum of zeros says nothing"
    if f"{CUT}: momentum" not in saved:
        assert not changed(saved, loaded)
        return
    assert changed(saved, loaded) <= {f"{CUT}: exp_avg", f"{CUT}: momentum"}
    before, after = saved[f"{CUT}: momentum"], loaded[f"{CUT}: momentum"]
    assert (before - after).abs().max() <= 2 * 0.033 * before.abs().max()  # twice the widest step between levels
    assert torch.equal(before[:48].flatten()[:3072], after[:48].flatten()[:3072]), "the blocks before the cut"


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_two_shards_in_one_and_in_two_again_are_what_was_saved(states: Path, mode: str) -> None:
    saved = state(states, f"fsdp2-saved-{mode}", "step 2")
    for name in ("on-one", "back"):
        assert_as_saved(saved, state(states, f"{name}-{mode}", "loaded"))
    if "int8" not in mode:
        after = state(states, f"fsdp2-saved-{mode}", "step 4")
        assert not changed(after, state(states, f"back-{mode}", "step 4")), "the run goes on in other ways"
        assert changed(saved, after)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_ddp_goes_on_from_shards_and_fsdp2_from_a_file(states: Path, mode: str) -> None:
    saved = state(states, f"fsdp2-saved-{mode}", "step 2")
    for name in ("whole", "whole-on-one"):
        assert_as_saved(saved, state(states, f"{name}-{mode}", "loaded"))
    assert_as_saved(state(states, f"ddp-saved-{mode}", "step 2"), state(states, f"sharded-{mode}", "loaded"))


@pytest.mark.distributed
@pytest.mark.slow
def test_shards_that_cannot_be_written_end_the_run_on_all_ranks(states: Path) -> None:
    for rank in (0, 1):
        error = seen(states, "lost", rank)["error"]
        assert error.startswith("CheckpointFailed: a checkpoint could not be written"), error
    assert verify(states / "lost/before/last.ckpt").global_step == 3
    assert (states / "lost/before/best.safetensors").is_file()


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_weights_lie_beside_the_best_shards(states: Path, mode: str) -> None:
    weights = load_file(states / f"best-fsdp2-saved-{mode}.safetensors")
    saved = state(states, f"fsdp2-saved-{mode}", "step 2")
    assert weights.keys() == {key for key in saved if ":" not in key and key != "steps"}
    assert all(torch.equal(value, saved[name]) for name, value in weights.items())
