"""Everything that is worth measuring on a GPU, in order of value, within a time budget: docs/benchmarks/gpu.md.

    python scripts/gpu_report.py --budget 600 --output outputs/gpu          # run it again to continue
    python scripts/gpu_report.py --parts tests large --output outputs/gpu
    python scripts/gpu_report.py --rehearsal --output outputs/rehearsal     # on a CPU, tiny, in Triton's interpreter
    python scripts/gpu_report.py --list-wheels --installed freeze.txt       # what to carry to a bare machine

Each part is a process of its own with a time limit. What it prints is in DIR/PART.log and .err as it comes, also if it
is stopped or fails; then report.md and parts.json are written anew and the next part begins. A part whose modules are
missing is skipped and named.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEAST_SECONDS = 10
"""A part is not begun with less than this left of the budget."""
CPU_FACTOR = 3
"""A part of a rehearsal may take so many times longer."""
RECIPE_MODULES = ("lightning", "hydra", "transformers", "torchmetrics", "rich", "filelock", "charset_normalizer")
MLM_MODULES = (*RECIPE_MODULES, "datasets", "PIL", "accelerate")  # the last for the Trainer of Hugging Face
IMAGE_MODULES = (*RECIPE_MODULES, "kornia", "datasets", "PIL")
DISTRIBUTIONS = {"hydra": "hydra-core", "charset_normalizer": "charset-normalizer", "PIL": "pillow"}
PEERS = ("lion-pytorch", "torch-optimi", "pytorch-optimizer", "timm", "flashoptim")
TARGET = {"extra": "", "python_version": "3.12", "python_full_version": "3.12.3", "sys_platform": "linux"}
"""The bare machine, to which wheels are carried."""
SOURCE_ONLY = ("antlr4-python3-runtime",)
CARRIED_NOT = r"torch|triton|nvidia-.*|cuda-.*|setuptools|wandb"
"""Comes with the machine's torch, or is not needed by any part."""


@dataclass(frozen=True)
class Part:
    """A process that measures.

    Attributes:
        title: for the report.
        command: after `python`; a leading word without .py or - is a program of its own.
        rehearsal: what takes the place of the command on a CPU; empty where only a GPU makes sense.
        seconds: most that it may take.
        modules: what it imports besides torch and triton.
        environment: variables of its own.
    """

    title: str
    command: str
    rehearsal: str
    seconds: int
    modules: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


PYTEST = "-m pytest -o addopts= --noconftest -q --tb=short -p no:cacheprovider "
MLM = "scripts/bench/bench_recipe.py optim=adamw model={model} logger=none trainer.precision={precision} "
MLM_REHEARSAL = MLM.format(model="bert_tiny", precision="32-true") + "data.batch_size=2 data.sequence_length=16"
STEPS = "scripts/gpu/steps.py --model {} --repeats {}"
STEPS_REHEARSAL = "scripts/gpu/steps.py --interpreter --model nano --repeats 1 --steps 1 --only "
SMALL_PART = "data.batch_size=8 trainer.max_steps=4 trainer.val_check_interval=2 trainer.log_every_n_steps=1"


def mlm(model: str, tokens: int, batch: int, compiled: bool) -> str:
    blocks = f"data.sequence_length={tokens} data.batch_size={batch} model.compile={str(compiled).lower()}"
    return MLM.format(model=model, precision="bf16-mixed") + blocks + " --rounds 1 --steps 20"


PARTS = {
    "machine": Part("The machine", "nvidia-smi", "-m platform", 20),
    "tests": Part(
        "Tests marked gpu",
        PYTEST + "-m gpu tests/optim/kernels/test_triton.py tests/guard/test_readback.py "
        "--deselect tests/optim/kernels/test_triton.py::test_every_case_passes_on_the_device",
        PYTEST + "tests/optim/kernels/test_triton.py -k objects",
        60,
        ("pytest",),
    ),
    "cases": Part(
        "Every mode against float64 and the eager engine",
        PYTEST + "tests/optim/kernels/triton_cases.py",
        PYTEST + "tests/optim/kernels/triton_cases.py -k one_launch",
        150,
        ("pytest",),
    ),
    "sanitizer": Part(
        "compute-sanitizer over short steps",
        "compute-sanitizer --error-exitcode 9 python scripts/gpu/short_step.py",
        "scripts/gpu/short_step.py",
        60,
        environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
    ),
    "large": Part("A step of BERT-large", STEPS.format("bert_large", 7), STEPS_REHEARSAL + "triton_bf16/32", 90),
    "base": Part("A step of BERT-base", STEPS.format("bert_base", 7), STEPS_REHEARSAL + "AdamW foreach", 60),
    "billion": Part("A step of 1.3 B", STEPS.format("decoder_1.3b", 3), STEPS_REHEARSAL + "AdamW", 60),
    "host": Part(
        "Host time of a training step",
        "scripts/gpu/host_time.py",
        "scripts/gpu/host_time.py --models digits --steps 2 --backend eager",
        60,
        ("transformers",),
    ),
    "guard": Part("The guard", "scripts/gpu/guard_checks.py", "scripts/gpu/guard_checks.py --model nano --steps 3", 30),
    "memory": Part(
        "Memory of a step of BERT-large",
        "scripts/bench/memory_table.py",
        "scripts/bench/memory_table.py --model bert-mini --rows stochastic",
        60,
        ("transformers",),
    ),
    "mlm-128": Part(
        "BERT-base MLM, 128 tokens, against the Trainer of Hugging Face",
        mlm("bert_base", 128, 256, False),
        MLM_REHEARSAL + " --rounds 1 --steps 1",
        90,
        MLM_MODULES,
    ),
    "mlm-512": Part("BERT-base MLM, 512 tokens", mlm("bert_base", 512, 64, False), "", 90, MLM_MODULES),
    "mlm-128-compiled": Part("Compiled, 128 tokens", mlm("bert_base", 128, 256, True), "", 120, MLM_MODULES),
    "mlm-512-compiled": Part("Compiled, 512 tokens", mlm("bert_base", 512, 64, True), "", 120, MLM_MODULES),
    "callback": Part(
        "LionGuard in a training of BERT-mini",
        "scripts/bench/bench_guard.py --block-steps 20 --blocks 20 recipe=bert_mlm model=bert_mini trainer=gpu",
        "scripts/bench/bench_guard.py --block-steps 4 --blocks 6 recipe=image_classification data.batch_size=4",
        60,
        RECIPE_MODULES,
    ),
    "mini": Part(
        "Lion and AdamW on the embedded text, BERT-mini",
        "scripts/gpu/training_runs.py -- recipe=bert_mlm model=bert_mini trainer=gpu trainer.max_steps=3000",
        f"scripts/gpu/training_runs.py --optimizers lion -- recipe=image_classification {SMALL_PART}",
        120,
        RECIPE_MODULES,
    ),
    "cifar10": Part(
        "CIFAR-10 to 94 % and 96 %",
        "scripts/gpu/training_runs.py --metric val/top1 --reach 0.94 0.96 -- recipe=cifar10 data.path={cifar10} "
        "model=resnet18_cifar trainer=gpu",
        "",
        600,
        IMAGE_MODULES,
    ),
}
"""In order of value."""


@dataclass
class Outcome:
    """How a part ended: done, failed, stopped at its limit, or skipped with a reason; `seconds` that it took."""

    part: str
    status: str
    seconds: float = 0.0


def reason_to_skip(part: Part, rehearsal: bool, left: float, cifar10: Path | None) -> str | None:
    """Why a part is not begun, if so."""
    if rehearsal and not part.rehearsal:
        return "skipped: not part of a rehearsal"
    missing = [module for module in part.modules if importlib.util.find_spec(module) is None]
    if missing:
        return f"skipped: no module {', '.join(missing)}"
    if "{cifar10}" in part.command and not rehearsal and cifar10 is None:
        return "skipped: no --cifar10 FOLDER"
    program = command_of(part, rehearsal, cifar10)[0]
    if shutil.which(program) is None:
        return f"skipped: no program {program}"
    return "not begun: the budget is used up" if left < LEAST_SECONDS else None


def command_of(part: Part, rehearsal: bool, cifar10: Path | None) -> list[str]:
    """The command as the words of a process. An underscore in a rehearsal's --only stands for a space."""
    text = part.rehearsal if rehearsal else part.command
    words = [word.replace("{cifar10}", str(cifar10)) for word in text.split()]
    if rehearsal and "--only" in words:
        words = [word.replace("triton_", "triton ") for word in words]
    if words[0].startswith("-") or words[0].endswith(".py"):
        return [sys.executable, *words]
    return [sys.executable if word == "python" else word for word in words]


def environment_of(part: Part, rehearsal: bool) -> dict[str, str]:
    ours = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    if rehearsal:
        ours |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, **ours, "PYTHONPATH": path, **dict(part.environment)}


def run(name: str, part: Part, options: argparse.Namespace, seconds: float) -> Outcome:
    """Runs a part for at most so many seconds; its output goes to a file while it runs."""
    command, began = command_of(part, options.rehearsal, options.cifar10), time.monotonic()
    with (options.output / f"{name}.log").open("w") as log, (options.output / f"{name}.err").open("w") as errors:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment_of(part, options.rehearsal),
            stdout=log,
            stderr=errors,
            start_new_session=True,  # so that a part that is stopped takes its own processes along
        )
        try:
            code = process.wait(seconds)
            status = "done" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Outcome(name, status, time.monotonic() - began)


def write(options: argparse.Namespace, outcomes: dict[str, Outcome]) -> None:
    """report.md with all that was printed, and parts.json, both whole at any time."""
    kind = "a rehearsal on a CPU: no figure means anything" if options.rehearsal else f"budget {options.budget:.0f} s"
    lines = [f"# GPU report ({kind})", "", f"{time.strftime('%Y-%m-%d')}, {versions()}", ""]
    lines += ["| part | status | s |", "| --- | --- | ---: |"]
    lines += [f"| {o.part} | {o.status} | {o.seconds:.0f} |" for o in outcomes.values()]
    for name in outcomes:
        log = options.output / f"{name}.log"
        if log.exists():
            part = PARTS[name]
            command = " ".join(["python", *command_of(part, options.rehearsal, options.cifar10)[1:]])
            text = log.read_text(encoding="utf-8", errors="replace").strip()
            shown = text if text.startswith(("|", "`")) or "\n| ---" in text else f"```\n{text[-4000:]}\n```"
            lines += ["", f"## {part.title}", "", f"`{command}`", "", shown]
            errors = (options.output / f"{name}.err").read_text(encoding="utf-8", errors="replace").strip()
            if errors and outcomes[name].status != "done":
                lines += ["", f"{outcomes[name].status}; the end of what it wrote to stderr:", ""]
                lines += [f"```\n{errors[-2000:]}\n```"]
    new = options.output / "report.md.new"
    new.write_text("\n".join(lines) + "\n", encoding="utf-8")
    new.replace(options.output / "report.md")
    entries = {name: asdict(outcome) for name, outcome in outcomes.items()}
    (options.output / "parts.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def versions() -> str:
    found = [f"Python {sys.version.split()[0]}"]
    for name in ("torch", "triton", "transformers", "lightning", "hydra-core", "kornia"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def earlier(options: argparse.Namespace) -> dict[str, Outcome]:
    """Outcomes of an earlier run with the same output."""
    file = options.output / "parts.json"
    if options.again or not file.exists():
        return {}
    return {name: Outcome(**entry) for name, entry in json.loads(file.read_text(encoding="utf-8")).items()}


def wheels(installed: Path | None) -> list[str]:
    """NAME==VERSION of all that the parts need and a machine with torch lacks, as this environment has it.

    Args:
        installed: what `pip freeze` printed on the bare machine; None for a machine with torch alone.
    """
    lines = installed.read_text().splitlines() if installed else []
    there = {_normal(re.split(r"[=@ ]", line)[0]) for line in lines if line.strip()}
    from packaging.requirements import Requirement  # here: the bare machine may lack it

    modules = dict.fromkeys(module for part in PARTS.values() for module in part.modules)
    waiting = [*(DISTRIBUTIONS.get(module, module) for module in modules), *PEERS]
    found: dict[str, str] = {}
    while waiting:
        name = _normal(waiting.pop(0))
        if name in found or name in there or re.fullmatch(CARRIED_NOT, name):
            continue
        try:
            found[name] = f"{name}=={metadata.version(name)}"
        except metadata.PackageNotFoundError:
            found[name] = name
            continue
        needs = [Requirement(need) for need in metadata.requires(name) or ()]
        waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate(TARGET)]
    return sorted(found.values())


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def list_wheels(installed: Path | None) -> None:
    """Prints names, and how to fetch the wheels and to install them without a network."""
    names = wheels(installed)
    platforms = " ".join(f"--platform manylinux_2_{minor}_x86_64" for minor in (28, 27, 17)) + " --platform any"
    print(*names, sep="\n")
    built = [name for name in names if name.startswith(SOURCE_ONLY)]
    print("\n# fetch, for Python 3.12 on x86-64 (--no-deps: the list is complete):")
    print(f"python -m pip download --no-deps --only-binary=:all: --python-version 3.12 {platforms} -d wheels \\")
    print(f"    {' '.join(name for name in names if name not in built)}")
    if built:
        print(f"python -m pip wheel --no-deps -w wheels {' '.join(built)}  # it has no wheel, and is pure Python")
    print("# there (dill, which datasets hashes with, knows installed packages by the folder's name site-packages):")
    print("python -m pip install --no-index --no-deps --target site-packages wheels/*.whl")
    print("export PYTHONPATH=$PWD/site-packages")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=600, help="seconds for everything (600)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"), metavar="DIR")
    parser.add_argument("--again", action="store_true", help="also parts that an earlier run has done")
    parser.add_argument("--cifar10", type=Path, metavar="FOLDER", help="with CIFAR-10's parquet files")
    parser.add_argument("--rehearsal", action="store_true", help="on a CPU, with tiny sizes")
    parser.add_argument("--list-wheels", action="store_true", help="print what a bare machine lacks, and stop")
    parser.add_argument("--installed", type=Path, metavar="FILE", help="pip freeze of that machine, for --list-wheels")
    options = parser.parse_args(argv)
    options.output = options.output.resolve()
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    if options.list_wheels:
        list_wheels(options.installed)
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    outcomes, end = earlier(options), time.monotonic() + options.budget
    for name in options.parts or PARTS:
        part, left = PARTS[name], end - time.monotonic()
        if name in outcomes and outcomes[name].status == "done":
            continue
        limit = min(part.seconds * (CPU_FACTOR if options.rehearsal else 1), left)
        reason = reason_to_skip(part, options.rehearsal, left, options.cifar10)
        if reason is None:
            print(f"{name}: {part.title}, at most {limit:.0f} s", flush=True)
        outcomes[name] = Outcome(name, reason) if reason else run(name, part, options, limit)
        print(f"{name}: {outcomes[name].status}, {outcomes[name].seconds:.0f} s", flush=True)
        write(options, outcomes)
    print(f"{options.output / 'report.md'}")
    return 1 if any(outcome.status.startswith("failed") for outcome in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
