"""`scripts/slurm_train.sh` with stand-ins for `srun` and `scontrol`: two tasks, a time limit, the queue, and on."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lion_lightning.training.checkpoint.files import load

FIRST_PORT, PORTS = 20000, 20000  # the script takes its port from the number of the job
STEPS = 2000  # more than are done before the signal comes
SETTINGS = (
    "recipe=image_classification", "logger=none", "export=false", "trainer=ddp", "trainer.accelerator=cpu",
    "model.config.num_hidden_layers=1", "model.config.hidden_size=32", "model.config.num_attention_heads=2",
    "model.config.intermediate_size=32", "data.batch_size=8", "trainer.val_check_interval=1000",
)  # fmt: skip
SCONTROL = """#!/bin/sh
echo "$*" >> "$STANDIN/scontrol"
[ "$1" = show ] && echo 127.0.0.1 || true
"""
SRUN = """#!{python}
import os, pathlib, subprocess, sys
folder, command = pathlib.Path(os.environ["STANDIN"]), sys.argv[1:]
options = [part for part in command if part.startswith("--")]
folder.joinpath("srun").write_text(" ".join(options))
tasks = [
    subprocess.Popen(command[len(options):], env={{**os.environ, "SLURM_PROCID": rank, "SLURM_LOCALID": "0", "SLURM_NODEID": rank}})
    for rank in map(str, range(int(os.environ["SLURM_NTASKS"])))
]
folder.joinpath("tasks").write_text(" ".join(str(task.pid) for task in tasks))
sys.exit(max(task.wait() for task in tasks))
"""  # noqa: E501


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two machines with one task each, both of them this one."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    number = str(free_port() - FIRST_PORT)
    of_job = {"JOB_ID": number, "JOB_NAME": "lion-train", "JOB_NODELIST": "here[1-2]", "NTASKS": "2", "NNODES": "2",
              "NTASKS_PER_NODE": "1"}  # fmt: skip
    return {
        **os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable,
        "STANDIN": str(tmp_path), **{f"SLURM_{name}": value for name, value in of_job.items()},
    }  # fmt: skip


def free_port() -> int:
    for port in range(FIRST_PORT + os.getpid() % PORTS, FIRST_PORT + PORTS):
        with socket.socket() as candidate:
            if candidate.connect_ex(("127.0.0.1", port)):
                return port
    raise OSError("no port is free")


@pytest.fixture
def start(root: Path, cluster: dict[str, str], tmp_path: Path) -> Iterator[Callable[[int], subprocess.Popen[str]]]:
    """Start the job, for this many steps."""
    jobs = []

    def started(steps: int) -> subprocess.Popen[str]:
        command = ["bash", "scripts/slurm_train.sh", *SETTINGS, f"trainer.max_steps={steps}",
                   f"hydra.run.dir={tmp_path}/runs/${{run_stamp:}}", "checkpoint.every_n_steps=5"]  # fmt: skip
        jobs.append(subprocess.Popen(command, cwd=root, env=cluster, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                     text=True, start_new_session=True))  # fmt: skip
        return jobs[-1]

    yield started
    for job in jobs:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_job_out_of_time_is_saved_requeued_and_goes_on(
    start: Callable[[int], subprocess.Popen[str]], cluster: dict[str, str], tmp_path: Path
) -> None:
    number = cluster["SLURM_JOB_ID"]
    run = tmp_path / "runs" / f"slurm-{number}"
    first = start(STEPS)
    deadline = time.monotonic() + 120
    while not (run / "checkpoints/last.ckpt.json").exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    for task in (tmp_path / "tasks").read_text().split():
        os.kill(int(task), signal.SIGUSR1)  # by the scheduler, two minutes before the limit
    told, _ = first.communicate(timeout=120)
    assert first.returncode == 138, told
    assert f"job {number} goes back into the queue" in told
    assert (tmp_path / "scontrol").read_text().splitlines() == ["show hostnames here[1-2]", f"requeue {number}"]
    assert (tmp_path / "srun").read_text() == "--kill-on-bad-exit=1 --label"
    stopped_at, on_the_other = re.findall(r"stopped by signal 10 after step (\d+): saved", told)
    assert stopped_at == on_the_other
    second = start(int(stopped_at) + 3)
    told, _ = second.communicate(timeout=120)
    assert second.returncode == 0, told
    assert f"checkpoints/step-{int(stopped_at):09d}.ckpt" in told
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == [run.name], "a folder for each attempt"
    assert load(run / "checkpoints/last.ckpt")["global_step"] == int(stopped_at) + 3
    assert "requeue" not in (tmp_path / "scontrol").read_text().splitlines()[-1]


def test_the_script_asks_for_a_warning_and_a_requeue(root: Path) -> None:
    script = root / "scripts/slurm_train.sh"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    asked = re.findall(r"^#SBATCH (\S+)", script.read_text(), re.MULTILINE)
    assert {"--requeue", "--signal=USR1@120", "--open-mode=append"} <= set(asked)
