"""Text models: how they are computed, the checkpoint they start from, and their cost in FLOPs."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available

from lion_lightning.errors import ConfigError, check_flag

from .tokenizer import existing, load_tokenizer, opening

Function = TypeVar("Function", bound=Callable[..., Any])
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
log = logging.getLogger(__name__)
SETTING = "model.pretrained"
# From the states of an encoder to scores over the vocabulary, by `transformers` model type.
VOCABULARY_HEADS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "bert": lambda model, states: model.cls(states),
    "modernbert": lambda model, states: model.decoder(model.head(states)),
}


@dataclass(frozen=True)
class ModelOptions:
    """Options of every text model.

    Attributes:
        pretrained: a checkpoint to continue from (see `load_model`), which also gives the configuration; None starts
            from scratch.
        compile: whether `torch.compile` turns forward, head and loss into one graph; or the name of its backend.
        activation_checkpointing: keep only the inputs of each layer for the backward pass, and compute the rest again:
            less memory, about a third more work.
        attention: sdpa, eager or flash_attention_2 (flash-attn and a GPU), which computes ModernBERT's local
            layers within their window alone and leaves out padding.
        within_documents: tokens of a packed block see their own document only.

    Raises:
        ConfigError: a value that is not allowed, or attention that this machine does not have.
    """

    pretrained: str | None = None
    compile: bool | str = False
    activation_checkpointing: bool = False
    attention: str = "sdpa"
    within_documents: bool = False

    def __post_init__(self) -> None:
        for name in ("activation_checkpointing", "within_documents"):
            check_flag(f"model.{name}", getattr(self, name))
        # Only where one is named: the list comes with the whole of torch's compiler.
        if not isinstance(self.compile, bool) and self.compile not in torch.compiler.list_backends(exclude_tags=()):
            raise ConfigError(
                f"model.compile must be true, false or a backend such as inductor or aot_eager, got {self.compile!r}"
            )
        if self.attention not in ATTENTIONS:
            raise ConfigError(f"model.attention must be one of {', '.join(ATTENTIONS)}, got {self.attention!r}")
        if self.attention == "flash_attention_2" and not is_flash_attn_2_available():
            raise ConfigError("model.attention=flash_attention_2 needs a GPU and the flash-attn package; try sdpa")

    def compiled(self, function: Function, dynamic: bool | None = None) -> Function:
        """`function`, compiled if `compile` is set.

        Args:
            function: not a method, with the model as an argument: so a copy of the module computes with the copy's
                weights, and the names in checkpoints are the same with and without compiling.
            dynamic: False makes one graph for each shape, the fastest; None makes one for the first shape and one for
                all others.
        """
        if not self.compile:
            return function
        backend = "inductor" if self.compile is True else self.compile
        return torch.compile(function, backend=backend, dynamic=dynamic)  # type: ignore[return-value]

    def apply(self, model: Any) -> Any:
        """`model` with activation checkpointing, if it is set."""
        if self.activation_checkpointing:
            old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"  # `transformers` renamed it
            getattr(model, new if hasattr(model, new) else old)({"use_reentrant": False})
            model.config.use_cache = False  # otherwise each recomputed layer warns that it does without a cache
        return model


def document_inputs(config: PretrainedConfig, input_ids: Tensor, separator: int) -> dict[str, Any]:
    """What keeps the documents of packed blocks apart in the encoder: `separator` ends each.

    Positions start again with each document, since those a BERT learns are places in a document.

    Args:
        config: of a BERT or a ModernBERT.
        input_ids: int64 (batch, length).
        separator: id of [SEP].

    Returns:
        Keyword arguments of the encoder: `position_ids` (batch, length), and masks (batch, 1, length, length) or, for
        flash attention, where each document begins in the flattened batch.
    """
    ends = input_ids == separator
    number = ends.cumsum(1) - ends.long()  # of the document in its block
    place = torch.arange(input_ids.shape[1], device=input_ids.device)
    first = torch.ones_like(ends)
    first[:, 1:] = ends[:, :-1]
    position_ids = place - torch.where(first, place, 0).cummax(1).values
    if config._attn_implementation == "flash_attention_2":
        starts = first.flatten().nonzero().flatten().to(torch.int32)
        bounds = torch.cat([starts, starts.new_tensor([first.numel()])])
        return {
            "position_ids": position_ids,
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": input_ids.shape[1],
            "max_length_k": input_ids.shape[1],
        }
    same = (number[:, None, :, None] == number[:, None, None, :]).contiguous()
    if config.model_type != "modernbert":
        return {"position_ids": position_ids, "attention_mask": _for(config, same)}
    near = (place[:, None] - place[None, :]).abs() <= config.sliding_window
    masks = {"full_attention": _for(config, same), "sliding_attention": _for(config, same & near)}
    return {"position_ids": position_ids, "attention_mask": masks}


def _for(config: PretrainedConfig, mask: Tensor) -> Tensor:
    """Eager attention adds its mask to the scores; SDPA takes a boolean one."""
    if config._attn_implementation != "eager":
        return mask
    return torch.zeros((), device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)


def load_model(auto_class: Any, place: str, config: PretrainedConfig, attention: str) -> Any:
    """The model of the checkpoint at `place` in float32; what its head lacks is drawn afresh and named in a warning.

    Args:
        auto_class: such as `AutoModelForMaskedLM`.
        place: folder or name.
        config: that of the checkpoint; sizes of the head may have been changed.
        attention: the `attn_implementation`.

    Raises:
        ConfigError: the files cannot be read, or weights of the encoder are missing.
    """
    with opening(SETTING, place), _quiet():
        model, found = auto_class.from_pretrained(
            existing(SETTING, place),
            config=config,
            attn_implementation=attention,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # the warning below names them
            output_loading_info=True,
        )
    drawn = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    encoder = [key for key in drawn if key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in key]
    if encoder:
        raise ConfigError(f"{SETTING}={place}: {len(encoder)} weights of the encoder are missing, such as {encoder[0]}")
    if drawn:
        log.warning("%s: drawn afresh, since the checkpoint has none that fits: %s", place, ", ".join(drawn))
    return model.train()  # it is loaded in evaluation mode, without dropout and activation checkpointing


def check_vocabulary(place: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """ConfigError if ids of `tokenizer` have no embedding in the checkpoint, or stand for other words there.

    For a checkpoint without a tokenizer only the size can be checked.
    """
    if len(tokenizer) > config.vocab_size:
        raise ConfigError(
            f"{SETTING}={place} has embeddings for {config.vocab_size:,} tokens, and the data's tokenizer has "
            f"{len(tokenizer):,}; set data.tokenizer={place}"
        )
    try:
        own = load_tokenizer(place, setting=SETTING)
    except ConfigError as error:
        log.warning("the tokenizer of the data cannot be compared with the model's: %s", error)
        return
    if own.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"{SETTING}={place} has another vocabulary than the data's tokenizer: the words would be mixed up; "
            f"set data.tokenizer={place}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the library's table of missing weights; `load_model` warns of them in one line."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def usable_config(
    recipe: str, config: PretrainedConfig, sequence_length: int, options: ModelOptions
) -> PretrainedConfig:
    """The configuration of `options.pretrained`, or else `config`.

    Raises:
        ConfigError: nothing is at `options.pretrained`, or it cannot be read; `recipe` does not support the type of the
            model, or it takes fewer tokens than `sequence_length`.
    """
    place, allowed = options.pretrained, " or ".join(VOCABULARY_HEADS)
    if place:
        with opening(SETTING, place):
            config = AutoConfig.from_pretrained(existing(SETTING, place))
    if config.model_type not in VOCABULARY_HEADS:
        raise ConfigError(
            f"{SETTING}={place} is a model of type {config.model_type}, not {allowed}"
            if place
            else f"recipe={recipe} needs a model of type {allowed}, not {config.model_type}; try model=bert_mini"
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
        config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
        config.bos_token_id = config.cls_token_id = tokenizer.cls_token_id
        config.eos_token_id = config.sep_token_id = tokenizer.sep_token_id
        model = auto_class.from_config(config, attn_implementation=options.attention)
    return options.apply(model)


def model_flops(model: Any, tokens: int, head_rows: int) -> int:
    """Floating-point operations of forward and backward for one sequence, as model FLOPs utilisation counts them.

    Multiplying by a matrix takes 2 operations a weight and row forward, and twice that backward; attention takes
    `2 * hidden_size` a pair of tokens that see each other for the scores, and as much for the values. Local layers are
    counted within their window, whatever the kernel does. Left out are normalisation, activation functions, the softmax
    and whatever is computed twice (Chowdhery et al., 2022, arXiv:2204.02311, appendix B).

    Args:
        model: a BERT or ModernBERT of `transformers` with a head.
        tokens: length of the sequence.
        head_rows: how many of them go through the head.
    """
    pooler = getattr(model.base_model, "pooler", None)  # works on one token, like a head
    encoder = _matrix_weights(model.base_model) - (_matrix_weights(pooler) if pooler is not None else 0)
    head = _matrix_weights(model) - encoder
    config = model.config
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    pairs = sum(_pairs(tokens, config.sliding_window if kind == "sliding_attention" else tokens) for kind in types)
    return 6 * (encoder * tokens + head * head_rows) + 12 * config.hidden_size * pairs


def _matrix_weights(module: nn.Module) -> int:
    linear = (layer for layer in module.modules() if isinstance(layer, nn.Linear))
    return sum(layer.in_features * layer.out_features for layer in linear)


def _pairs(tokens: int, window: int) -> int:
    """Pairs of tokens that see each other in a layer where a token sees `window` tokens to either side."""
    if window >= tokens - 1:
        return tokens * tokens
    return tokens * (2 * window + 1) - window * (window + 1)
