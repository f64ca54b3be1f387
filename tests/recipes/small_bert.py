"""A masked language model of a few thousand weights."""

from functools import partial
from typing import Any

import torch
from transformers import BertConfig, PretrainedConfig

from lion_lightning.hyperparams import cosine
from lion_lightning.optim import Lion
from lion_lightning.recipes.bert_mlm.data import TextBlocks
from lion_lightning.recipes.bert_mlm.masking import Masking
from lion_lightning.recipes.bert_mlm.module import BertMLM
from lion_lightning.recipes.text.model import ModelOptions

LENGTH = 32  # tokens in a block of the fixture `blocks`


def build(
    data: TextBlocks,
    seed: int = 1,
    rate: float = 0.15,
    unit: str = "token",
    kind: type[PretrainedConfig] = BertConfig,
    options: ModelOptions | None = None,
    **sizes: Any,
) -> BertMLM:
    """Two layers of width 32 with the same weights each time."""
    torch.manual_seed(0)
    tiny = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    config = kind(**(tiny | sizes))
    masking, options = Masking(rate=rate, unit=unit), options or ModelOptions()
    return BertMLM(config, data, partial(Lion, lr=1e-3), cosine, masking, seed=seed, options=options).eval()


def batch_of(data: TextBlocks, count: int = 4) -> dict[str, torch.Tensor]:
    """The first validation blocks."""
    return data.val_set.__getitems__([(index, index) for index in range(count)])
