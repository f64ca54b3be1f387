"""The Weights & Biases logger of a run, and what it records beside metrics: predictions and pictures."""

import os
import secrets
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import wandb
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import WandbLogger

Mode = Literal["online", "offline", "disabled"]
MODES: tuple[Mode, ...] = ("online", "offline", "disabled")


class RunLogger(WandbLogger):
    """Lightning's WandbLogger for exactly one run.

    Args:
        project, entity: The W&B project and team.
        run_name: Display name of the run.
        group: Name shared by the runs that can be compared.
        job_type, tags: For filters.
        mode: `online`, `offline` or `disabled`; None: see `choose_mode`.
        save_dir: Folder in which W&B creates its `wandb` folder.
        run_id: Id of a run to continue, online only: a later upload of the same id overwrites the earlier one, so an
            offline run always gets a new id.

    Raises:
        ValueError: Unknown mode, or a project or tag that W&B does not take.
    """

    def __init__(
        self,
        project: str,
        run_name: str,
        group: str,
        save_dir: str,
        entity: str | None = None,
        job_type: str = "train",
        tags: Sequence[str] = (),
        mode: Mode | None = None,
        run_id: str | None = None,
    ) -> None:
        self.mode = choose_mode(mode)
        try:  # what wandb.init refuses, refused here
            settings = wandb.Settings(silent=True, project=project, run_tags=tuple(tags))
        except wandb.Error as error:
            raise ValueError(str(error)) from error
        super().__init__(
            name=run_name,
            project=project,
            entity=entity,
            group=group,
            job_type=job_type,
            tags=list(tags),
            save_dir=os.path.abspath(save_dir),  # the W&B service may be another process's, which has its own folder
            # Chosen before training, so that it can be stored beside the checkpoints. A sweep agent's id overrides it.
            id=(run_id if self.mode == "online" else None) or secrets.token_hex(4),
            mode=self.mode,  # `offline=True` would set WANDB_MODE for the whole process
            settings=settings,
        )
        self._wandb_init.pop("anonymous", None)  # Lightning passes this argument, which W&B is removing
        Path(save_dir).mkdir(parents=True, exist_ok=True)  # W&B silently uses a temporary folder if it is missing

    def define_summaries(self, summaries: Mapping[str, Literal["min", "max", "last"]]) -> None:
        """Define the summary of each metric, by exact name: W&B ignores globs under Lightning."""
        for name, kind in summaries.items():
            self.experiment.define_metric(name, summary=kind, step_metric="trainer/global_step", step_sync=True)

    def log_predictions(self, module: LightningModule) -> int:
        """Log pictures and a table of predictions of a trained module, as `val/<name>` and `val/predictions`.

        Args:
            module: May have a method `pictures()` that returns uint8 arrays (height, width, channels) by name, and a
                method `predictions()` that returns the names of columns and a list of rows; a cell is a string, a
                number or a uint8 image.

        Returns:
            The number of rows logged.
        """
        for name, pixels in getattr(module, "pictures", dict)().items():
            self.log_image(f"val/{name}", [pixels])
        columns, rows = getattr(module, "predictions", lambda: ([], []))()
        if columns:
            cells = [[wandb.Image(cell) if isinstance(cell, np.ndarray) else cell for cell in row] for row in rows]
            self.log_table("val/predictions", columns=columns, data=cells)
        return len(rows)

    @property
    def run_folder(self) -> Path:
        """The folder of this run, as `wandb sync` and `wandb leet inspect` take it."""
        return Path(self.experiment.dir).parent

    def describe(self, show_path: Callable[[Path], str] = str) -> str:
        """One line: the address of the run, or the command that uploads it, quoted for the shell.

        Args:
            show_path: Formats the folder of the run.
        """
        if self.mode == "online":
            return f"W&B run at {self.experiment.url}"
        if self.mode == "disabled":
            return "W&B is disabled"
        command = ["wandb", "sync", show_path(self.run_folder)]
        line = subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)
        return f"W&B is offline (no WANDB_API_KEY); upload with: {line}"

    def finish(self, exit_code: int) -> None:
        """Close the run. An unclosed run would take the logs of the next job of a sweep, and hide a failure."""
        if self._experiment is not None:
            self._experiment.finish(exit_code=exit_code)
            self._experiment = None


def choose_mode(mode: str | None) -> Mode:
    """`mode` if given, else `WANDB_MODE`, else online if there is a key and offline if there is none."""
    wanted = mode or os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    for known in MODES:
        if wanted == known:
            return known
    raise ValueError(f"mode must be one of {', '.join(MODES)}, got {wanted!r}")
