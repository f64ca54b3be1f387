"""Building objects from `_target_` nodes, from an allowlist.

Hydra's own blocklist lets `torch.load` through, so a config from a stranger could run code. Here a `_target_` must
*resolve* to a class or function that was defined in one of our packages or in a library a recipe is made of: an alias
of `os.system` inside an allowed module is refused, because what counts is where the object was defined.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import hydra
from omegaconf import DictConfig, ListConfig, OmegaConf

from lion_lightning.errors import ConfigError

LABEL = "name"  # every group file has one: a label for people and run names, never an argument
ALLOWED_MODULES = (
    "lion_lightning.",
    "recipes.",
    "torch.optim.",
    "torch.nn.",
    "transformers.models.",
    "lightning.pytorch.callbacks.",
    "lightning.pytorch.loggers.",
)


def instantiate(node: DictConfig | Mapping[str, Any], **overrides: Any) -> Any:
    """Build what `node["_target_"]` names, with the node's other keys and `overrides` as keyword arguments.

    Args:
        node: a config node with `_target_`, optionally `_partial_: true`. Nested `_target_` nodes are built first.
        overrides: keyword arguments that are passed as they are: never converted, never searched for targets.

    Raises:
        ConfigError: a target that does not exist, is not on the allowlist, or does not take one of the arguments.
    """
    plain = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else dict(node)
    return _build(plain, overrides)


def _build(value: Any, overrides: Mapping[str, Any] | None = None) -> Any:
    if isinstance(value, list | ListConfig):
        return [_build(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "_target_" not in value:
        return {key: _build(item) for key, item in value.items()}
    target = resolve(value["_target_"])
    arguments = {key: _build(item) for key, item in value.items() if key not in ("_target_", "_partial_", LABEL)}
    arguments.update(overrides or {})
    _check_arguments(target, arguments, value["_target_"], partial=bool(value.get("_partial_")))
    return functools.partial(target, **arguments) if value.get("_partial_") else target(**arguments)


def resolve(path: str) -> Callable[..., Any]:
    """The class or function that `path` names, if it is on the allowlist; ConfigError if not."""
    if not isinstance(path, str):
        raise ConfigError(f"_target_={path!r} cannot be imported: it must be the dotted name of a class or function")
    if path.split(".")[0] not in {module.split(".")[0] for module in ALLOWED_MODULES}:
        raise _refusal(path)  # before it is imported: an import runs code
    try:
        target = hydra.utils.get_object(path)
    except Exception as error:
        raise ConfigError(f"_target_={path!r} cannot be imported: {error}".splitlines()[0]) from error
    home = f"{getattr(target, '__module__', None)}."
    if not (inspect.isclass(target) or inspect.isfunction(target)) or not home.startswith(ALLOWED_MODULES):
        raise _refusal(path)
    return target


def _refusal(path: str) -> ConfigError:
    allowed = ", ".join(module.rstrip(".") for module in ALLOWED_MODULES)
    return ConfigError(f"_target_={path!r} is not allowed: it must be a class or function defined in {allowed}")


def _check_arguments(target: Callable[..., Any], arguments: Mapping[str, Any], path: str, partial: bool) -> None:
    signature = inspect.signature(target)
    try:
        signature.bind_partial(**arguments) if partial else signature.bind(**arguments)
    except TypeError as error:
        allowed = ", ".join(name for name in signature.parameters if name != "self")
        raise ConfigError(f"{path}: {error}; it takes {allowed}") from error
