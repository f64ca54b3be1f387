"""What validation measures, over uneven batches and over two processes, and the pictures that are drawn of it."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes
from torch.nn.functional import cross_entropy

from lion_lightning.recipes.image_classification.images import UNREADABLE
from lion_lightning.recipes.image_classification.metrics import Mistake, ValidationMetrics, WorstMistakes
from lion_lightning.recipes.image_classification.plots import draw_confusion, draw_mistakes

CLASSES, COUNT = 7, 101
Answers = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def answers() -> Answers:
    """Scores, labels and numbers of images, with something right in them."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (COUNT,), generator=draw)
    logits = torch.randn(COUNT, CLASSES, generator=draw)
    logits[torch.arange(COUNT), labels] += 1
    return logits, labels, torch.arange(COUNT)


def expected(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Each figure by its definition."""
    shares = logits.double().softmax(-1).numpy()
    truth, guess = labels.numpy(), shares.argmax(1)
    right, sure = guess == truth, shares.max(1)
    places = (-shares).argsort(1).argsort(1)[np.arange(len(truth)), truth]
    bins = np.minimum((sure * 15).astype(int), 14)
    gaps = [abs(right[bins == b].mean() - sure[bins == b].mean()) * (bins == b).mean() for b in set(bins)]
    loss = float(cross_entropy(logits.double(), labels))
    return {"val/loss": loss, "val/top1": right.mean(), "val/top5": (places < 5).mean(), "val/ece": sum(gaps)}


def fed(metrics: ValidationMetrics, parts: list[slice]) -> ValidationMetrics:
    logits, labels, numbers = answers()
    for part in parts:
        metrics.update(logits[part], labels[part], numbers[part])
    return metrics


def test_figures_follow_their_definitions_over_uneven_batches() -> None:
    metrics = fed(ValidationMetrics(CLASSES), [slice(0, 40), slice(40, 47), slice(47, COUNT)])
    logits, labels, _ = answers()
    computed = {name: float(value) for name, value in metrics.compute().items()}
    assert computed == pytest.approx(expected(logits, labels), rel=1e-5)
    assert 0 < computed["val/top1"] < computed["val/top5"] < 1
    matrix = metrics.confusion_matrix()
    assert matrix is not None
    assert matrix.sum() == COUNT
    assert matrix[2, 3] == int(((labels == 2) & (logits.argmax(1) == 3)).sum())
    metrics.reset()
    again = fed(metrics, [slice(0, COUNT)]).compute()
    assert float(again["val/top1"]) == pytest.approx(computed["val/top1"]), "something is left after reset"


def test_with_five_classes_there_is_no_top_5() -> None:
    assert "top5" not in ValidationMetrics(5).figures
    assert "top5" in ValidationMetrics(6).figures


def test_an_image_that_cannot_be_read_counts_nowhere() -> None:
    logits, labels, numbers = answers()
    metrics = ValidationMetrics(CLASSES)
    holes = labels.clone()
    holes[::4] = UNREADABLE
    metrics.update(logits, holes, numbers)
    kept = holes != UNREADABLE
    computed = {name: float(value) for name, value in metrics.compute().items()}
    assert computed == pytest.approx(expected(logits[kept], labels[kept]), rel=1e-5)
    assert not {mistake.image for mistake in metrics.worst.compute()} & set(range(0, COUNT, 4))


def test_the_surest_mistakes_are_kept() -> None:
    logits, labels, numbers = answers()
    shares, guess = logits.softmax(-1).max(-1)
    wrong = sorted(((-float(s), int(i)) for s, i, g, t in zip(shares, numbers, guess, labels, strict=True) if g != t))
    metric = WorstMistakes(5)
    for part in (slice(0, 3), slice(3, 60), slice(60, COUNT)):
        metric.update(logits[part].softmax(-1), labels[part], numbers[part])
    found = metric.compute()
    assert [mistake.image for mistake in found] == [image for _, image in wrong[:5]]
    first = found[0]
    assert first == Mistake(first.image, int(labels[first.image]), int(guess[first.image]), pytest.approx(-wrong[0][0]))


def test_no_mistake_is_no_mistake() -> None:
    metric = WorstMistakes(5)
    metric.update(torch.eye(4), torch.arange(4), torch.arange(4))
    assert metric.compute() == []


def measure(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    metrics = fed(ValidationMetrics(CLASSES), [slice(rank, 50, 2)] if rank else [slice(0, 50, 2), slice(50, COUNT)])
    figures = {name: float(value) for name, value in metrics.compute().items()}
    torch.save([figures, metrics.confusion_matrix().tolist(), metrics.worst.compute()], f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_processes_with_uneven_shares_measure_what_one_does(tmp_path: Path) -> None:
    start_processes(measure, (str(tmp_path),), nprocs=2, start_method="fork")  # what is imported stays imported
    alone = fed(ValidationMetrics(CLASSES), [slice(0, COUNT)])
    figures = {name: float(value) for name, value in alone.compute().items()}
    for rank in range(2):
        measured, matrix, mistakes = torch.load(tmp_path / str(rank), weights_only=False)
        assert measured == pytest.approx(figures, rel=1e-5)
        assert matrix == alone.confusion_matrix().tolist()
        assert [tuple(mistake)[:3] for mistake in mistakes] == [tuple(mistake)[:3] for mistake in alone.worst.compute()]


def test_the_matrix_is_drawn_to_scale() -> None:
    matrix = np.array([[8, 2, 0], [0, 5, 5], [0, 0, 0]])
    picture = draw_confusion(matrix, ("cat", "a very long name indeed", "owl"), "title")
    assert picture.dtype == np.uint8
    height, width, _ = picture.shape
    cell = 640 // 3
    left, top = width - 8 - 3 * cell, height - 8 - 3 * cell
    corner = picture[top + 3 :: cell, left + 3 :: cell][:3, :3].astype(int)
    assert corner[2].tolist() == [[255, 255, 255]] * 3, "a class without images is white"
    darkness = 255 - corner[..., 0]
    assert darkness[0].tolist() == pytest.approx([0.8 * 247, 0.2 * 247, 0], abs=1)
    assert darkness[1].tolist() == pytest.approx([0, 0.5 * 247, 0.5 * 247], abs=1)
    assert (picture[:top] < 100).any(), "names and title"


@pytest.mark.parametrize("classes", [2, 30, 100, 1000])
def test_matrices_of_any_size_are_drawn(classes: int) -> None:
    picture = draw_confusion(np.eye(classes, dtype=np.int64), [f"class {n}" for n in range(classes)], "title")
    assert max(picture.shape) < 1200


def test_mistakes_are_drawn_in_a_grid() -> None:
    pixels = np.stack([np.full((3, 8, 8), 30 * number, np.uint8) for number in range(7)])
    picture = draw_mistakes(pixels, [("class cat", "guess dog, 98%")] * 7, "title")
    assert picture.shape == (31 + 2 * 150, 8 + 5 * 120, 3)
    assert picture[31 + 60, 8 + 2 * 120 + 60].tolist() == [60, 60, 60], "the third of the first row"
    assert picture[31 + 150 + 60, 8 + 120 + 60].tolist() == [180, 180, 180], "the second of the second row"
    assert picture[31 + 150 + 60, 8 + 4 * 120 + 60].tolist() == [255, 255, 255], "an empty place"


def test_after_a_reset_the_next_validation_starts_afresh() -> None:
    draw = torch.Generator().manual_seed(0)
    batches = [(torch.randn(30, 8, generator=draw), torch.randint(0, 8, (30,), generator=draw)) for _ in range(2)]
    both, second = ValidationMetrics(8), ValidationMetrics(8)
    for logits, labels in batches:
        both.reset()
        both.update(logits, labels, torch.arange(30))
    second.update(*batches[1], torch.arange(30))
    assert both.compute() == second.compute()
    assert both.worst.compute() == second.worst.compute()
    assert np.array_equal(both.confusion_matrix(), second.confusion_matrix())  # type: ignore[arg-type]


def test_a_loss_that_is_not_a_number_is_not_left_out_of_the_mean() -> None:
    metrics = ValidationMetrics(3)
    logits = torch.zeros(4, 3)
    metrics.update(logits, torch.tensor([0, 1, 2, UNREADABLE]), torch.arange(4))
    assert metrics.compute()["val/loss"] == pytest.approx(math.log(3))
    logits[1] = math.nan
    metrics.update(logits, torch.tensor([0, 1, 2, UNREADABLE]), torch.arange(4))
    assert bool(metrics.loss.compute().isnan())
