"""A finished run's model and data again, from the folder it left, and what they need in a loop without a Trainer."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import OmegaConf

from lion_lightning.training.build import build_data, build_module
from lion_lightning.training.checkpoint.files import weights_of, with_names_of


def run_folders(places: list[Path]) -> list[Path]:
    """The folders of runs with a best checkpoint, at or below `places`."""
    found = {file.parents[1] for place in places for file in place.rglob("checkpoints/best.ckpt")}
    return sorted(folder for folder in found if (folder / "config.yaml").is_file())


def load_run(folder: Path, overrides: Sequence[str] = ()) -> tuple[Any, Any, Any]:
    """Configuration, module with its best weights, and data of a run.

    Args:
        folder: Where the run was kept.
        overrides: `key=value` changes of its configuration, such as `seed=2`.
    """
    cfg: Any = OmegaConf.merge(OmegaConf.load(folder / "config.yaml"), OmegaConf.from_dotlist(list(overrides)))
    data = build_data(cfg)
    torch.manual_seed(cfg.seed)
    module = build_module(cfg, data)
    weights = weights_of(folder / "checkpoints" / "best.ckpt")
    module.load_state_dict(with_names_of(weights, module.state_dict()))
    return cfg, module.eval(), data


def trainer_stand_in(steps: int, device: torch.device) -> Any:
    """What a recipe's data and module ask of their Trainer, for a plain loop of `steps` optimizer steps."""
    return SimpleNamespace(
        max_steps=steps, accumulate_grad_batches=1, global_step=0, global_rank=0, world_size=1,
        estimated_stepping_batches=steps, strategy=SimpleNamespace(root_device=device),
    )  # fmt: skip
