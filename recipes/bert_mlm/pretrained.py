"""Models from a checkpoint: a folder that `save_pretrained` wrote (such as a run's `export/`), or a name on the hub.

Everything that can be wrong with one is told in a line, before anything is trained.
"""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from lion_lightning.errors import ConfigError

log = logging.getLogger(__name__)
SETTING = "model.pretrained"


def read_config(place: str, allowed: Collection[str]) -> PretrainedConfig:
    """The configuration of the checkpoint at `place`.

    Raises:
        ConfigError: nothing is there, it cannot be read, or its model type is none of `allowed`.
    """
    with _opening(place):
        config = AutoConfig.from_pretrained(existing(place))
    if config.model_type not in allowed:
        raise ConfigError(f"{SETTING}={place} is a model of type {config.model_type}, not {' or '.join(allowed)}")
    return config


def load_model(auto_class: Any, place: str, config: PretrainedConfig, attention: str) -> Any:
    """The model of the checkpoint at `place` in float32; what its head lacks is drawn afresh and named in a warning.

    Args:
        auto_class: such as `AutoModelForMaskedLM`.
        place: folder or name.
        config: see `read_config`; sizes of the head may have been changed.
        attention: the `attn_implementation`.

    Raises:
        ConfigError: the files cannot be read, or weights of the encoder are missing.
    """
    with _opening(place), _quiet():
        model, found = auto_class.from_pretrained(
            existing(place),
            config=config,
            attn_implementation=attention,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # told below, by name
            output_loading_info=True,
        )
    drawn = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    encoder = [key for key in drawn if key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in key]
    if encoder:
        raise ConfigError(f"{SETTING}={place}: {len(encoder)} weights of the encoder are missing, such as {encoder[0]}")
    if drawn:
        log.warning("%s: drawn afresh, since the checkpoint has none that fits: %s", place, ", ".join(drawn))
    return model.train()  # the library gives it for use, without dropout and without activation checkpointing


def load_tokenizer(
    place: str, roles: Collection[str] = ("cls_token", "sep_token", "pad_token"), setting: str = "data.tokenizer"
) -> PreTrainedTokenizerBase:
    """The tokenizer kept at `place`, which `setting` gave.

    Raises:
        ConfigError: there is none, or it has no token for one of `roles`.
    """
    with _opening(place, setting):
        tokenizer = AutoTokenizer.from_pretrained(existing(place, setting))
    missing = [role for role in roles if getattr(tokenizer, role, None) is None]
    if missing or len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ConfigError(
            f"{setting}={place} has no tokenizer that a BERT can use ({', '.join(missing) or 'it is empty'})"
        )
    return tokenizer


def check_vocabulary(place: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """ConfigError if `tokenizer` has ids that the checkpoint has no embedding for, or gives words other ids than its.

    A checkpoint without a tokenizer is taken at its word: only the size can be checked then.
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
            f"{SETTING}={place} knows other tokens than the data's tokenizer: its weights would mean nothing; "
            f"set data.tokenizer={place}"
        )


def existing(place: str, setting: str = SETTING) -> str:
    """`place` as the library wants it: a folder that is there, or a name as the hub has them (`name`, `owner/name`).

    Raises:
        ConfigError: it can only be meant as a folder, and there is none.
    """
    folder = Path(place).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.exists():
        raise ConfigError(f"{setting}={place} is a file; give the folder it is in")
    if place.count("/") > 1 or place.startswith((".", "~", "/")):
        raise ConfigError(f"{setting}={place}: there is no such folder")
    return place


@contextmanager
def _opening(place: str, setting: str = SETTING) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{setting}={place} cannot be opened, as a folder or from the hub: {reason}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's table of missing weights: what matters of it is told in one line."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
