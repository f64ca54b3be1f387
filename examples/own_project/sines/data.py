"""Noisy sine waves and their frequencies."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lion_lightning.data.stream import StreamDataModule


class Waves(Dataset):
    """`count` waves of `length` points.

    An item is asked for as (position in the run, index of the wave): whatever is drawn for it follows from the
    position, so a resumed run sees what an uninterrupted one sees.
    """

    def __init__(self, count: int, length: int, noise: float, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.frequencies = 1 + 9 * torch.rand(count, generator=draw)
        times = torch.linspace(0, 1, length)
        self.waves = torch.sin(2 * torch.pi * self.frequencies[:, None] * times)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.waves)

    def __getitems__(self, pairs: list[tuple[int, int]]) -> dict[str, Tensor]:
        draws = [torch.Generator().manual_seed(position) for position, _ in pairs]
        noise = torch.stack([torch.randn(self.waves.shape[1], generator=draw) for draw in draws])
        indices = [index for _, index in pairs]
        return {"waves": self.waves[indices] + self.noise * noise, "frequencies": self.frequencies[indices]}


class Sines(StreamDataModule):
    """Waves for training and others for validation."""

    def __init__(self, batch_size: int, count: int = 2000, length: int = 64, noise: float = 0.3, seed: int = 1) -> None:
        super().__init__(batch_size, seed=seed)
        self.count, self.length, self.noise = count, length, noise

    def setup(self, stage: str) -> None:
        self.train_set = Waves(self.count, self.length, self.noise, seed=1)
        self.val_set = Waves(self.count // 4, self.length, self.noise, seed=2)
