"""The logger's artifacts and sweeps, offline, read back with W&B's reader."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
import yaml

from lion_lightning.tracking.runs import find_runs, read_run
from lion_lightning.tracking.wandb import RunLogger, dataset_artifact

ROOT = Path(__file__).parents[2]


def records(folder: Path, kind: str) -> list[dict]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(find_runs(folder)[0])]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [record[kind] for record in map(json.loads, lines) if record["type"] == kind]


def log(folder: Path, code: int = 0, **options) -> None:
    logger = RunLogger(project="p", run_name="r-lion-s1", group="g", save_dir=str(folder), mode="offline", **options)
    logger.log_hyperparams({"data": {"name": "digits", "path": None}, "seed": 1})
    (folder / "export").mkdir()
    (folder / "export" / "config.json").write_text("{}")
    logger.finish(code)


def test_model_and_data_are_artifacts_where_asked_for(tmp_path):
    log(tmp_path, artifacts=True)
    logged = {(one["type"], one["name"], one.get("user_created", False)) for one in records(tmp_path, "artifact")}
    assert {kind[:2] for kind in logged} == {("dataset", "digits"), ("model", "r-lion-s1")}


def test_no_artifact_by_default_and_no_model_of_a_run_that_failed(tmp_path):
    log(tmp_path / "default")
    assert records(tmp_path / "default", "artifact") == []
    log(tmp_path / "failed", code=1, artifacts=True)
    assert [one["type"] for one in records(tmp_path / "failed", "artifact")] == ["dataset"]


def test_files_of_the_user_are_referenced_and_not_copied(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("words")
    artifact = dataset_artifact({"name": "text_files", "path": str(text)})
    assert artifact.type == "dataset"
    references = [entry.ref for entry in artifact.manifest.entries.values() if entry.ref]
    assert references == [text.as_uri()]
    assert "settings.json" in artifact.manifest.entries


AGENTS_RUN = """
import sys
from lion_lightning.tracking.wandb import RunLogger
logger = RunLogger(project="p", run_name="r", group="g", save_dir=sys.argv[1], mode="offline")
logger.log_metrics({"x": 1.0}, step=0)
logger.finish(0)
"""


def test_in_a_sweep_the_agents_run_is_taken(tmp_path):
    agent = {"WANDB_SWEEP_ID": "sweep123", "WANDB_RUN_ID": "chosen01"}
    command = [sys.executable, "-c", AGENTS_RUN, str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **agent}, check=True, capture_output=True)
    assert read_run(tmp_path).id == "chosen01"


SWEEP = yaml.safe_load((ROOT / "scripts" / "sweep.yaml").read_text())


@pytest.mark.parametrize("pick", [0, -1])
def test_the_sweep_file_makes_overrides_that_hydra_takes(pick):
    arguments = [
        f"{name}={entry['value'] if 'value' in entry else entry['values'][pick]}"
        for name, entry in SWEEP["parameters"].items()
    ]  # what W&B's agent makes of ${args_no_hyphens}
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = hydra.compose("train", [*arguments, "run_dir=x"])
    assert cfg.optim.name == SWEEP["parameters"]["optim"]["values"][pick]
    assert cfg.recipe.monitor == SWEEP["metric"]["name"]
    assert {"min": "minimize", "max": "maximize"}[cfg.recipe.mode] == SWEEP["metric"]["goal"]
    assert (ROOT / SWEEP["program"]).is_file()
    assert SWEEP["command"][-1] == "${args_no_hyphens}"


def test_the_environment_stays_as_it_was():
    assert not [name for name in os.environ if name.startswith("WANDB_RUN") or name.startswith("WANDB_SWEEP")]
