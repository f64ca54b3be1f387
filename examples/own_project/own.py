"""A command of one's own: `python own.py optim=adamw trainer.max_steps=200`."""

import os

import hydra
from omegaconf import DictConfig

import lion_lightning.training  # noqa: F401  # registers what its configuration uses
from lion_lightning.__main__ import runner

os.environ["LION_LIGHTNING_TRUST"] = "sines"


@hydra.main(version_base="1.3", config_path="conf", config_name="own")
def main(cfg: DictConfig) -> float:
    return runner(cfg)(cfg)


if __name__ == "__main__":
    main()
