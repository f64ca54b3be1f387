"""What bench_step.py measures: our modes and engines, torch's optimizers, and peers where they import."""

import contextlib
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import nn

from lion_lightning.optim import Lion
from lion_lightning.optim.kernels import select as engines

Params = list[nn.Parameter]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

MODES: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("fp32", {}),
    "fp32, m bf16": ("fp32", {"momentum_dtype": "bfloat16"}),
    "fp32, m int8": ("fp32", {"momentum_dtype": "int8"}),
    "bf16/32": ("bf16", {}),
    "bf16/24": ("bf16", {"weight_bits": 24}),
    "bf16/16": ("bf16", {"weight_bits": 16}),
    "bf16/32, m int8": ("bf16", {"momentum_dtype": "int8"}),
    "bf16/24, m int8": ("bf16", {"weight_bits": 24, "momentum_dtype": "int8"}),
    "bf16/16, m int8": ("bf16", {"weight_bits": 16, "momentum_dtype": "int8"}),
}
"""Our storage modes: bits of the weight kept, and the momentum where it is not stored as the parameter is."""


@dataclass(frozen=True)
class Subject:
    """One optimizer in one mode on one engine."""

    name: str
    family: str
    mode: str
    """One of `MODES`, or the parameters' dtype for other optimizers."""
    dtype: str
    make: Callable[[Params, float, float], Any]
    """(parameters, lr, weight decay) -> optimizer."""
    untouched: tuple[str, ...] = ()
    """State that a step neither reads nor writes."""


def ours(device: torch.device) -> list[Subject]:
    """Lion in every mode: the eager engine, and each engine made for the device."""
    names = [engine.name for engine in engines.engines_for(device)]
    subjects = []
    for mode, (dtype, options) in MODES.items():
        for engine in (*names, "eager"):

            def make(params: Params, lr: float, decay: float, engine: str = engine, options: Any = options) -> Lion:
                return Lion(params, lr, weight_decay=decay, fused=engine != "eager", **options)

            subjects.append(Subject(f"Lion {engine} {mode}", "lion_lightning", mode, dtype, make))
    return subjects


def theirs(
    package: str, name: str, load: Callable[[], Callable[[Params, float, float], Any]], **more: Any
) -> list[Subject]:
    """A peer with fp32 and with bf16 parameters. Importing waits until an optimizer is made."""

    def make(params: Params, lr: float, decay: float) -> Any:
        return load()(params, lr, decay)

    return [Subject(f"{name} {dtype}", package, dtype, dtype, make, **more) for dtype in DTYPES]


def torch_own() -> list[Subject]:
    adamw = theirs(
        "torch", "AdamW fused", lambda: lambda p, lr, decay: torch.optim.AdamW(p, lr, weight_decay=decay, fused=True)
    )
    sgd = theirs(
        "torch", "SGD fused", lambda: lambda p, lr, decay: torch.optim.SGD(p, lr, weight_decay=decay, fused=True)
    )
    return [*adamw, *sgd]


def _attribute(module: str, name: str) -> Any:
    with quiet():
        return getattr(importlib.import_module(module), name)


def _timm() -> Any:
    """timm's Lion; without torchvision, which timm's models import, from its optimizer's module alone."""
    if importlib.util.find_spec("torchvision") is None and "timm" not in sys.modules:
        spec = importlib.util.find_spec("timm")
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError("No module named 'timm'", name="timm")
        for name, folder in (("timm", ""), ("timm.optim", "/optim")):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [spec.submodule_search_locations[0] + folder]
    return _attribute("timm.optim.lion", "Lion")


def _keyword(lion: Any, **options: Any) -> Callable[[Params, float, float], Any]:
    return lambda params, lr, decay: lion(params, lr=lr, weight_decay=decay, **options)


def _torchao() -> Callable[[Params, float, float], Any]:
    adamw = _attribute("torchao.optim", "AdamW8bit")  # torchao has no Lion
    if not torch.cuda.is_available():
        raise RuntimeError("compiles every shape anew, minutes for each on a CPU; measured on a GPU alone")
    return _keyword(adamw)


def peers(device: torch.device) -> list[Subject]:
    """Lions of other packages (and torchao's 8-bit AdamW, as it has none)."""
    flash: dict[str, Any] = (
        {} if device.type == "cuda" else {"quantize": False, "master_weight_bits": None, "fused": False}
    )
    deepspeed = (
        ("DeepSpeed FusedLion", "FusedLion") if device.type == "cuda" else ("DeepSpeed CPULion", "DeepSpeedCPULion")
    )
    betas = (0.9, 0.99)  # DeepSpeed's default is (0.9, 0.999)
    return [
        *theirs("lion_pytorch", "lion-pytorch", lambda: _keyword(_attribute("lion_pytorch", "Lion"))),
        *theirs("optimi", "optimi", lambda: _keyword(_attribute("optimi", "Lion"))),
        *theirs("pytorch_optimizer", "pytorch_optimizer", lambda: _keyword(_attribute("pytorch_optimizer", "Lion"))),
        *theirs("timm", "timm", lambda: _keyword(_timm())),
        *theirs("bitsandbytes", "bitsandbytes 32", lambda: _keyword(_attribute("bitsandbytes.optim", "Lion32bit"))),
        *theirs("bitsandbytes", "bitsandbytes 8", lambda: _keyword(_attribute("bitsandbytes.optim", "Lion8bit"))),
        *theirs(
            "deepspeed",
            deepspeed[0],
            lambda: _keyword(_attribute("deepspeed.ops.lion", deepspeed[1]), betas=betas),
            untouched=("exp_avg_sq",),
        ),
        *theirs("flashoptim", "FlashLion", lambda: _keyword(_attribute("flashoptim", "FlashLion"), **flash)),
        *theirs("torchao", "torchao AdamW8bit", _torchao),
    ]


MODULES = (
    "torch", "lion_pytorch", "optimi", "pytorch_optimizer", "timm", "bitsandbytes", "deepspeed", "flashoptim",
    "torchao", "triton",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of the packages that are installed; of torch with its build, such as 2.13.0+cpu."""
    found = {}
    for module in MODULES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[module] = metadata.version("torch-optimi" if module == "optimi" else module)
    return {**found, "torch": torch.__version__}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides what packages and their compilers print while they load."""
    sys.stdout.flush()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
