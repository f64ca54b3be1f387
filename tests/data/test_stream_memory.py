"""The memory of a stream does not grow with the size of its data."""

import tracemalloc
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lion_lightning.training.build import instantiate

BATCHES = 8


def peak_bytes(compose: Any, prose: Path, folder: Path, copies: int) -> int:
    """The most Python memory in use while the first batches are taken from `copies` of the prose."""
    folder.mkdir()
    (folder / "text.txt").write_text("\n\n".join([prose.read_text()] * copies), encoding="utf-8")
    small = ("data.sequence_length=32", "data.vocab_size=300", "data.num_workers=0", f"data.cache_dir={folder}/cache")
    data = instantiate(compose("data=streaming", f"data.path={folder}/text.txt", *small, "run_dir=out").data)
    data.prepare_data()
    data.setup("fit")
    data.trainer = SimpleNamespace(
        global_step=0, max_steps=100, accumulate_grad_batches=1, global_rank=0, world_size=1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )  # fmt: skip
    tracemalloc.start()
    try:
        assert len(list(islice(data.train_dataloader(), BATCHES))) == BATCHES
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_eight_times_the_text_takes_no_more_memory(compose: Any, prose: Path, tmp_path: Path) -> None:
    small = peak_bytes(compose, prose, tmp_path / "small", 6)  # more than one pool of 2 MiB
    large = peak_bytes(compose, prose, tmp_path / "large", 48)
    assert large < 1.25 * small
