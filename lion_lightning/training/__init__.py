"""Training runs. Importing the package registers the resolvers that `conf/train.yaml` uses.

No heavy library is imported here, since `--help` needs the resolvers too.
"""

import os
import time

from omegaconf import DictConfig, OmegaConf

from lion_lightning.command_line import command_name

NO_RUN_ID = ("", "none")  # what torchrun passes on where it was given neither --standalone nor --rdzv-id
INTERACTIVE_JOBS = ("bash", "interactive")  # a shell in which many runs are started one after another
# Settings that become part of a group's name unless they are null or usual: their usual values, and a prefix.
UNUSUAL = {
    "trainer.precision": (("auto", "32-true"), ""),
    "model.pretrained": ((), "from-"),
    "recipe.module.masking.unit": (("token",), ""),
    "data.length_schedule": ((), "lengths-"),
    "data.batch_schedule": ((), "batches-"),
    "data.sources": ((), "sources-"),
    "data.limit_train_samples": ((), "first-"),
}


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
        if value is not None and value not in usual:
            plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            parts.append(f"{label}{plain}")
    return "-".join(parts)


def run_stamp() -> str:
    """What tells one run's folder from the next, equal on every rank and after a requeue or a restart.

    `slurm-JOB` under SLURM, `torchrun-ID` under torchrun, else the time.

    Raises:
        ValueError: torchrun was given neither `--standalone` nor `--rdzv-id`, so the ranks have no common name.
    """
    given = os.environ
    if "SLURM_JOB_ID" in given and given.get("SLURM_JOB_NAME") not in INTERACTIVE_JOBS:
        if "SLURM_ARRAY_JOB_ID" in given:
            return f"slurm-{given['SLURM_ARRAY_JOB_ID']}_{given['SLURM_ARRAY_TASK_ID']}"
        return f"slurm-{given['SLURM_JOB_ID']}"
    if "TORCHELASTIC_RUN_ID" not in given:
        return time.strftime("%Y-%m-%d_%H-%M-%S")
    if given["TORCHELASTIC_RUN_ID"] in NO_RUN_ID:
        raise ValueError("the ranks need a common run folder: give torchrun --standalone or --rdzv-id=NAME")
    return f"torchrun-{given['TORCHELASTIC_RUN_ID']}"


OmegaConf.register_new_resolver("run_stamp", run_stamp, replace=True, use_cache=True)
OmegaConf.register_new_resolver("command_name", command_name, replace=True)
OmegaConf.register_new_resolver("comparison_group", comparison_group, replace=True)
