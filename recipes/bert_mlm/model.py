"""The masked language model: built for the data, its scores and loss on hidden tokens alone, and its work in FLOPs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PretrainedConfig, PreTrainedTokenizerBase

from lion_lightning.errors import ConfigError
from recipes.bert_mlm.data import TextBlocks
from recipes.bert_mlm.loss import mean_cross_entropy
from recipes.bert_mlm.masking import IGNORED
from recipes.bert_mlm.options import ModelOptions, document_inputs
from recipes.bert_mlm.pretrained import check_vocabulary, load_model, read_config

# From the states of an encoder to scores over the vocabulary, by `transformers` model type.
VOCABULARY_HEADS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "bert": lambda model, states: model.cls(states),
    "modernbert": lambda model, states: model.decoder(model.head(states)),
}


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


def usable_config(
    recipe: str, config: PretrainedConfig, sequence_length: int, options: ModelOptions
) -> PretrainedConfig:
    """The configuration of `options.pretrained`, or else `config`.

    Raises:
        ConfigError: `recipe` does not know the type of the model, or it takes fewer tokens than `sequence_length`.
    """
    if options.pretrained:
        config = read_config(options.pretrained, VOCABULARY_HEADS)
    if config.model_type not in VOCABULARY_HEADS:
        raise ConfigError(
            f"recipe={recipe} needs a model of type {' or '.join(VOCABULARY_HEADS)}, not {config.model_type}; "
            "try model=bert_mini"
        )
    if sequence_length > config.max_position_embeddings:
        raise ConfigError(
            f"data.sequence_length={sequence_length} is longer than the model's {config.max_position_embeddings} "
            "positions"
        )
    return config


def load_or_build(
    auto_class: Any, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, options: ModelOptions
) -> Any:
    """The model of `config`: with the weights of `options.pretrained`, or from scratch for the tokenizer.

    Raises:
        ConfigError: the checkpoint has another vocabulary, or cannot be read.
    """
    if options.pretrained:
        check_vocabulary(options.pretrained, config, tokenizer)
        model = load_model(auto_class, options.pretrained, config, options.attention)
    else:
        _match_vocabulary(config, tokenizer)
        model = auto_class.from_config(config, attn_implementation=options.attention)
    return options.apply(model)


def _match_vocabulary(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    config.bos_token_id = config.cls_token_id = tokenizer.cls_token_id
    config.eos_token_id = config.sep_token_id = tokenizer.sep_token_id


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
    return mean_cross_entropy(logits.float(), targets.flatten(), IGNORED)


def model_flops(model: Any, tokens: int, head_rows: int) -> int:
    """Floating-point operations of forward and backward for one sequence, as model FLOPs utilisation counts them.

    Multiplying by a matrix takes 2 operations a weight and row forward, and twice that backward; attention takes
    `2 * hidden_size` a pair of tokens that see each other for the scores, and as much for the values. Local layers are
    counted within their window, whatever the kernel does. Left out are normalisation, activation functions, the softmax
    and whatever is computed twice (Chowdhery et al., 2022, arXiv:2204.02311, appendix B).

    Args:
        model: a BERT or ModernBERT of `transformers` with a head.
        tokens: length of the sequence.
        head_rows: so many of them go through the head.
    """
    pooler = getattr(model.base_model, "pooler", None)  # works on one token, like a head
    encoder = _matrix_weights(model.base_model) - (_matrix_weights(pooler) if pooler is not None else 0)
    head = _matrix_weights(model) - encoder
    pairs = sum(_pairs(tokens, window) for window in _windows(model.config))
    return 6 * (encoder * tokens + head * head_rows) + 12 * model.config.hidden_size * pairs


def _matrix_weights(module: nn.Module) -> int:
    linear = (layer for layer in module.modules() if isinstance(layer, nn.Linear))
    return sum(layer.in_features * layer.out_features for layer in linear)


def _windows(config: PretrainedConfig) -> list[int | None]:
    """How far a token sees to either side, for each layer; None is everywhere."""
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [config.sliding_window if kind == "sliding_attention" else None for kind in types]


def _pairs(tokens: int, window: int | None) -> int:
    if window is None or window >= tokens - 1:
        return tokens * tokens
    return tokens * (2 * window + 1) - window * (window + 1)
