"""How others train the same: the peers of scripts/bench/bench_recipe.py."""

import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from omegaconf import DictConfig
from PIL import Image
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTImageProcessorPil,
)

from lion_lightning.training.build import build_data, build_module
from lion_lightning.training.performance import WARMUP_BATCHES

MASKED = 0.15
OPTIMIZERS = {"adamw": "adamw_torch_fused", "sgd": "sgd"}
"""Ours -> the same one of torch, by the name that the Trainer of Hugging Face has for it."""
Turn = Callable[[DictConfig, int], list[float]]
"""From the configuration and a number of steps to the seconds of each but the first few."""


class Clock:
    """Seconds from one tick to the next, without the first few."""

    def __init__(self) -> None:
        self._ticks: list[float] = []

    def tick(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._ticks.append(time.perf_counter())

    @property
    def durations(self) -> list[float]:
        steps = [later - earlier for earlier, later in zip(self._ticks, self._ticks[1:], strict=False)]
        return steps[WARMUP_BATCHES - 1 :]


def usual_way(cfg: DictConfig) -> dict[str, Turn]:
    """The peer of a configuration by its name.

    Raises:
        SystemExit: there is none, or it has no such optimizer.
    """
    if cfg.recipe.name not in ("bert_mlm", "image_classification"):
        raise SystemExit(f"recipe={cfg.recipe.name} has no peer here; try bert_mlm or image_classification")
    if cfg.optim.name not in OPTIMIZERS:
        raise SystemExit(f"optim={cfg.optim.name} is not in the peers; try {' or '.join(OPTIMIZERS)}")
    if cfg.recipe.name == "bert_mlm":
        return {"Hugging Face Trainer": hugging_face_trainer}
    return {"torch loop with image processor": processor_loop}


def hugging_face_trainer(cfg: DictConfig, steps: int) -> list[float]:
    """The Trainer with DataCollatorForLanguageModeling over the same blocks: scores at every position."""
    data = build_data(cfg)
    blocks = data.ready.train  # type: ignore[attr-defined]
    wanted = blocks[: steps * cfg.data.batch_size].tolist()
    dataset = Dataset.from_dict({"input_ids": wanted, "attention_mask": [[1] * len(block) for block in wanted]})
    tokenizer, clock = data.ready.tokenizer, Clock()  # type: ignore[attr-defined]

    class Ticks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=cfg.data.batch_size,
            max_steps=steps,
            optim=OPTIMIZERS[cfg.optim.name],
            learning_rate=cfg.optim.lr,
            weight_decay=cfg.optim.weight_decay,
            lr_scheduler_type="cosine",
            bf16=cfg.trainer.precision == "bf16-mixed",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=cfg.seed,
        )
        config = build_module(cfg, data).model.config
        Trainer(
            AutoModelForMaskedLM.from_config(config),
            arguments,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED),
            train_dataset=dataset,
            callbacks=[Ticks()],
        ).train()
    return clock.durations


def processor_loop(cfg: DictConfig, steps: int) -> list[float]:
    """Decoded pictures through the image processor in the collate function; no augmentation."""
    data = build_data(cfg)
    module = build_module(cfg, data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    numbers = range(min(data.num_train_samples, steps * cfg.data.batch_size))
    stored = data.train_set.__getitems__([(number, number) for number in numbers])  # type: ignore[attr-defined]
    pictures = [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in stored["pixels"]]
    height, width = stored["pixels"].shape[-2:]
    processor = ViTImageProcessorPil(
        size={"height": height, "width": width},
        image_mean=module.mean.flatten().tolist(),
        image_std=module.std.flatten().tolist(),
    )
    labels = stored["labels"].tolist()

    def collate(items: list[int]) -> dict[str, torch.Tensor]:
        made = processor([pictures[item] for item in items], return_tensors="pt")
        return {**made, "labels": torch.tensor([labels[item] for item in items])}

    model = AutoModelForImageClassification.from_config(module.model.config).to(device)
    decay = cfg.optim.weight_decay
    if cfg.optim.name == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            model.parameters(), lr=cfg.optim.lr, weight_decay=decay, fused=True
        )
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=cfg.optim.lr, momentum=cfg.optim.momentum, fused=True)
    clock, done = Clock(), 0
    while done < steps:
        for batch in DataLoader(range(len(pictures)), cfg.data.batch_size, shuffle=True, collate_fn=collate):  # type: ignore[arg-type]
            model(**{name: values.to(device) for name, values in batch.items()}).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            clock.tick()
            done += 1
            if done == steps:
                break
    return clock.durations
