"""Runs of a network with small and odd shapes, which tell their state before a save and after a load, in one piece."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lion_lightning.optim import Lion
from lion_lightning.optim.kernels import storage_formats
from lion_lightning.training.checkpoint.files import DurableCheckpointIO, weights_of, write_weights
from lion_lightning.training.checkpoint.sharded import ShardedStrategy

STORAGE: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("32-true", {}),
    "fp32, bf16 momentum": ("32-true", {"momentum_dtype": "bfloat16"}),
    "fp32, int8 momentum": ("32-true", {"momentum_dtype": "int8"}),
    "bf16, 32 bits": ("bf16-true", {}),
    "bf16, 32 bits, int8 momentum": ("bf16-true", {"momentum_dtype": "int8"}),
    "bf16, 24 bits": ("bf16-true", {"weight_bits": 24}),
    "bf16, 24 bits, int8 momentum": ("bf16-true", {"weight_bits": 24, "momentum_dtype": "int8"}),
    "bf16, 16 bits": ("bf16-true", {"weight_bits": 16}),
    "bf16, 16 bits, int8 momentum": ("bf16-true", {"weight_bits": 16, "momentum_dtype": "int8"}),
}
CUT = "layers.1.weight"  # 101 x 67: its second half begins in the middle of an int8 block of the whole


class Network(pl.LightningModule):
    """Shards of whole int8 blocks, one that cuts a block, an uneven split, and one row, which leaves rank 1 nothing."""

    def __init__(self, options: dict[str, Any], steps: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = ((64, 96), (67, 101), (64, 3), (3, 1))
        self.layers = nn.ModuleList([nn.Linear(*size) for size in sizes])
        self.options, self.steps = options, steps
        self.seen: dict[str, dict[str, Tensor]] = {}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 + self.trainer.global_step)  # the same on every rank
        x = torch.randn(8, 64, generator=generator).to(self.dtype)
        wide = self.layers[0](x)
        return sum(
            part.float().square().mean()
            for part in (wide, self.layers[1](wide[:, :67]), self.layers[3](self.layers[2](x)))
        )  # fmt: skip

    def configure_optimizers(self) -> Lion:
        decayed = [param for param in self.parameters() if param.ndim > 1]
        others = [param for param in self.parameters() if param.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        return Lion(groups, lr=1e-3, **self.options)

    def train_dataloader(self) -> list[Tensor]:
        return [torch.zeros(1)] * self.steps

    def on_train_start(self) -> None:
        self.seen["loaded"] = state_of(self)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen[f"step {self.trainer.global_step}"] = state_of(self)


class SaveAt(pl.Callback):
    """Saves where training begins (0) or after a step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.step == 0:
            self.save(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.path, weights_only=False)
        if trainer.is_global_zero:
            write_weights(weights_of(self.path), self.path.with_name(f"best-{self.path.stem}.safetensors"))


def whole(tensor: Tensor) -> Tensor:
    """In one piece. gloo knows no int16."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().clone()
    local = tensor.to_local().contiguous()
    wide = {torch.int16: torch.int32}.get(local.dtype, local.dtype)
    return DTensor.from_local(
        local.to(wide), tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
    ).full_tensor().to(local.dtype).clone()  # fmt: skip


def state_of(module: pl.LightningModule) -> dict[str, Tensor]:
    """Weights by name, and the optimizer's state by name and key; int8 momentum also as what it stands for."""
    seen = {name: whole(weight.data) for name, weight in module.named_parameters()}
    optimizer = module.trainer.optimizers[0]
    names = {param: name for name, param in module.named_parameters()}
    for param, entry in optimizer.state.items():
        for key, value in entry.items():
            seen[f"{names[param]}: {key}"] = whole(value)
        if "exp_avg_scale" in entry:
            seen[f"{names[param]}: momentum"] = whole(momentum(entry))
    seen["steps"] = torch.tensor([group["step"] for group in optimizer.param_groups])
    return seen


def momentum(entry: dict[str, Tensor]) -> Tensor:
    """What int8 levels and scales stand for, computed on the shards that own them."""
    levels, scales = entry["exp_avg"], entry["exp_avg_scale"]
    if not isinstance(levels, DTensor):
        return storage_formats.dequantize(levels.flatten(), scales).view_as(levels)
    here = levels.to_local()
    values = storage_formats.dequantize(here.flatten(), scales.to_local()).view_as(here)
    return DTensor.from_local(values, levels.device_mesh, levels.placements, shape=levels.shape, stride=levels.stride())


def carry_out(job: dict[str, Any], rank: int) -> dict[str, Any]:
    """One run. `job`: mode, strategy, steps, folder, and maybe resume, save_at; what was seen is a file."""
    precision, options = STORAGE[job["mode"]]
    folder, io = Path(job["folder"]), DurableCheckpointIO()
    module = Network(options, job["steps"])
    callbacks = [SaveAt(job["save_at"], folder / f"{job['name']}.ckpt")] if "save_at" in job else []
    trainer = pl.Trainer(
        strategy={"ddp": DDPStrategy, "fsdp2": ShardedStrategy}[job["strategy"]](),
        devices=job["processes"], accelerator="cpu", precision=precision, max_steps=job["steps"], callbacks=callbacks,
        plugins=[io], logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, ckpt_path=folder / f"{job['resume']}.ckpt" if "resume" in job else None, weights_only=True)
    if rank == 0:
        torch.save(module.seen, folder / f"{job['name']}.pt")
    return {"error": "" if io.error is None else f"{type(io.error).__name__}: {io.error}"}
