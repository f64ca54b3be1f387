"""`make environment`: a complete environment is left as it is, a broken one is made again, a foreign one is refused."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import make_environment
from scripts.make_environment import STAMP, prepare

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def noting(ran: list[list[str]]) -> Callable[..., None]:
    """Notes a command instead of running it; `-m venv` makes a real environment."""

    def run(*command: object) -> None:
        words = [str(word) for word in command]
        ran.append(words)
        if words[1:3] == ["-m", "venv"]:
            subprocess.run([*words[:3], "--without-pip", words[3]], check=True)

    return run


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    """The commands that would install something, instead of their execution."""
    ran: list[list[str]] = []
    monkeypatch.setattr(make_environment, "_run", noting(ran))
    return ran


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A complete environment with one installed package."""
    folder = tmp_path_factory.mktemp("made") / ".venv"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_environment, "_run", noting([]))
        prepare(folder, None, None)
    site = next(folder.rglob("site-packages"))
    (site / "thing.py").write_text("")
    info = site / "thing-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
    (info / "RECORD").write_text("thing.py,,\nthing-1.0.dist-info/METADATA,,\n__pycache__/thing.cpython-311.pyc,,\n")
    return folder


@pytest.fixture
def venv(tmp_path, made, commands) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / ".venv", symlinks=True))


def test_first_start_installs_the_lock_and_the_project(tmp_path, commands):
    prepare(tmp_path / ".venv", None, None)
    assert [words[1:3] for words in commands] == [["-m", "venv"], ["-m", "pip"], ["-m", "uv"], ["-m", "uv"]]
    assert commands[2][-1].endswith("requirements.lock")
    assert commands[1][-1] in (Path(commands[2][-1])).read_text().splitlines()  # the pinned uv


def test_second_start_runs_nothing(venv, commands):
    prepare(venv, None, None)
    assert commands == []


def test_changed_lock_is_installed_into_the_same_environment(venv, commands, monkeypatch):
    monkeypatch.setattr(make_environment, "_fingerprint", lambda: "another")
    prepare(venv, None, None)
    assert [words[1:3] for words in commands] == [["-m", "uv"], ["-m", "uv"]]
    assert (venv / "pyvenv.cfg").exists()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda venv: next(venv.rglob("thing.py")).unlink(), "files of thing are missing"),
        (lambda venv: (venv / STAMP).write_text(json.dumps({"complete": False})), "its installation was interrupted"),
        (lambda venv: (venv / STAMP).write_text('{"compl'), "its installation was interrupted"),
        (lambda venv: shutil.rmtree(venv / "bin"), "its Python does not start"),
    ],
    ids=["missing file", "interrupted", "torn stamp", "no interpreter"],
)
def test_broken_environment_is_made_again(venv, commands, capsys, damage, reason):
    damage(venv)
    prepare(venv, None, None)
    assert reason in capsys.readouterr().out
    assert commands[0][1:3] == ["-m", "venv"]
    commands.clear()
    prepare(venv, None, None)
    assert commands == []


def test_another_python_is_taken_only_where_it_is_asked_for(venv, commands, monkeypatch, capsys):
    monkeypatch.setattr(make_environment, "_version", lambda python: "3.99")
    prepare(venv, None, None)
    assert commands == []
    prepare(venv, sys.executable, None)
    assert f"it has Python {PYTHON}" in capsys.readouterr().out


def test_build_of_torch_is_remembered_and_changed_on_request(venv, commands):
    prepare(venv, None, "cpu")
    install = commands[0]
    assert install[install.index("--torch-backend") + 1] == "cpu"
    assert install[install.index("--reinstall-package") + 1] == "torch"
    commands.clear()
    prepare(venv, None, None)
    assert commands == []


def test_interrupted_installation_is_noticed(tmp_path, monkeypatch, commands, capsys):
    def fail(*command: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(make_environment, "_run", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / ".venv", None, None)
    assert json.loads((tmp_path / ".venv" / STAMP).read_text()) == {"complete": False}


def test_foreign_environment_is_refused_and_left_alone(tmp_path, commands):
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "mine").write_text("kept")
    with pytest.raises(SystemExit, match=r"was not made by make_environment\.py"):
        prepare(tmp_path / ".venv", None, None)
    assert (tmp_path / ".venv" / "mine").read_text() == "kept"
    assert commands == []


def test_unknown_interpreter_is_named(venv):
    with pytest.raises(SystemExit, match=r"PYTHON=python9\.99: no such interpreter"):
        prepare(venv, "python9.99", None)
