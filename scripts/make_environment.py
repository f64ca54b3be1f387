"""Makes `.venv` from requirements.lock, or confirms within a second that it is complete.

`make train` and `make test` call this first; without make: `python scripts/make_environment.py`. Only the standard
library is needed. The packages are installed by uv, which is itself installed into `.venv`. A second start installs
nothing and needs no network. An environment that is incomplete or broken is made again; one that this script did not
make is left alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAMP = ".lion_lightning.json"

# Runs inside the environment: its Python version, then every file that an installed package lists and that is missing.
INSPECTION = """
import importlib.metadata, os, sys
print("%d.%d" % sys.version_info[:2])
for distribution in importlib.metadata.distributions():
    root = str(distribution.locate_file(""))
    files = [line.rsplit(",", 2)[0] for line in (distribution.read_text("RECORD") or "").splitlines()]
    if not all(file.endswith(".pyc") or os.path.exists(os.path.join(root, file.strip('"'))) for file in files):
        print(distribution.metadata["Name"])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", default=str(ROOT / ".venv"), type=Path, help="the folder of the environment")
    parser.add_argument(
        "--python", help="interpreter to use, for example python3.13; by default the one that runs this"
    )
    parser.add_argument(
        "--torch", help="build of torch as uv names it: cpu, cu130, auto, ...; by default what PyPI serves"
    )
    options = parser.parse_args()
    try:
        prepare(options.venv, options.python, options.torch)
    except subprocess.CalledProcessError as failed:
        sys.exit(f"error: `{' '.join(map(str, failed.cmd))}` ended with exit code {failed.returncode}")


def prepare(venv: Path, python: str | None, torch_build: str | None) -> None:
    """Brings `venv` to the state that requirements.lock and pyproject.toml describe."""
    stamp = _read_stamp(venv)
    if venv.exists() and stamp is None:
        sys.exit(
            f"error: {venv} exists and was not made by make_environment.py; remove it, or name another folder "
            "(make: VENV=...)"
        )
    problem = _problem(venv, stamp, python)
    if problem:
        print(f"{venv} is made again: {problem}", flush=True)
        shutil.rmtree(venv)
        stamp = None
    wanted = {"complete": True, "inputs": _fingerprint(), "torch": torch_build or (stamp or {}).get("torch")}
    if stamp == wanted:
        return
    if not venv.exists():
        venv.mkdir(parents=True)
        _write_stamp(venv, {"complete": False})
        _run(python or sys.executable, "-m", "venv", venv)
        uv = next(line for line in (ROOT / "requirements.lock").read_text().splitlines() if line.startswith("uv=="))
        _run(_executable(venv), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", uv)
    _write_stamp(venv, {**wanted, "complete": False})
    install = [_executable(venv), "-m", "uv", "pip", "install", "--python", _executable(venv)]
    build = ["--torch-backend", wanted["torch"]] if wanted["torch"] else []
    replaced = ["--reinstall-package", "torch"] if stamp and stamp.get("torch") != wanted["torch"] else []
    _run(*install, *build, *replaced, "--requirement", ROOT / "requirements.lock")
    _run(*install, "--no-deps", "--no-build-isolation", "--editable", ROOT)
    _write_stamp(venv, wanted)


def _problem(venv: Path, stamp: dict | None, python: str | None) -> str | None:
    """Why the environment has to be made again, or None."""
    if stamp is None:
        return None
    if not stamp.get("complete"):
        return "its installation was interrupted"
    try:
        found = subprocess.run([_executable(venv), "-c", INSPECTION], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "its Python does not start"
    version, *incomplete = found.stdout.split()
    if incomplete:
        return f"files of {', '.join(incomplete[:5])} are missing"
    if python and (asked := _version(python)) != version:
        return f"it has Python {version}, and {python} is Python {asked}"
    return None


def _version(python: str) -> str:
    command = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        sys.exit(f"error: PYTHON={python}: no such interpreter")


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for name in ("requirements.lock", "pyproject.toml", "setup.py"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def _executable(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _read_stamp(venv: Path) -> dict | None:
    try:
        return json.loads((venv / STAMP).read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {"complete": False}


def _write_stamp(venv: Path, stamp: dict) -> None:
    (venv / STAMP).write_text(json.dumps(stamp))


def _run(*command: object) -> None:
    """Runs a command; uv takes local wheels from where pip takes them."""
    links = os.environ.get("PIP_FIND_LINKS")
    environment = {**os.environ, **({"UV_FIND_LINKS": links} if links and "UV_FIND_LINKS" not in os.environ else {})}
    subprocess.run([str(part) for part in command], check=True, env=environment)


if __name__ == "__main__":
    main()
