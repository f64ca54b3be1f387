"""Secrets out of whatever a run keeps: by the name of the setting, by the look of the value, and in URLs."""

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

HIDDEN = "(hidden)"
# Names of settings that hold secrets: whole words of the name, so that `max_tokens` and `monkey` are none.
_SECRET_WORDS = frozenset(
    {"secret", "secrets", "password", "passwd", "passphrase", "credential", "credentials"}
    | {"token", "apikey", "authorization", "bearer", "cookie"}
)
_SECRET_PAIRS = frozenset((first, "key") for first in ("api", "access", "private", "secret", "auth"))
_PINS = frozenset({"revision", "commit", "sha", "sha1", "fingerprint"})  # 40 hexadecimal digits, and no secret
# What tokens look like: W&B (also wandb_v1_), Hugging Face, GitHub, OpenAI and Anthropic, AWS, Google, Slack, JWT.
_TOKENS = re.compile(
    r"wandb_v\d_[A-Za-z0-9_]{20,}|\b[0-9a-f]{40}\b|hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_[A-Za-z0-9_]{20,}|sk-[A-Za-z0-9_-]{20,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|AIza[A-Za-z0-9_-]{30,}"
    r"|xox[abprs]-[A-Za-z0-9-]{10,}|eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*"
)
_USER_INFO = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_QUERY = re.compile(r"(?i)(?<=[?&;])((?:[\w-]*(?:token|key|secret|signature|password|sig))=)[^&#\s]+")
_OVERRIDE = re.compile(r"[+~]*(?P<name>[\w./@-]+)=(?P<value>.*)", re.DOTALL)


def redacted(value: Any, name: str = "") -> Any:
    """`value` with every secret in it replaced, at any depth.

    Args:
        value: a plain configuration: dicts, lists and scalars.
        name: the setting it belongs to; one such as `api_key` hides a string whatever it looks like.
    """
    if isinstance(value, Mapping):
        return {key: redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redacted(item, name) for item in value)
    if value is None or isinstance(value, bool) or name in _PINS:
        return value
    if names_a_secret(name):
        return HIDDEN
    return redacted_text(value) if isinstance(value, str) else value


def redacted_text(text: str) -> str:
    """`text` without tokens, URL user information and secret query parameters."""
    hidden = _TOKENS.sub(HIDDEN, _USER_INFO.sub(HIDDEN, text))
    return _QUERY.sub(rf"\1{HIDDEN}", hidden)


def redacted_argument(argument: str) -> str:
    """A command-line override with its secret hidden: by the last part of its name, or by the look of its value."""
    found = _OVERRIDE.fullmatch(argument)
    name = re.split(r"[./@]", found["name"])[-1] if found else ""
    if found and names_a_secret(name):
        return argument[: found.start("value")] + HIDDEN
    return argument if name in _PINS else redacted_text(argument)


def names_a_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret, in snake, kebab or camel case."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().replace("-", "_").split("_")
    return bool(_SECRET_WORDS.intersection(words)) or any(pair in _SECRET_PAIRS for pair in pairwise(words))
