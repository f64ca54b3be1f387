"""The compiled form of cpu.c: built when the package was installed, or here and now into the user's cache.

The cache is `$XDG_CACHE_HOME/lion_lightning` (by default `~/.cache/lion_lightning`); a file in it is named after a hash
of source, compiler and flags, and appears by an atomic rename, so that processes may build it at the same time.
"""

import ctypes
import functools
import hashlib
import importlib.machinery
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu.c")
INCLUDED = SOURCE.with_name("storage.c"), SOURCE.with_name("measures.c")
FLAGS = ("-O3", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd")
COMPILE_TIMEOUT_SECONDS = 120
STALE_SECONDS = 60


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library, or None where it can neither be found nor built; that is said once, through logging."""
    problems = []
    for find in (installed, cached):
        try:
            return declared(ctypes.CDLL(str(find())))
        except (OSError, subprocess.SubprocessError, AttributeError) as error:
            problems.append(f"{find.__name__}: {error}")
    log.warning("Lion's CPU engine is not available, the slower eager engine serves instead (%s)", "; ".join(problems))
    return None


def declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declares the functions of cpu.c and measures.c; an AttributeError where one is missing."""
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.lion_step.argtypes = (pointer, number, number, pointer, pointer)
    library.lion_step.restype = None
    library.lion_task_bytes.argtypes = ()
    library.lion_task_bytes.restype = number
    library.lion_square_sum.argtypes = (pointer, pointer, number)
    library.lion_square_sum.restype = ctypes.c_double
    library.lion_measure.argtypes = (pointer, number, pointer, pointer)
    library.lion_measure.restype = None
    library.lion_survey.argtypes = (pointer, number, pointer, number, pointer, pointer)
    library.lion_survey.restype = number
    return library


def installed() -> Path:
    """The extension module beside this file; a FileNotFoundError where there is none or the source is newer."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = SOURCE.with_name("_cpu" + suffix)
        # An editable installation keeps its extension when the source is edited. A wheel writes both within seconds.
        newest = max(source.stat().st_mtime for source in (SOURCE, *INCLUDED))
        if path.exists() and path.stat().st_mtime > newest - STALE_SECONDS:
            return path
    raise FileNotFoundError("not built with the package")


def cached() -> Path:
    """The library in the user's cache, compiled if need be."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("no C compiler (cc, gcc, clang or $CC)")
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=COMPILE_TIMEOUT_SECONDS, check=True)
    sources = (file.read_bytes() for file in (SOURCE, *INCLUDED))
    parts = (*sources, version.stdout, " ".join(FLAGS).encode(), platform.machine().encode())
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    path = folder() / f"cpu-{digest}.so"
    if not path.exists():
        build(compiler, path)
    return path


def folder() -> Path:
    """The user's cache folder for this project; made if it is missing."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    path = Path(base) / "lion_lightning"
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def build(compiler: str, path: Path) -> None:
    """Compiles cpu.c to `path`, first under another name."""
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(descriptor)
    try:
        command = [compiler, *FLAGS, "-o", unfinished, str(SOURCE), "-lm"]
        subprocess.run(command, capture_output=True, timeout=COMPILE_TIMEOUT_SECONDS, check=True)
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)
