"""The wheel: what it installs, its tag, and its commands in a folder that has nothing of the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

COMMANDS = {"train", "compare", "tune", "convert", "replay-guard", "check-data"}


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy without what the tools left."""
    source, out = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("dist")
    left = (".*", "build", "dist", "outputs", "multirun", "*.egg-info", "__pycache__", "*.so", "docs", "tests")
    shutil.copytree(root, source, ignore=shutil.ignore_patterns(*left))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-2000:]
    assert "is absent from the `packages` configuration" not in answer.stdout + answer.stderr
    (built,) = out.glob("*.whl")
    return built


def test_it_installs_one_package_with_the_whole_configuration(root: Path, wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"lion_lightning", "lion_lightning-0.1.0.dist-info"}
    for folder in ("conf", "recipes"):
        ours = [file for file in (root / folder).rglob("*") if file.suffix in (".yaml", ".py", ".npz")]
        assert ours
        assert not [file for file in ours if f"lion_lightning/{file.relative_to(root).as_posix()}" not in names]
    library = [file for file in (root / "lion_lightning").rglob("*") if file.suffix in (".py", ".c", ".html", ".typed")]
    assert not [file for file in library if file.relative_to(root).as_posix() not in names]


def test_one_wheel_serves_every_python_of_a_platform(wheel: Path) -> None:
    python, abi, platform = wheel.stem.split("-")[2:]
    assert (python, abi) == ("py3", "none")
    has_engine = any("kernels/_cpu." in name for name in zipfile.ZipFile(wheel).namelist())
    assert has_engine == (platform != "any")


@pytest.mark.slow
def test_it_works_far_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Unpacked where Python looks first, in a folder with a package `recipes` of somebody else."""
    site, work = tmp_path / "site", tmp_path / "work"
    zipfile.ZipFile(wheel).extractall(site)
    (work / "recipes").mkdir(parents=True)
    (work / "recipes" / "__init__.py").write_text("raise RuntimeError('not this one')\n")
    environment = {**os.environ, "PYTHONPATH": str(site), "WANDB_MODE": "offline"}
    entry_points = (site / "lion_lightning-0.1.0.dist-info" / "entry_points.txt").read_text()
    found = dict(line.split(" = ") for line in entry_points.splitlines() if " = " in line)
    assert set(found) == {f"lion-{name}" for name in COMMANDS}

    def call(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        module, function = found[name].split(":")
        code = f"import sys; from {module} import {function}; sys.argv[0] = {name!r}; sys.exit({function}())"
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(
            command, cwd=work, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    for name in found:
        answer = call(name, "--help")
        assert answer.returncode == 0, answer.stderr
        assert name in answer.stdout
        assert "scripts/" not in answer.stdout
        assert "train.py" not in answer.stdout
    short = ("recipe=image_classification", "trainer.max_steps=4", "trainer.val_check_interval=2", "run_dir=run")
    answer = call("lion-train", *short)
    assert answer.returncode == 0, answer.stderr
    assert "Next, the control: lion-train recipe=image_classification" in answer.stdout
    assert call("lion-compare", "run").returncode == 0
    assert call("lion-replay-guard", "run").returncode == 0
    assert call("lion-train", "mode=eval", "ckpt=run").returncode == 0
