"""examples/own_project from a folder of its own: the command line, a command of its own, and a checkpoint."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.processes import run_python

TRAIN = ("-m", "lion_lightning", "--config-dir", "conf")
SHORT = ("logger=none", "trainer.max_steps=60", "trainer.val_check_interval=30")


@pytest.fixture
def project(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root / "examples" / "own_project", tmp_path / "project"))


def environment_of(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(root), "LION_LIGHTNING_TRUST": ""}


def call(project: Path, root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return run_python(command, project, environment_of(root))


@pytest.mark.parametrize("optim", [pytest.param("lion", marks=pytest.mark.slow), "sign_momentum"])
def test_the_recipe_trains_and_is_validated(project: Path, root: Path, optim: str) -> None:
    answer = call(project, root, *TRAIN, "trust=[sines]", "recipe=sines", f"optim={optim}", "run_dir=run", *SHORT)
    assert answer.returncode == 0, answer.stderr
    assert f"conf/tuned/sines_{optim}.yaml" in answer.stdout
    first, last = (float(error) for error in re.findall(r"val/error (\d+\.\d+)\n", answer.stdout))
    assert last < first < 5.5  # the mean of the frequencies, which an error of zero output has
    control = next(line for line in answer.stdout.splitlines() if line.startswith("Next, the control: "))
    assert "trust=[sines]" in control
    again = call(project, root, "-m", "lion_lightning", "trust=[sines]", "mode=eval", "ckpt=run")
    assert f"{last:.3f}"[:-1] in again.stdout, again.stderr


def test_without_trust_nothing_of_the_project_is_imported(project: Path, root: Path) -> None:
    (project / "sines" / "__init__.py").write_text("open('imported', 'w')\n")
    answer = call(project, root, *TRAIN, "recipe=sines", *SHORT)
    assert answer.returncode == 2
    assert "trust=[sines]" in answer.stderr
    assert not (project / "imported").exists()


def test_a_command_of_its_own_extends_the_configuration(project: Path, root: Path) -> None:
    answer = call(project, root, "own.py", "optim=adamw", "run_dir=run", *SHORT)
    assert answer.returncode == 0, answer.stderr
    assert "sines-adamw-s1 is done" in answer.stdout
    assert "Next, the control: python own.py logger=none" in answer.stdout
