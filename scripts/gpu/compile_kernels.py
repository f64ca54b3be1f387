"""What the compiler makes of the Triton kernel for GPUs that need not be there.

    python scripts/gpu/compile_kernels.py                # the storage modes, for sm_80, sm_90, sm_100 and gfx942
    python scripts/gpu/compile_kernels.py --all sm_90    # every combination of dtypes and options, 320 of them

Prints registers, spilled registers, occupancy and the width of loads and stores, from the machine code: that of ptxas,
which Triton's wheel contains, or of LLVM for AMD. Exits with 1 where a register is spilled or an aligned array of
elements of 2 bytes or more is moved by less than 16 bytes at a time (a thread has 8 elements, so int8 ones take 8).
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for the project's modules

from lion_lightning.optim.kernels.triton_kernels import lion_kernel

ARCHITECTURES = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
THREADS, ELEMENTS_PER_THREAD = 128, 8
ITEM_BYTES = {"int8": 1, "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
REMAINDER_BYTES = {32: 2, 24: 1, 16: 0}
CONSTANTS = ("PARAM", "GRAD", "MOMENTUM", "WEIGHT_BITS", "CAUTIOUS", "ALIGNED")
POINTERS = {"tensors": "*i64", "groups": "*i64", "tensor_of_tile": "*i32", "nonfinite": "*i64"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INEXACT_PTX = r"\bfma\.|(?:div|sqrt|rcp)\.(?:approx|full)|(?<!div\.rn)\.ftz"
"""Arithmetic that differs from the other engines'. Triton 3.5 divides by div.rn.ftz, which is rounded too."""


@dataclass(frozen=True)
class Variant:
    """The constants of a kernel, dtypes by name."""

    param: str
    grad: str
    momentum: str
    weight_bits: int = 32
    cautious: bool = False
    aligned: bool = True

    def __str__(self) -> str:
        bits = f"/{self.weight_bits}" if self.param == "bfloat16" else ""
        options = ", cautious" * self.cautious + ", not aligned" * (not self.aligned)
        return f"{self.param}{bits}, g {self.grad}, m {self.momentum}{options}"

    def wide_bytes(self) -> tuple[int, int]:
        """Bytes that a thread loads and stores in accesses of 16 bytes."""
        remainder = REMAINDER_BYTES[self.weight_bits] if self.param == "bfloat16" else 0
        written = [ITEM_BYTES[self.param], ITEM_BYTES[self.momentum], remainder]
        loaded, stored = (
            ELEMENTS_PER_THREAD * sum(size for size in sizes if size >= 2)
            for sizes in ([*written, ITEM_BYTES[self.grad]], written)
        )
        return loaded, stored


@dataclass(frozen=True)
class Machine:
    """What a variant is on an architecture.

    Attributes:
        registers: Vector registers of a thread.
        spilled: Those kept in memory, and its bytes; 0 if everything fits.
        occupancy: Share of a multiprocessor's threads for which there are registers.
        loaded: Bytes that a thread loads by 16 or more at a time.
        stored: Likewise.
        inexact: Instructions that round otherwise than the other engines.
    """

    registers: int
    spilled: int
    occupancy: float
    loaded: int
    stored: int
    inexact: int


WEIGHTS = [("float32", 32), ("float64", 32), ("bfloat16", 32), ("bfloat16", 24), ("bfloat16", 16)]
MODES = [
    Variant(param, param, momentum, bits)
    for param, bits in WEIGHTS
    for momentum in dict.fromkeys((param, "bfloat16", "int8") if param != "float64" else (param,))
]
"""How parameters and momentum are stored in scripts/bench/bench_peers.py, and float64."""
ALL = [
    Variant(param, grad, momentum, bits, cautious, aligned)
    for (param, bits), grad, momentum, cautious, aligned in itertools.product(
        WEIGHTS,
        ("bfloat16", "float16", "float32", "float64"),
        ("bfloat16", "float32", "float64", "int8"),
        (False, True),
        (True, False),
    )
]


def machine(architecture: str, variant: Variant) -> Machine:
    """Compiles a variant and reads its machine code."""
    target = ARCHITECTURES[architecture]
    types = [getattr(tl, name) for name in astuple(variant)[:3]]
    constants = dict(zip(CONSTANTS, [*types, *astuple(variant)[3:]], strict=True))
    source = ASTSource(
        lion_kernel,
        POINTERS | dict.fromkeys(CONSTANTS, "constexpr"),
        {(lion_kernel.arg_names.index(name),): value for name, value in constants.items()},
    )
    options = {"num_warps": THREADS // target.warp_size, "enable_fp_fusion": False}
    compiled: Any = triton.compile(source, target=target, options=options)
    return _amd(compiled.asm["amdgcn"]) if target.backend == "hip" else _nvidia(compiled.asm)


def _nvidia(assembly: dict[str, Any]) -> Machine:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(assembly["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / tool, *options, file.name], capture_output=True, text=True, check=True).stdout
            for tool, options in (("cuobjdump", ["-res-usage"]), ("nvdisasm", []))
        )
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    per_warp = -(-used["REG"] * 32 // 256) * 256  # registers are given out in units of 256
    blocks = min(65_536 // (per_warp * (THREADS // 32)), 16)  # an SM has 65,536 registers and room for 64 warps
    moved = _moved(code, r"\b(LD|ST)G\.E(?:\.\w+)*?\.(128|256)\b", {"128": 16, "256": 32})
    inexact = len(re.findall(INEXACT_PTX, assembly["ptx"]))
    return Machine(used["REG"], used["STACK"] + used["LOCAL"], blocks / 16, moved["LD"], moved["ST"], inexact)


def _amd(assembly: str) -> Machine:
    metadata = r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)"
    used = {name: int(number) for name, number in re.findall(metadata, assembly)}
    registers = used.pop("vgpr_count")  # scalar registers that do not fit go into lanes of these, not into memory
    waves = min(512 // (-(-registers // 8) * 8), 8)  # a SIMD has 512 registers a lane and room for 8 waves
    moved = _moved(assembly, r"\bbuffer_(load|store)_dword(x4)\b", {"x4": 16})
    return Machine(registers, sum(used.values()), waves / 8, moved["load"], moved["store"], 0)


def _moved(code: str, pattern: str, sizes: dict[str, int]) -> Counter[str]:
    """Bytes by load and store. Only whole tiles are moved by wide accesses."""
    moved: Counter[str] = Counter()
    for way, width in re.findall(pattern, code):
        moved[way] += sizes[width]
    return moved


def faults(variant: Variant, found: Machine) -> Iterator[str]:
    """What is wrong with a compiled variant."""
    if found.spilled:
        yield f"{found.spilled} spilled"
    if found.inexact:
        yield "inexact arithmetic"
    if variant.aligned and (found.loaded, found.stored) != variant.wide_bytes():
        yield "loads {} and stores {} bytes of {} and {} by 16 at a time".format(
            found.loaded, found.stored, *variant.wide_bytes()
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", default=list(ARCHITECTURES), help=", ".join(ARCHITECTURES))
    parser.add_argument("--all", action="store_true", help="every variant, not only the storage modes")
    options = parser.parse_args()
    if unknown := set(options.architectures) - set(ARCHITECTURES):
        parser.error(f"architecture {min(unknown)!r} is not allowed: use {', '.join(ARCHITECTURES)}")
    print(f"Triton {triton.__version__}; registers a thread (occupancy)\n")
    print(f"| kernel | {' | '.join(options.architectures)} | faults |")
    print("| --- |" + " ---: |" * len(options.architectures) + " --- |")
    failed = 0
    for variant in ALL if options.all else MODES:
        machines = {name: machine(name, variant) for name in options.architectures}
        wrong = [f"{name}: {fault}" for name, found in machines.items() for fault in faults(variant, found)]
        cells = [f"{found.registers} ({found.occupancy:.0%})" for found in machines.values()]
        print(f"| {variant} | {' | '.join(cells)} | {'; '.join(wrong) or 'none'} |", flush=True)
        failed += bool(wrong)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
