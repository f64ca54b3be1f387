"""What the host does in a training step of a small model: plain, compiled, and captured in a CUDA graph.

    python scripts/gpu/host_time.py

Prints the host's time to enqueue a step and the time until the step is done, means over many steps. The two are the
same where the host's work decides, which is what a graph saves.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, ViTConfig, ViTForImageClassification

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for the project's modules

from lion_lightning.optim import Lion
from scripts.bench.bench_measure import captured

WARMUP_STEPS = 5
Batch = dict[str, Tensor]
Step = Callable[[], object]


def digits() -> tuple[nn.Module, Batch]:
    """conf/model/vit_micro.yaml on 64 images of 8 x 8 pixels."""
    model = ViTForImageClassification(
        ViTConfig(  # type: ignore[call-arg]
            num_hidden_layers=4, hidden_size=64, num_attention_heads=4, intermediate_size=256, patch_size=2,
            image_size=8, num_channels=1, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip
    return model, {"pixel_values": torch.randn(64, 1, 8, 8), "labels": torch.arange(64) % 10}


def bert_mini() -> tuple[nn.Module, Batch]:
    """conf/model/bert_mini.yaml on 64 blocks of 64 tokens, with a vocabulary of 4,096."""
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=4096, num_hidden_layers=4, hidden_size=256, num_attention_heads=4, intermediate_size=1024,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip
    tokens = torch.randint(4096, (64, 64), generator=torch.Generator().manual_seed(0))
    return model, {"input_ids": tokens, "labels": tokens}


MODELS = {"digits": digits, "bert_mini": bert_mini}


def training_step(model: nn.Module, batch: Batch, optimizer: Lion) -> Step:
    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(step: Step, steps: int) -> tuple[float, float]:
    """Milliseconds to enqueue a step, and until it is done."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(WARMUP_STEPS):
        step()
    wait()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    enqueued = time.perf_counter()
    wait()
    return 1e3 * (enqueued - began) / steps, 1e3 * (time.perf_counter() - began) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"| model, fp32, on {device} | step | host ms | ms |\n| --- | --- | ---: | ---: |", flush=True)
    for name in options.models:
        torch.manual_seed(0)
        model, batch = MODELS[name]()
        model, batch = model.to(device), {key: value.to(device) for key, value in batch.items()}
        optimizer = Lion(model.parameters(), lr=1e-4)
        plain = training_step(model, batch, optimizer)
        kinds: dict[str, Callable[[], Step]] = {
            "plain": lambda step=plain: step,  # type: ignore[misc]
            "compiled": lambda model=model, batch=batch, optimizer=optimizer: training_step(  # type: ignore[misc]
                torch.compile(model, backend=options.backend),  # type: ignore[arg-type]
                batch,
                optimizer,
            ),
            "captured": lambda step=plain: captured(step),  # type: ignore[misc]
        }
        if device.type != "cuda":
            del kinds["captured"]
        for kind, make in kinds.items():
            try:
                host, whole = timed(make(), options.steps)
            except Exception as error:  # a compiler or a capture fails in many ways, and the others go on
                print(f"| {name} | {kind} | failed: {' '.join(str(error).split())[:160]} | |", flush=True)
            else:
                print(f"| {name} | {kind} | {host:.3f} | {whole:.3f} |", flush=True)


if __name__ == "__main__":
    main()
