"""The cross-entropy that is computed in place: torch's own to the last bit, in less memory."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from lion_lightning.recipes.bert_mlm import model as loss
from lion_lightning.recipes.bert_mlm.model import mean_cross_entropy, row_cross_entropy

IGNORED = -100
SHAPES = [(1, 7), (50, 33), (97, 1000)]


@pytest.fixture(autouse=True)
def _few_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "VALUES_AT_ONCE", 8_000)  # parts of several rows, of which the last is smaller


def problem(rows: int, vocabulary: int) -> tuple[list[Tensor], Tensor]:
    """States, weights and bias of a head, and targets, of which some do not count."""
    generator = torch.Generator().manual_seed(rows)
    sizes = (rows, 16), (vocabulary, 16), (vocabulary,)
    head = [torch.randn(size, generator=generator).requires_grad_() for size in sizes]
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[3::7] = IGNORED
    return head, targets


@pytest.mark.parametrize(("rows", "vocabulary"), SHAPES)
@pytest.mark.parametrize("share", [1.0, 1 / 3])  # of a batch that is accumulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_torchs_to_the_last_bit(
    rows: int, vocabulary: int, share: float, dtype: torch.dtype
) -> None:
    head, targets = problem(rows, vocabulary)
    expected = cross_entropy(linear(*head).to(dtype).float(), targets, ignore_index=IGNORED)
    gradients = torch.autograd.grad(expected * share, head)
    found = mean_cross_entropy(linear(*head).to(dtype).float(), targets)
    assert torch.equal(found, expected)
    assert all(map(torch.equal, torch.autograd.grad(found * share, head), gradients))


@pytest.mark.parametrize(("rows", "vocabulary"), SHAPES)
def test_the_loss_of_each_row_is_torchs_to_the_last_bit(rows: int, vocabulary: int) -> None:
    head, targets = problem(rows, vocabulary)
    logits = linear(*head).detach()
    kept, before = targets != IGNORED, logits.clone()
    found = row_cross_entropy(logits, targets)
    assert torch.equal(found[kept], cross_entropy(logits[kept], targets[kept], reduction="none"))
    assert not found[~kept].any()
    assert torch.equal(logits, before), "the scores are still needed, for the accuracy"


def test_the_memory_of_the_scores_is_used_for_the_gradient() -> None:
    head, targets = problem(50, 33)
    logits = linear(*head)
    place, gradients = logits.data_ptr(), []
    logits.register_hook(lambda gradient: gradients.append(gradient.data_ptr()))
    mean_cross_entropy(logits, targets).backward()
    assert gradients == [place]


def test_scores_that_are_a_view_are_left_alone() -> None:
    head, targets = problem(50, 33)
    logits = linear(*head)
    before = logits.detach().clone()
    mean_cross_entropy(logits[:, :], targets).backward()
    assert torch.equal(logits, before)


def test_a_second_backward_pass_is_an_error_and_no_wrong_gradient() -> None:
    head, targets = problem(50, 33)
    found = mean_cross_entropy(linear(*head), targets)
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


def test_scores_that_are_not_a_numbers_row_make_the_loss_so() -> None:
    head, targets = problem(50, 33)
    logits = linear(*head)
    logits.data[5, 0] = float("nan")
    assert mean_cross_entropy(logits, targets).isnan()
