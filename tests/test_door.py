"""The command line: a mistake is one readable line on stderr, and exit status 2."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from lion_lightning import __main__


def call(root: Path, folder: Path, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "train.py", *arguments, f"hydra.run.dir={folder}", f"hydra.sweep.dir={folder}"]
    environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)


# Each line of the input is a command line that `main` runs, all of them in one process.
IN_ONE_PROCESS = """
import os, sys
sys.argv = ["train.py"]
from lion_lightning.__main__ import main
for line in sys.stdin.read().splitlines():
    sys.argv[1:] = line.split()
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    except Exception as error:
        code = f"{type(error).__name__}: {error}"
    print(f"CODE {code}", file=sys.stderr, flush=True)
"""
MISTAKES = {
    "recipe=nope": ("recipe", "nope", "bert_mlm", "image_classification"),
    "optim=lino": ("optim", "lino", "adamw"),
    "optim.lrr=1": ("lrr",),
    "trainer.gpus=1": ("gpus",),
    "recipee=bert_mlm": ("recipee",),
    "optim.lr==1": ("optim.lr",),
    "model=resnet18 data=text_files data.path=PROSE data.vocab_size=256 data.val_fraction=0.5": ("resnet", "bert"),
    "recipe=bert_mlm data=digits": ("ImageArrays", "python_docs"),
    "recipe=image_classification model=bert_tiny": ("bert", "image-classification"),
    "recipe=image_classification data.batch_size=2000": ("2000", "1438"),
    "recipe=image_classification trainer.precision=8-bit": ("trainer.precision", "8-bit", "bf16-mixed"),
    "recipe=image_classification seed=-1": ("seed", "-1"),
    "recipe=image_classification seed=one": ("seed", "one"),
    "recipe=image_classification +optim.lrr=1": ("lrr", "lr"),
    "recipe=image_classification optim.lr=-1": ("lr", "-1"),
    "recipe=image_classification optim._target_=torch.load": ("torch.load", "not allowed"),
    "recipe=image_classification resume=/nowhere.ckpt": ("/nowhere.ckpt",),
    "recipe=image_classification trainer.strategy=teleport": ("teleport",),
    "data=text_files": ("data.path",),
    "data=text_files data.path=/nowhere": ("data.path=/nowhere", "no such file or folder"),
    "recipe=image_classification trainer.devices=99": ("trainer.devices=99",),
}


@pytest.mark.slow
def test_every_mistake_is_one_line_and_status_2(root: Path, tmp_path: Path, prose: Path) -> None:
    common = f"hydra.run.dir={tmp_path} logger=none export=false trainer.max_steps=1"
    lines = "\n".join(f"{mistake} {common}" for mistake in MISTAKES).replace("PROSE", str(prose))
    answer = subprocess.run(
        [sys.executable, "-c", IN_ONE_PROCESS],
        cwd=root,
        input=lines,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    wrong = []
    told = answer.stderr.split("CODE ")
    said = [told[0], *(part.split("\n", 1)[1] for part in told[1:-1])]
    codes = [part.split("\n", 1)[0] for part in told[1:]]
    assert len(codes) == len(MISTAKES), answer.stderr
    for (mistake, named), stderr, code in zip(MISTAKES.items(), said, codes, strict=True):
        shown = stderr.strip().splitlines()
        if code != "2" or len(shown) != 1 or not all(name in shown[0] for name in named):
            wrong.append(f"{mistake} -> {code}: {stderr.strip()[-300:]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_a_sweep_over_several_devices_is_refused(root: Path, tmp_path: Path) -> None:
    answer = call(root, tmp_path, ["-m", "seed=1,2", "trainer.accelerator=cpu", "trainer.devices=2"])
    assert answer.returncode == 2
    assert "-m with trainer.devices=2" in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, ""),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "[rank 1] "),
        ({"RANK": "0", "WORLD_SIZE": "1"}, ""),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, "[rank 3] "),
        ({"SLURM_NTASKS": "4"}, ""),  # inside an allocation, but not started by srun
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "[rank 1] "),
    ],
)
def test_the_rank_is_named_where_there_are_several(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], said: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert __main__._rank() == said


@pytest.mark.slow
def test_every_failing_job_of_a_sweep_is_named_at_its_end(root: Path, tmp_path: Path) -> None:
    settings = ["recipe=image_classification", "optim=lion,adamw", "data.batch_size=5000", "logger=none"]
    answer = call(root, tmp_path, ["-m", *settings])
    assert answer.returncode == 2
    *_, counted, first, second, last = answer.stderr.strip().splitlines()
    assert counted == "2 jobs failed"
    assert first.startswith("job 0 (data.batch_size=5000 logger=none optim=lion")
    assert second.startswith("job 1 (data.batch_size=5000 logger=none optim=adamw")
    assert last.startswith("error: the effective batch of 5000 samples is larger than the training set")


def test_a_flag_may_stand_between_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HYDRA_FULL_ERROR", "OMP_WAIT_POLICY"):  # `main` sets them
        monkeypatch.setenv(variable, os.environ.get(variable, "1"))
    seen: list[str] = []
    monkeypatch.setattr(__main__, "train", lambda: seen.extend(sys.argv[1:]))
    monkeypatch.setattr(sys, "argv", ["train.py", "recipe=cifar10", "-m", "run_dir=a", "seed=1,2", "--config-dir", "."])
    __main__.main()
    assert seen == ["-m", "--config-dir", ".", "hydra.run.dir=a", "recipe=cifar10", "run_dir=a", "seed=1,2"]
