"""The metrics of validation. Each is over all images, independent of batches and number of processes."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassConfusionMatrix

from .images import UNREADABLE

WORST = 20  # mistakes that are kept
CALIBRATION_BINS = 15
MAX_CONFUSION_CLASSES = 1_000  # a larger matrix would be too large to draw


class Mistake(NamedTuple):
    """A validation image, its class, the predicted class, and its probability."""

    image: int
    label: int
    guess: int
    share: float


class WorstMistakes(Metric):
    """The most confident mistakes, kept on the device."""

    full_state_update = False
    image: Tensor
    label: Tensor
    guess: Tensor
    share: Tensor

    def __init__(self, count: int = WORST, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.count = count
        for name in ("image", "label", "guess"):
            self.add_state(name, torch.full((count,), -1), dist_reduce_fx="cat")
        self.add_state("share", torch.zeros(count), dist_reduce_fx="cat")

    def update(self, shares: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Shares of the classes (batch, classes), labels and numbers of the images (batch,)."""
        share, guess = shares.max(-1)
        everything = torch.cat([self.share, share * ((guess != labels) & (labels != UNREADABLE))])
        best = everything.topk(self.count).indices
        for name, values in (("image", indices.to(share.device)), ("label", labels), ("guess", guess)):
            setattr(self, name, torch.cat([getattr(self, name), values])[best])
        self.share = everything[best]

    def compute(self) -> list[Mistake]:
        """The most confident first."""
        columns = [getattr(self, name).flatten().tolist() for name in Mistake._fields]  # of all processes, side by side
        found = [Mistake(*row) for row in zip(*columns, strict=True)]
        return sorted((one for one in found if one.share > 0), key=lambda one: -one.share)[: self.count]


class ValidationMetrics(nn.Module):
    """Loss, top-1, top-5 where there are more than five classes, expected calibration error, confusion, mistakes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.loss, self.top1 = MeanMetric(nan_strategy=math.nan), MeanMetric()  # NaN stays in the mean
        options: dict[str, Any] = {"num_classes": classes, "ignore_index": UNREADABLE, "validate_args": False}
        top5 = MulticlassAccuracy(top_k=5, average="micro", **options) if classes > 5 else None
        ece = MulticlassCalibrationError(n_bins=CALIBRATION_BINS, norm="l1", **options)
        self.figures: dict[str, Metric] = {"ece": ece} if top5 is None else {"top5": top5, "ece": ece}
        self._moved = nn.ModuleList(self.figures.values())  # so that they move to the device
        self.confusion = MulticlassConfusionMatrix(**options) if classes <= MAX_CONFUSION_CLASSES else None
        self.worst = WorstMistakes()

    def update(self, logits: Tensor, labels: Tensor, indices: Tensor) -> None:
        """Scores (batch, classes), labels and numbers of the images (batch,)."""
        known = (labels != UNREADABLE).float()
        self.loss.update(cross_entropy(logits, labels, ignore_index=UNREADABLE, reduction="none"), known)
        self.top1.update((logits.argmax(-1) == labels).float(), known)
        shares = logits.softmax(-1)
        for figure in self.figures.values():
            figure.update(shares, labels)
        if self.confusion is not None:
            self.confusion.update(shares, labels)
        self.worst.update(shares, labels, indices)

    def compute(self) -> dict[str, Tensor]:
        """The figures so far, under the names they have in the log; every process must call it."""
        more = {f"val/{name}": figure.compute() for name, figure in self.figures.items()}
        return {"val/loss": self.loss.compute(), "val/top1": self.top1.compute(), **more}

    def confusion_matrix(self) -> np.ndarray | None:
        """Images by class (rows) and guess (columns), int64; every process must call it."""
        return None if self.confusion is None else self.confusion.compute().cpu().numpy()

    def reset(self) -> None:
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.reset()
