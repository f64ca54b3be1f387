"""What the compiler makes of the Triton kernel, for GPUs that need not be there (scripts/gpu/compile_kernels.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")

pytest.importorskip("triton")


def compiled(code: str, cache: Path) -> str:
    """Runs code elsewhere, as TRITON_INTERPRET must not be set when triton is imported; returns its output."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(cache)}
    code = f"from scripts.gpu.compile_kernels import *\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


CHECKED = """
for architecture in {architectures}:
    for variant in {variants}:
        found = machine(architecture, variant)
        wrong = list(faults(variant, found))
        print(architecture, variant, found, wrong)
        assert not wrong
"""


NARROW = """
from dataclasses import replace
narrow = machine("sm_90", replace(MODES[0], aligned=False))
assert narrow.loaded == narrow.stored == 0, narrow
print(*faults(MODES[0], narrow), sep="\\n")
print(*faults(MODES[0], Machine(255, 8, 0.1, 96, 64, 1)), sep="\\n")
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """By one process: what it says of two kernels, and of one that was not promised that its tensors are aligned."""
    two = '[Variant("bfloat16", "bfloat16", "bfloat16"), Variant("float32", "bfloat16", "int8", cautious=True)]'
    code = f"{CHECKED.format(architectures=['sm_80'], variants=two)}\nprint('---')\n{NARROW}"
    return compiled(code, tmp_path_factory.mktemp("cache")).split("---\n")


def test_kernels_round_spill_nothing_and_move_16_bytes_at_a_time(printed: list[str]) -> None:
    assert printed[0].count("spilled=0") == 2


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_storage_mode_compiles_well(architecture: str, tmp_path: Path) -> None:
    output = compiled(CHECKED.format(architectures=[architecture], variants="MODES"), tmp_path)
    assert output.count("spilled=0") == 10


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_storage_mode_compiles_well_when_cautious_or_not_aligned(architecture: str, tmp_path: Path) -> None:
    variants = "[replace(mode, cautious=True, aligned=aligned) for mode in MODES for aligned in (True, False)]"
    code = "from dataclasses import replace" + CHECKED.format(architectures=[architecture], variants=variants)
    assert compiled(code, tmp_path).count("spilled=0") == 20


def test_faults_are_found(printed: list[str]) -> None:
    """Without the promise of alignment the compiler moves single elements, which the check must notice."""
    assert printed[1].splitlines() == [
        "loads 0 and stores 0 bytes of 96 and 64 by 16 at a time",
        "8 spilled",
        "inexact arithmetic",
    ]
