"""A finished run's model and data again, from the folder it left."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from lion_lightning.training.build import build_data, build_module
from lion_lightning.training.checkpoint.files import weights_of, with_names_of


def run_folders(places: list[Path]) -> list[Path]:
    """The folders of runs with a best checkpoint, at or below `places`."""
    found = {file.parents[1] for place in places for file in place.rglob("checkpoints/best.ckpt")}
    return sorted(folder for folder in found if (folder / "config.yaml").is_file())


def load_run(folder: Path) -> tuple[Any, Any, Any]:
    """Configuration, module with its best weights, and data of the run in `folder`."""
    cfg: Any = OmegaConf.load(folder / "config.yaml")
    data = build_data(cfg)
    torch.manual_seed(cfg.seed)
    module = build_module(cfg, data)
    weights = weights_of(folder / "checkpoints" / "best.ckpt")
    module.load_state_dict(with_names_of(weights, module.state_dict()))
    return cfg, module.eval(), data
