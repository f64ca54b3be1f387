"""Lion for PyTorch, right in bf16, with a Lightning guard and the recipes to compare it.

`from lion_lightning import Lion, LionMixin, LionGuard, from_adamw` is the front door. Importing the package needs torch
alone: Lightning is loaded when `LionGuard`, `LionMixin` or `GradientRelease` is first touched, and never by `Lion`.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["GradientRelease", "Lion", "LionGuard", "LionMixin", "from_adamw", "release_gradients"]

if TYPE_CHECKING:
    from lion_lightning.guard.callback import LionGuard
    from lion_lightning.hyperparams import from_adamw
    from lion_lightning.lightning import GradientRelease, LionMixin
    from lion_lightning.optim import Lion, release_gradients

_CHECKOUT = Path(__file__).resolve().parent.parent


class _BesideThePackage(importlib.abc.MetaPathFinder):
    """Finds `recipes/` and `conf/`, which a wheel has in this folder, beside it in a checkout."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname not in (f"{__name__}.recipes", f"{__name__}.conf"):
            return None
        return importlib.machinery.PathFinder.find_spec(fullname, [str(_CHECKOUT)])


if (_CHECKOUT / "conf" / "train.yaml").is_file():
    sys.meta_path.insert(0, _BesideThePackage())

_HOMES = {
    "GradientRelease": "lion_lightning.lightning",
    "Lion": "lion_lightning.optim",
    "LionGuard": "lion_lightning.guard.callback",
    "LionMixin": "lion_lightning.lightning",
    "from_adamw": "lion_lightning.hyperparams",
    "release_gradients": "lion_lightning.optim",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
