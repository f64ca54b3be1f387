"""Puts the compiled C engine into the wheel, which then serves every Python of its platform; see also pyproject.toml.

Without a C compiler the wheel has no engine: it is built on first use, or the eager engine serves.
"""

import os
import runpy
import subprocess
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

KERNELS = Path("lion_lightning/optim/kernels")
compile_cpu = runpy.run_path(str(Path(__file__).parent / KERNELS / "compile_cpu.py"))


class BuildLibrary(build_ext):
    """Compiles the library as `cpu.py` does on first use: no extension module, hence no ABI of a Python version."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")[:-1], compile_cpu["LIBRARY"])

    def build_extension(self, ext: Any) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            compile_cpu["compile_library"](target)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"lion_lightning is built without its C engine: {error}", flush=True)


class PlatformWheel(bdist_wheel):
    """`py3-none-<platform>` with the engine, `py3-none-any` without."""

    def get_tag(self) -> tuple[str, str, str]:
        has_engine = any(Path(self.bdist_dir).rglob(compile_cpu["LIBRARY"]))
        return "py3", "none", super().get_tag()[2] if has_engine else "any"


setup(
    ext_modules=[Extension("lion_lightning.optim.kernels._cpu", [str(KERNELS / "cpu.c")], optional=True)],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
