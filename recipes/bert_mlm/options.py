"""How a text model is computed: `model.*` beside `model.config`. What is computed stays the same, but for
`within_documents`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.utils import is_flash_attn_2_available

from lion_lightning.errors import ConfigError

Function = TypeVar("Function", bound=Callable[..., Any])
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")


@dataclass(frozen=True)
class ModelOptions:
    """Options of every text model.

    Attributes:
        pretrained: a checkpoint to go on from (see `pretrained`), whose configuration and tokenizer count then; None
            starts from scratch.
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
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"model.{name} must be true or false, got {getattr(self, name)!r}")
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
        """`function`, compiled if that is wanted.

        Args:
            function: not a method, with the model as an argument: so a copy of the module computes with the copy's
                weights, and the names in checkpoints are the same with and without.
            dynamic: False makes one graph for each shape, the fastest; None makes one for the first shape and one for
                all others.
        """
        if not self.compile:
            return function
        backend = "inductor" if self.compile is True else self.compile
        return torch.compile(function, backend=backend, dynamic=dynamic)  # type: ignore[return-value]

    def apply(self, model: Any) -> Any:
        """`model` with activation checkpointing, if that is wanted."""
        if self.activation_checkpointing:
            old, new = (
                "gradient_checkpointing_enable",
                "activation_checkpointing_enable",
            )  # its new name
            getattr(model, new if hasattr(model, new) else old)({"use_reentrant": False})
            model.config.use_cache = False  # else a layer that is computed again logs that it does without
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
