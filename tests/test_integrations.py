"""Our Lion, unchanged, in the loops people have: each run ends where a plain loop ends, and its loss is lower.

The data is one batch of a teacher's labels, so that every framework sees the same batches in the same order.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lion_lightning import Lion

STEPS, BATCH = 24, 16
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "devices": 1,
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 64), nn.Tanh(), nn.Linear(64, 4))


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(STEPS * BATCH, 12, generator=generator)
    return TensorDataset(inputs, (inputs @ torch.randn(12, 4, generator=generator)).argmax(1))


def loader() -> DataLoader[Any]:
    return DataLoader(dataset(), batch_size=BATCH)


def lion(model: nn.Module, **options: Any) -> Lion:
    return Lion(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, **options)


@torch.no_grad()
def whole_loss(model: nn.Module) -> float:
    inputs, labels = dataset().tensors
    return float(nn.functional.cross_entropy(model(inputs.to(next(model.parameters()).dtype)).float(), labels))


def plain(
    *, accumulate: int = 1, norm: float | None = None, value: float | None = None, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The reference: a loop of torch alone."""
    model = network().to(dtype)
    optimizer = lion(model)
    for index, (inputs, labels) in enumerate(loader()):
        loss = nn.functional.cross_entropy(model(inputs.to(dtype)), labels)
        (loss / accumulate).backward()
        if (index + 1) % accumulate:
            continue
        if norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), norm)
        if value is not None:
            nn.utils.clip_grad_value_(model.parameters(), value)
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_trained(model: nn.Module) -> None:
    assert whole_loss(model) < 0.8 * whole_loss(network())


def assert_equal_weights(model: nn.Module, reference: nn.Module) -> None:
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_plain_loop_learns() -> None:
    assert_trained(plain())


class Automatic(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Lion:
        return lion(self)


class Manual(Automatic):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        optimizer.step()


def fit(module: Automatic, folder: Path, **options: Any) -> nn.Module:
    trainer = Trainer(max_epochs=1, default_root_dir=folder, **QUIET, **options)
    trainer.fit(module, loader())
    assert trainer.optimizers[0].param_groups[0]["step"] == trainer.global_step
    return module.net


@pytest.mark.parametrize(
    ("trainer", "loop"),
    [
        ({}, {}),
        ({"gradient_clip_val": 0.1}, {"norm": 0.1}),
        ({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, {"value": 0.01}),
        ({"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, {"accumulate": 2, "norm": 0.1}),
        ({"precision": "bf16-true"}, {"dtype": torch.bfloat16}),
    ],
    ids=["32-true", "clip by norm", "clip by value", "accumulation", "bf16-true"],
)
def test_lightning_equals_a_plain_loop(trainer: dict[str, Any], loop: dict[str, Any], tmp_path: Path) -> None:
    model = fit(Automatic(), tmp_path, **trainer)
    assert_trained(model)
    assert_equal_weights(model, plain(**loop))


def test_manual_optimization_in_lightning_equals_a_plain_loop(tmp_path: Path) -> None:
    model = fit(Manual(), tmp_path)
    assert_trained(model)
    assert_equal_weights(model, plain(norm=0.1))


@pytest.mark.parametrize("clip", [{}, {"gradient_clip_val": 1.0}])
def test_lightning_with_bf16_autocast_keeps_fp32_weights(clip: dict[str, Any], tmp_path: Path) -> None:
    model = fit(Automatic(), tmp_path, precision="bf16-mixed", **clip)
    assert_trained(model)
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("clip", [{}, {"gradient_clip_val": 1.0}])
def test_lightning_with_a_grad_scaler(clip: dict[str, Any], tmp_path: Path) -> None:
    """16-mixed; the Trainer refuses it by name on a CPU, so its plugin is given the CPU's GradScaler."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    module = Automatic()
    trainer = Trainer(
        max_epochs=2, default_root_dir=tmp_path, plugins=MixedPrecision("16-mixed", "cpu", scaler), **QUIET, **clip
    )
    trainer.fit(module, loader())
    assert_trained(module.net)
    steps = trainer.optimizers[0].param_groups[0]["step"]
    assert 0 < steps < 2 * STEPS  # the first ones overflowed and were skipped, and Lion did not count them
    assert scaler.get_scale() < 2.0**40
    assert all(param.isfinite().all() for param in module.parameters())


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_fabric_equals_a_plain_loop(precision: Any) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    bare = network()
    model, optimizer = fabric.setup(bare, lion(bare))
    for inputs, labels in fabric.setup_dataloaders(loader()):
        optimizer.zero_grad()
        fabric.backward(nn.functional.cross_entropy(model(inputs), labels))
        fabric.clip_gradients(model, optimizer, max_norm=0.1)
        optimizer.step()
    assert_trained(bare)
    if precision == "32-true":
        assert_equal_weights(bare, plain(norm=0.1))


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accelerate_equals_a_plain_loop(mixed_precision: str) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # one process, two settings
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=2)
    bare = network()
    model, optimizer, batches = accelerator.prepare(bare, lion(bare), loader())
    for inputs, labels in batches:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(inputs), labels))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    assert_trained(bare)
    if mixed_precision == "no":
        assert_equal_weights(bare, plain(accumulate=2, norm=0.1))


class Classifier(nn.Module):
    """What HF's Trainer expects: a loss with the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(inputs)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_hugging_face_trainer_equals_a_plain_loop(tmp_path: Path) -> None:
    from transformers import Trainer as HuggingFaceTrainer
    from transformers import TrainingArguments

    model = Classifier()
    optimizer = lion(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        lr_scheduler_type="constant",
        max_grad_norm=0.1,
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    examples = [{"inputs": inputs, "labels": label} for inputs, label in dataset()]
    HuggingFaceTrainer(model, arguments, train_dataset=examples, optimizers=(optimizer, None)).train()  # type: ignore[arg-type]
    assert optimizer.param_groups[0]["step"] == STEPS
    assert_trained(model.net)
    assert_equal_weights(model.net, plain(norm=0.1))
