"""Names that `conf/train.yaml` takes from Python: the stamp of a run's folder, and the group it is compared in.

Registered as the resolvers `${run_stamp:}` and `${comparison_group:}` when `lion_lightning.training` is imported. Only
OmegaConf is imported here, since `--help` needs them too.
"""

import os
import time
from collections.abc import Mapping

from omegaconf import DictConfig, OmegaConf

NO_RUN_ID = ("", "none")  # what torchrun passes on where it was given neither --standalone nor --rdzv-id
INTERACTIVE_JOBS = ("bash", "interactive")  # a shell in which many runs are started one after another
# Settings that are named in a group unless they have their usual value, and how.
UNUSUAL = {
    "trainer.precision": ("32-true", ""),
    "model.pretrained": (None, "from-"),
    "recipe.module.masking.unit": ("token", ""),
    "data.length_schedule": (None, "lengths-"),
    "data.batch_schedule": (None, "batches-"),
    "data.sources": (None, "sources-"),
}


def register() -> None:
    """Make the resolvers known to OmegaConf."""
    OmegaConf.register_new_resolver("run_stamp", run_stamp, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("comparison_group", comparison_group, replace=True)


def comparison_group(*, _root_: DictConfig) -> str:
    """What a run is compared in: everything but the optimizer and the seed; unusual settings are named at the end.

    Args:
        _root_: the whole configuration, which OmegaConf passes.
    """
    cfg, trainer = _root_, _root_.trainer
    budget = f"{trainer.max_steps}x{cfg.data.batch_size}x{trainer.accumulate_grad_batches}"
    parts = [cfg.recipe.name, cfg.data.name, cfg.model.name, budget]
    for name, (usual, label) in UNUSUAL.items():
        value = OmegaConf.select(cfg, name)
        if value not in (None, usual):
            parts.append(
                f"{label}{OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value}"
            )
    return "-".join(parts)


def run_stamp() -> str:
    """What tells one run's folder from the next, equal on every rank and after a requeue or a restart.

    `slurm-JOB` under SLURM, `torchrun-ID` under torchrun, else the time.

    Raises:
        ValueError: torchrun was given neither `--standalone` nor `--rdzv-id`, so the ranks have no common name.
    """
    return _slurm(os.environ) or _torchrun(os.environ) or time.strftime("%Y-%m-%d_%H-%M-%S")


def _slurm(environment: Mapping[str, str]) -> str | None:
    if "SLURM_JOB_ID" not in environment or environment.get("SLURM_JOB_NAME") in INTERACTIVE_JOBS:
        return None
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"slurm-{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return f"slurm-{environment['SLURM_JOB_ID']}"


def _torchrun(environment: Mapping[str, str]) -> str | None:
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    if environment["TORCHELASTIC_RUN_ID"] in NO_RUN_ID:
        raise ValueError("the ranks need a common run folder: give torchrun --standalone or --rdzv-id=NAME")
    return f"torchrun-{environment['TORCHELASTIC_RUN_ID']}"
