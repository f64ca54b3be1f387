"""Makes the files beside it: optimizer states saved by the real packages, and where those packages went next.

    PYTHONPATH=<folder with the peers> python tests/optim/peer_states/make.py

Peers are installed with `pip install --no-deps --target <folder>` and not needed by the tests. Versions used:
lion-pytorch 0.2.5, timm 1.0.31, pytorch_optimizer 4.1.0, bitsandbytes 0.50.2, DeepSpeed 0.19.8 (CPULion, compiled),
torch-optimi 0.3.3, flashoptim 0.1.4; torch 2.13.0 on a CPU. FlashLion quantizes on a GPU alone: its 24-bit state is
made by its own kernel under Triton's interpreter and put into the layout of its `state_dict` here. FusedLion needs
CUDA: its file is written as its source says (`step` and `exp_avg` per parameter).
"""

import importlib.util
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
SHAPES = ((24, 23), (7,))
"""Two full blocks of 256 and a part of one; a vector."""
STEPS_BEFORE, STEPS_AFTER = 4, 3
OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


def weights(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter((torch.randn(shape, generator=generator) * 0.05).to(dtype)) for shape in SHAPES]


def gradients(step: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def run(optimizer: Any, params: list[nn.Parameter], first: int, count: int) -> None:
    for step in range(first, first + count):
        for param, grad in zip(params, gradients(step, params[0].dtype), strict=True):
            param.grad = grad
        optimizer.step()


def record(make: Callable[[list[nn.Parameter]], Any], dtype: torch.dtype) -> dict[str, Any]:
    """State and weights after `STEPS_BEFORE` steps, weights one and three steps later, for bf16 the next state too."""
    params = weights(dtype)
    optimizer = make(params)
    run(optimizer, params, 0, STEPS_BEFORE)
    saved = clone({"optimizer": optimizer.state_dict(), "weights": [param.detach() for param in params]})
    run(optimizer, params, STEPS_BEFORE, 1)
    saved["weights_after_one"] = clone([param.detach() for param in params])
    if dtype == torch.bfloat16:
        saved["optimizer_after_one"] = clone(optimizer.state_dict())
    run(optimizer, params, STEPS_BEFORE + 1, STEPS_AFTER - 1)
    saved["weights_after_three"] = clone([param.detach() for param in params])
    return saved


def clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: clone(item) for key, item in value.items()}
    return [clone(item) for item in value] if isinstance(value, list) else value


def bare_package(name: str, folder: str) -> types.ModuleType:
    """A package without its __init__: timm's imports torchvision, which its optimizers do not need."""
    module = types.ModuleType(name)
    module.__path__ = [folder]
    sys.modules[name] = module
    return module


def timm_lion() -> Any:
    spec = importlib.util.find_spec("timm")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = spec.submodule_search_locations[0]
    bare_package("timm", folder)
    bare_package("timm.optim", f"{folder}/optim")
    return importlib.import_module("timm.optim.lion").Lion


def flashlion_kernel(saved_dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """FlashLion with 24 bits and 8-bit momentum: its kernel under the interpreter, its layout of a saved state.

    The interpreter truncates to bf16 where a GPU rounds to nearest, so its weights drift by up to lr/4 in a step.
    """
    import flashoptim.optimizers as flash
    import triton.language as tl

    flash.libdevice = types.SimpleNamespace(copysign=lambda size, sign: tl.where(sign < 0, -size, size))
    params = weights(saved_dtype)
    parts = [
        {
            "levels": torch.zeros_like(param, dtype=torch.int8),
            "scales": torch.zeros(-(-param.numel() // 32), dtype=torch.float16),
            "errors": torch.zeros_like(param, dtype=torch.int8),
        }
        for param in params
    ]

    def steps(first: int, count: int) -> None:
        for step in range(first, first + count):
            for param, grad, part in zip(params, gradients(step, saved_dtype), parts, strict=True):
                flash._triton_momentum_kernel[(1,)](
                    part["levels"],
                    part["scales"],
                    param.data,
                    grad,
                    part["errors"],
                    param.numel(),
                    OPTIONS["lr"],
                    OPTIONS["betas"][1],
                    OPTIONS["betas"][0],
                    OPTIONS["lr"] * OPTIONS["weight_decay"],
                    GROUP_SIZE=32,
                    DO_LION=True,
                    NESTEROV=False,
                    DECOUPLED_WEIGHT_DECAY=False,
                    PARAM_DTYPE=tl.bfloat16,
                    USE_ECC=True,
                    QUANTIZE_OPTIM_STATES=True,
                    SIGNED_ERROR_T=tl.int8,
                    NUM_MANTISSA_BITS=7,
                    SIGNED_MAX_VAL=127,
                    BLOCK_SIZE_N=1024,
                )

    def full() -> list[Tensor]:
        pairs = zip(params, parts, strict=True)
        return [corrected(param.detach(), part["errors"]) for param, part in pairs]

    def corrected(param: Tensor, errors: Tensor) -> Tensor:
        out = torch.empty(param.shape)
        block = {"BLOCK_SIZE": 1024, "NUM_MANTISSA_BITS": 7, "SIGNED_MAX_VAL": 127}
        flash._reconstruct_fp32_kernel[(1,)](param, errors, out, param.numel(), **block)
        return out

    steps(0, STEPS_BEFORE)
    state = {
        index: {
            "exp_avg::quantized": part["levels"].clone(),
            "exp_avg::scales": part["scales"].clone().view(torch.bfloat16),
            "error_bits": part["errors"].to(torch.bfloat16),
        }
        for index, part in enumerate(parts)
    }
    group = {**OPTIONS, "initial_lr": OPTIONS["lr"], "master_bytewidth": 3, "quantize": True, "params": [0, 1]}
    saved: dict[str, Any] = {
        "optimizer": {"state": state, "param_groups": [group]},
        "weights": clone([param.detach() for param in params]),
        "full_weights": full(),
    }
    steps(STEPS_BEFORE, 1)
    saved["full_weights_after_one"] = full()
    return saved


def fused_lion(cpu_lion: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's FusedLion from CPULion's figures: no second moment, `step` in state and group."""
    saved = clone(cpu_lion)
    for entry in saved["optimizer"]["state"].values():
        del entry["exp_avg_sq"]
    for group in saved["optimizer"]["param_groups"]:
        group["step"] = 0
    return saved


def main() -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    import bitsandbytes
    import flashoptim
    import lion_pytorch
    import optimi
    import pytorch_optimizer
    from deepspeed.ops.lion import DeepSpeedCPULion

    timm = timm_lion()
    plain = {"quantize": False, "master_weight_bits": None, "fused": False}
    makers: dict[str, Callable[[list[nn.Parameter]], Any]] = {
        "lion_pytorch": lambda params: lion_pytorch.Lion(params, **OPTIONS),
        "timm": lambda params: timm(params, **OPTIONS),
        "pytorch_optimizer": lambda params: pytorch_optimizer.Lion(params, **OPTIONS),
        "bitsandbytes_32bit": lambda params: bitsandbytes.optim.Lion32bit(params, **OPTIONS),
        "bitsandbytes_8bit": lambda params: bitsandbytes.optim.Lion8bit(params, **OPTIONS, min_8bit_size=256),
        "deepspeed_cpu": lambda params: DeepSpeedCPULion(params, **OPTIONS),
        "optimi": lambda params: optimi.Lion(params, **OPTIONS),
        "flashlion": lambda params: flashoptim.FlashLion(params, **OPTIONS, **plain),
    }
    for name, make in makers.items():
        for dtype in (torch.float32, torch.bfloat16):
            torch.save(record(make, dtype), HERE / f"{name}_{str(dtype).removeprefix('torch.')}.pt")
    cpu_lion = torch.load(HERE / "deepspeed_cpu_float32.pt", weights_only=True)
    torch.save(fused_lion(cpu_lion), HERE / "deepspeed_fused_float32.pt")
    torch.save(flashlion_kernel(), HERE / "flashlion_24bit_bfloat16.pt")


if __name__ == "__main__":
    main()
