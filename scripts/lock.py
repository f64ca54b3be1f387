"""Writes requirements.lock and checks that it, and the ranges it comes from, resolve everywhere.

`make lock` runs `write`: one universal lock for every Python and platform below, resolved by uv from pyproject.toml.
CUDA packages are left out, as torch itself pins the ones it needs. `make check-lock` runs `check`: it resolves the lock
and the ranges, with every extra, for each Python and platform, at the highest and at the lowest allowed versions,
against PyPI alone and without installing anything, and prints a table. Only wheels count, apart from SOURCE_ONLY.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
PLATFORMS = {
    "Linux x86-64": "x86_64-manylinux_2_28",
    "Linux aarch64": "aarch64-manylinux_2_28",
    "macOS 14 arm64": "aarch64-apple-darwin",
    "Windows": "x86_64-pc-windows-msvc",
}
SOURCE_ONLY = ("antlr4-python3-runtime", "deepspeed")  # published as source alone
LEFT_TO_TORCH = re.compile(r"^(nvidia-|cuda-)")
HEADER = "# Written by `make lock`, not by hand: every supported Python and platform, resolved from pyproject.toml.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("write", "check"))
    if parser.parse_args().command == "write":
        write()
    else:
        sys.exit(check())


def write() -> None:
    """Resolves pyproject.toml with the extra `dev` into requirements.lock."""
    resolved = _resolve(
        "pyproject.toml",
        "--universal",
        "--python-version",
        PYTHONS[0],
        "--extra",
        "dev",
        "--no-annotate",
        "--no-header",
    )
    if resolved.returncode:
        sys.exit(resolved.stderr)
    pins = [line for line in resolved.stdout.splitlines(keepends=True) if not LEFT_TO_TORCH.match(line)]
    LOCK.write_text(HEADER + "".join(pins))
    print(f"{LOCK.name}: {len(pins)} pins")


def check() -> int:
    """Prints a row for each thing resolved and a column for each platform; returns how many cells failed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {
        "without extras": [],
        "all extras but bench": [
            word for name in project["optional-dependencies"] if name != "bench" for word in ("--extra", name)
        ],
        "bench": ["--extra", "bench"],
    }
    rows: list[tuple[str, list[str]]] = [("requirements.lock", ["requirements.lock"])]
    for bound, resolution in (("highest", "highest"), ("lowest", "lowest-direct")):
        for label, extras in groups.items():
            rows.append((f"{label}, {bound}", ["pyproject.toml", "--no-config", "--resolution", resolution, *extras]))
    # Fills the cache of uv: after this most cells are resolved without asking the index again.
    _resolve("pyproject.toml", "--no-config", "--universal", "--python-version", PYTHONS[0], "--all-extras")
    print("Resolved for Python", ", ".join(PYTHONS), flush=True)
    print(f"{'':30}" + "".join(f"{name:>15}" for name in PLATFORMS), flush=True)
    failures = []
    for label, options in rows:
        cells = [(platform, python) for platform in PLATFORMS for python in PYTHONS]
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda cell: _check_cell(options, *cell), cells))  # noqa: B023, the pool ends here
        text = ""
        for platform in PLATFORMS:
            failed = [p for (where, p), error in zip(cells, results, strict=True) if where == platform and error]
            text += f"{'not ' + ' '.join(failed) if failed else 'all':>15}"
        print(f"{label:30}{text}", flush=True)
        failures += [(label, *cell, error) for cell, error in zip(cells, results, strict=True) if error]
    for label, platform, python, error in failures:
        print(f"\n{label} on {platform} with Python {python}:\n{error}")
    return len(failures)


def _check_cell(options: list[str], platform: str, python: str) -> str:
    """Resolves from the cache of uv, else online, and once more where the index did not answer; returns the error."""
    wheels = ["--only-binary", ":all:", *(word for name in SOURCE_ONLY for word in ("--no-binary", name))]
    command = [*options, "--python-platform", PLATFORMS[platform], "--python-version", python, *wheels]
    for attempt in (["--offline"], [], []):
        resolved = _resolve(*command, *attempt)
        if not resolved.returncode:
            return ""
    return resolved.stderr.strip()


def _resolve(*options: str) -> subprocess.CompletedProcess[str]:
    """`uv pip compile` in the project, without local wheels and without an index of this machine."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("UV_", "PIP_")) or name == "UV_CACHE_DIR"
    }
    environment["MACOSX_DEPLOYMENT_TARGET"] = "14.0"  # what the macOS wheels of torch ask for
    with tempfile.TemporaryDirectory() as empty:
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", *options, "--find-links", empty]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


if __name__ == "__main__":
    main()
