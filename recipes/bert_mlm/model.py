"""The masked language model: built for the data, with scores and loss on hidden tokens alone.

Torch's cross-entropy keeps the scores, their log-probabilities and two gradients of that size: four times 38 MiB for 64
blocks of 128 tokens and 8,192 words. On a CPU `mean_cross_entropy` needs only one of the four, and its numbers equal
those of torch's function bit for bit: it calls the same kernels on a few rows at a time, and each row is computed
separately.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMaskedLM, PretrainedConfig

from lion_lightning.errors import ConfigError

from ..text.model import VOCABULARY_HEADS, ModelOptions, document_inputs, load_or_build, usable_config
from .data import TextBlocks
from .masking import IGNORED

VALUES_AT_ONCE = 2**18  # a megabyte, which stays in a processor's cache
_MEAN = 1  # torch's number for reduction="mean"


def build_model(config: PretrainedConfig, data: TextBlocks, options: ModelOptions) -> Any:
    """The masked language model of `config`, or of `options.pretrained`, for the data's vocabulary and length.

    Raises:
        ConfigError: the data is no text; the configuration has no masked-LM head, too few positions for the blocks or,
            of a checkpoint, another vocabulary.
    """
    if not isinstance(data, TextBlocks):
        raise ConfigError(f"recipe=bert_mlm trains on text, not on {type(data).__name__}; try data=python_docs")
    config = usable_config("bert_mlm", config, data.settings.sequence_length, options)
    model = load_or_build(AutoModelForMaskedLM, config, data.ready.tokenizer, options)
    if not options.pretrained:
        with torch.no_grad():
            # Start from the corpus' word frequencies instead of learning them: a sign optimizer moves a bias by lr a
            # step, and log frequencies span a dozen nats, so a short run would spend itself on this alone.
            model.get_output_embeddings().bias.copy_(data.log_unigram_shares())
    return model


def hidden_logits(model: Any, input_ids: Tensor, positions: Tensor, separator: int | None) -> Tensor:
    """Scores of the hidden tokens: float (batch * hidden, vocabulary).

    Args:
        model: see `build_model`.
        input_ids: int64 (batch, length).
        positions: int64 (batch, hidden).
        separator: id of the token that ends a document, where documents of a block must not see each other.
    """
    apart = {} if separator is None else document_inputs(model.config, input_ids, separator)
    states = model.base_model(input_ids, **apart).last_hidden_state
    rows = positions.unsqueeze(-1).expand(-1, -1, states.shape[-1])
    return VOCABULARY_HEADS[model.config.model_type](model, states.gather(1, rows).flatten(0, 1))


def hidden_loss(model: Any, input_ids: Tensor, positions: Tensor, targets: Tensor, separator: int | None) -> Tensor:
    """Mean cross-entropy in nats of the hidden tokens, whose `targets` are int64 (batch, hidden)."""
    logits = hidden_logits(model, input_ids, positions, separator)
    return mean_cross_entropy(logits.float(), targets.flatten())


def mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the rows whose target is not `IGNORED`.

    On a CPU the memory of `logits` is overwritten: they cannot be read afterwards, and a second backward is an error.

    Args:
        logits: float32 (rows, vocabulary), no leaf.
        targets: int64 (rows,).
    """
    if torch.compiler.is_compiling() or logits.device.type != "cpu" or not logits.requires_grad or logits._is_view():
        return cross_entropy(logits, targets, ignore_index=IGNORED)
    loss, _ = _MeanCrossEntropy.apply(logits, targets)
    return loss


def row_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each row, 0 where the target is `IGNORED`: float32 (rows,).

    Args:
        logits: floating-point (rows, vocabulary); no gradient goes back to them.
        targets: int64 (rows,).
    """
    size = _rows_at_once(logits) if logits.device.type == "cpu" else len(logits)
    parts = zip(logits.split(size), targets.split(size), strict=True)
    losses = [cross_entropy(rows.float(), wanted, ignore_index=IGNORED, reduction="none") for rows, wanted in parts]
    return torch.cat(losses)


class _MeanCrossEntropy(torch.autograd.Function):
    """Turns the scores into log-probabilities in place, and these into the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        for rows in logits.split(_rows_at_once(logits)):
            rows.copy_(torch.log_softmax(rows, 1))
        loss, count = torch.ops.aten.nll_loss_forward(logits, targets, None, _MEAN, IGNORED)
        ctx.mark_dirty(logits)
        ctx.save_for_backward(logits, targets, count)
        ctx.set_materialize_grads(False)
        return loss, logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor, _: None) -> tuple[Tensor, None]:
        logs, targets, count = ctx.saved_tensors
        size = _rows_at_once(logs)
        for rows, wanted in zip(logs.split(size), targets.split(size), strict=True):
            of_logs = torch.ops.aten.nll_loss_backward(of_loss, rows, wanted, None, _MEAN, IGNORED, count)
            rows.copy_(torch.ops.aten._log_softmax_backward_data(of_logs, rows, 1, rows.dtype))
        return logs, None


def _rows_at_once(logits: Tensor) -> int:
    return max(1, VALUES_AT_ONCE // logits.shape[1])
