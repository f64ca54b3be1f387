"""The scripts of examples/, as a user runs them: each ends without an error, and its loss has fallen."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import run_python

LIGHTNING_CLI = ("examples/lightning_cli.py", "fit", "--config", "examples/lightning_cli.yaml")
CLI_NEEDS = "jsonargparse typeshed_client"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")

# torch 2.13 with FSDP2 on gloo: one of twenty processes aborts so when it ends, after the last line of its program, and
# does so with torch.optim.AdamW and nothing of ours imported.
ABORTED_AT_THE_END = "terminate called without an active exception"


def run(root: Path, folder: Path, *command: str, needs: str = "torch", forgiven: str | None = None) -> str:
    """What `python *command` prints to stdout; skips where one of the packages in `needs` is missing.

    An exit code is an error unless stderr has what is `forgiven`.
    """
    for package in needs.split():
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        "KERAS_BACKEND": "torch",
        "KERAS_HOME": str(folder),
    }
    command = tuple(str(root / word) if word.startswith("examples/") else word for word in command)
    if needs == "torch":  # no import of it may be missing
        answer = subprocess.run(
            [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=500
        )
    else:
        answer = run_python(command, folder, environment, limit_seconds=500)
    assert answer.returncode == 0 or (forgiven and forgiven in answer.stderr), answer.stderr[-3000:]
    return answer.stdout


def losses(printed: str) -> list[float]:
    return [float(number) for number in re.findall(r"\bloss'?:? '?(\d+\.\d+)", printed)]


@pytest.mark.parametrize(
    ("script", "needs", "at_most"),
    [
        ("plain_loop.py", "torch", 0.8),
        ("lightning_module.py", "lightning", 1.1),  # log(4) is 1.39
        ("fabric_loop.py", "lightning", 0.8),
        ("accelerate_loop.py", "accelerate", 0.9),
        ("hf_trainer.py", "transformers accelerate", 0.5),
        ("keras_torch.py", "keras", 0.8),
    ],
)
def test_the_loss_falls(script: str, needs: str, at_most: float, root: Path, tmp_path: Path) -> None:
    printed = run(root, tmp_path, f"examples/{script}", needs=needs)
    assert losses(printed)[-1] < at_most


@pytest.mark.parametrize(
    ("script", "needs", "decay"),
    [("hf_trainer.py", "transformers accelerate", 0.2), ("trl_sft.py", "trl peft", 0.1)],
)
def test_hugging_face_trainers_decay_by_what_from_adamw_gives(
    script: str, needs: str, decay: float, root: Path, tmp_path: Path
) -> None:
    groups = f"runpy.run_path({str(root / 'examples' / script)!r})['trainer'].optimizer.param_groups"
    (tmp_path / "decays.py").write_text(f"import runpy\nprint([group['weight_decay'] for group in {groups}])")
    assert f"[{decay}, 0.0]" in run(root, tmp_path, "decays.py", needs=needs)


def test_a_lora_of_trl_and_peft_trains(root: Path, tmp_path: Path) -> None:
    first, *_, last = losses(run(root, tmp_path, "examples/trl_sft.py", needs="trl peft"))
    assert last < first


def test_the_command_line_of_lightning_takes_lion_by_its_name(root: Path, tmp_path: Path) -> None:
    printed = run(
        root,
        tmp_path,
        *LIGHTNING_CLI,
        "--optimizer.weight_bits",
        "16",
        "--print_config",
        needs=CLI_NEEDS,
    )
    assert "class_path: lion_lightning.optim.Lion" in printed
    assert "weight_bits: 16" in printed


def test_a_run_of_the_command_line_of_lightning(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path, *LIGHTNING_CLI, needs=CLI_NEEDS)


@pytest.mark.slow
@pytest.mark.distributed
def test_fsdp2_on_two_processes(root: Path, tmp_path: Path) -> None:
    printed = run(root, tmp_path, *TORCHRUN, "examples/fsdp2_loop.py", forgiven=ABORTED_AT_THE_END)
    assert "epoch 19" in printed
    assert losses(printed)[-1] < 0.8


@pytest.mark.slow
@pytest.mark.distributed
def test_deepspeed_zero_1_on_two_processes(root: Path, tmp_path: Path) -> None:
    printed = run(root, tmp_path, *TORCHRUN, "examples/deepspeed_zero1.py", needs="deepspeed")
    assert losses(printed)[-1] < 0.8
