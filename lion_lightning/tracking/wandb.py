"""Weights & Biases with manners: one run per job, offline without a key, closed with the exit code it deserves."""

import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

Mode = Literal["online", "offline", "disabled"]
MAX_REFERENCED_FILES = 100_000
MODES: tuple[Mode, ...] = ("online", "offline", "disabled")


class RunLogger(WandbLogger):
    """Lightning's WandbLogger for exactly one run.

    Args:
        project, entity: where the run belongs.
        run_name: what it is called.
        group: what it may be compared with.
        job_type, tags: to find it by.
        mode: None: `WANDB_MODE` if that is set, online if `WANDB_API_KEY` is, else offline.
        save_dir: the folder in which W&B makes its own `wandb` folder.
        artifacts: keep the exported model and the description of the data as W&B artifacts of the run, the data as an
            input and the model as an output.
        run_id: of a run to go on with. Only online: what two offline folders say of one run, the later upload
            overwrites, so there a new run of the group begins.

    Raises:
        ValueError: an unknown mode.
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
        artifacts: bool = False,
        run_id: str | None = None,
    ) -> None:
        self.mode = choose_mode(mode)
        self.artifacts = artifacts
        # Known before training starts; under a sweep's agent W&B takes the agent's.
        identity = (run_id if self.mode == "online" else None) or secrets.token_hex(4)
        # Not `offline=True`: that sets WANDB_MODE for the whole process and every later run in it.
        super().__init__(
            name=run_name,
            project=project,
            entity=entity,
            group=group,
            job_type=job_type,
            tags=list(tags),
            save_dir=save_dir,
            id=identity,
            mode=self.mode,
            settings=wandb.Settings(silent=True),
        )
        self._wandb_init.pop("anonymous", None)  # Lightning passes it on; W&B is removing it
        Path(save_dir).mkdir(parents=True, exist_ok=True)  # W&B falls back to a temporary folder without a word

    def define_summaries(self, summaries: Mapping[str, Literal["min", "max", "last"]]) -> None:
        """Say which value of a metric stands for the run, by its exact name: a glob is ignored under Lightning."""
        for name, kind in summaries.items():
            self.experiment.define_metric(name, summary=kind, step_metric="trainer/global_step", step_sync=True)

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Log the configuration, and what it says of the data as an artifact if that was asked for."""
        super().log_hyperparams(params)
        if self.artifacts and isinstance(params, Mapping) and isinstance(params.get("data"), Mapping):
            # Only a server can say that a run used something; offline the description is kept with the run.
            note = self.experiment.use_artifact if self.mode == "online" else self.experiment.log_artifact
            note(dataset_artifact(params["data"]))

    @property
    def run_folder(self) -> Path:
        """The folder of this run, which `wandb sync` and `wandb leet inspect` take."""
        return Path(self.experiment.dir).parent

    def describe(self, show_path: Callable[[Path], str] = str) -> str:
        """One line: where the run is, and how it gets online if it is not."""
        if self.mode == "online":
            return f"W&B run at {self.experiment.url}"
        if self.mode == "disabled":
            return "W&B is disabled"
        return f"W&B is offline (no WANDB_API_KEY); upload with: wandb sync {show_path(self.run_folder)}"

    def finish(self, exit_code: int) -> None:
        """Close the run. Without this the next job of a sweep would log into it, and a crash would look finished."""
        if self._experiment is not None:
            export = Path(self.save_dir or ".") / "export"
            if self.artifacts and exit_code == 0 and export.is_dir():
                self._experiment.log_artifact(model_artifact(export, str(self._name)))
            self._experiment.finish(exit_code=exit_code)
            self._experiment = None


def model_artifact(export: Path, name: str) -> wandb.Artifact:
    """The exported folder, as it opens with `transformers`."""
    artifact = wandb.Artifact(name, type="model")
    artifact.add_dir(str(export))
    return artifact


def dataset_artifact(data: Mapping[str, Any]) -> wandb.Artifact:
    """What the data are: their settings, and a checksummed reference to files that the user named, not a copy."""
    artifact = wandb.Artifact(str(data.get("name", "data")), type="dataset", metadata=dict(data))
    path = data.get("path")
    if path and Path(path).exists():
        artifact.add_reference(Path(path).resolve().as_uri(), max_objects=MAX_REFERENCED_FILES)
    with artifact.new_file("settings.json") as file:
        json.dump(dict(data), file, indent=2, default=str)
    return artifact


def choose_mode(mode: str | None) -> Mode:
    """The mode that was asked for, else `WANDB_MODE`, else online if there is a key and offline if there is none."""
    wanted = mode or os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    for known in MODES:
        if wanted == known:
            return known
    raise ValueError(f"mode must be one of {', '.join(MODES)}, got {wanted!r}")
