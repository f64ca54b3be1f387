"""The name of a run's folder: common to all ranks, and the same after a requeue or a restart."""

import time

import pytest

from lion_lightning.training import run_stamp

VARIABLES = ("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "TORCHELASTIC_RUN_ID",
             "GROUP_WORLD_SIZE")  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "stamp"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "lion"}, "slurm-7"),
        ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}, "slurm-7_2"),
        ({"TORCHELASTIC_RUN_ID": "abc", "GROUP_WORLD_SIZE": "4"}, "torchrun-abc"),
        ({"SLURM_JOB_ID": "7", "TORCHELASTIC_RUN_ID": "abc"}, "slurm-7"),
    ],
)
def test_the_launcher_names_it(variables: dict[str, str], stamp: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run_stamp() == stamp


@pytest.mark.parametrize("variables", [{}, {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "bash"}])
def test_without_one_it_is_the_time(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    time.strptime(run_stamp(), "%Y-%m-%d_%H-%M-%S")


def test_ranks_without_a_common_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(ValueError, match="--rdzv-id=NAME"):
        run_stamp()
