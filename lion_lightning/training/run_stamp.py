"""What tells one run's folder from the next: the same on every rank, and the same after a requeue or a restart.

Registered as the resolver `${run_stamp:}` for `conf/train.yaml`. Nothing heavy is imported here: `--help` needs it too.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path

from omegaconf import OmegaConf

FORMAT = "%Y-%m-%d_%H-%M-%S"
NO_RUN_ID = ("", "none")  # what torchrun passes on where it was given no --rdzv-id
INTERACTIVE_JOBS = ("bash", "interactive")  # a shell in which many runs are started one after another
START_TIME_FIELD = 19  # of what follows the command in /proc/PID/stat: ticks after boot


def register() -> None:
    """Make `${run_stamp:}` known to OmegaConf."""
    OmegaConf.register_new_resolver("run_stamp", run_stamp, replace=True, use_cache=True)


def run_stamp() -> str:
    """`slurm-JOB` under SLURM, `torchrun-ID` under torchrun, else the time.

    Raises:
        ValueError: torchrun on several machines was given no `--rdzv-id`, so nothing is common to all ranks.
    """
    return _slurm(os.environ) or _torchrun(os.environ) or time.strftime(FORMAT)


def _slurm(environment: Mapping[str, str]) -> str | None:
    if "SLURM_JOB_ID" not in environment or environment.get("SLURM_JOB_NAME") in INTERACTIVE_JOBS:
        return None
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"slurm-{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return f"slurm-{environment['SLURM_JOB_ID']}"


def _torchrun(environment: Mapping[str, str]) -> str | None:
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    run_id = environment["TORCHELASTIC_RUN_ID"]
    if run_id not in NO_RUN_ID:
        return f"torchrun-{run_id}"
    if environment.get("GROUP_WORLD_SIZE", "1") != "1":
        raise ValueError("the ranks of several machines need a common run folder: give torchrun --rdzv-id=NAME")
    return f"torchrun-{os.getppid()}-{_started(os.getppid())}"


def _started(process: int) -> str:
    """When the launcher started, which its process number alone does not tell for ever."""
    stat = Path(f"/proc/{process}/stat")
    if not stat.is_file():
        raise ValueError("cannot tell when torchrun was started: give it --rdzv-id=NAME or --standalone")
    return stat.read_text().rpartition(")")[2].split()[START_TIME_FIELD]
