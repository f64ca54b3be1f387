"""Compiles cpu.c into a shared library: when a wheel is built (setup.py), or on first use (cpu.py).

The library is loaded with ctypes and knows nothing of Python, so one serves every version. Only the standard library
is imported here, as nothing else is there when a wheel is built.
"""

import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("cpu.c")
LIBRARY = "_cpu.dll" if os.name == "nt" else "_cpu.so"
"""The library's name in a wheel, beside its source."""
FLAGS = (
    "-O3",
    "-fPIC",
    "-shared",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
    "-pthread",
)
TIMEOUT_SECONDS = 120


def compiler() -> str:
    """The C compiler: $CC, cc, gcc or clang.

    MSVC is none: cpu.c uses attributes and vector clones of GCC and Clang.

    Raises:
        FileNotFoundError: there is none.
    """
    found = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if found is None:
        raise FileNotFoundError("no C compiler (cc, gcc, clang or $CC)")
    return found


def version() -> bytes:
    """What the compiler says of itself."""
    command = [compiler(), "--version"]
    return subprocess.run(command, capture_output=True, timeout=TIMEOUT_SECONDS, check=True).stdout


def compile_library(target: str | Path) -> None:
    """Compile cpu.c to `target`.

    Raises:
        FileNotFoundError: there is no compiler.
        subprocess.SubprocessError: it failed.
    """
    command = [compiler(), *FLAGS, "-o", str(target), str(SOURCE), "-lm"]
    subprocess.run(command, capture_output=True, timeout=TIMEOUT_SECONDS, check=True)
