"""The libraries of a run, loaded without what they import and a run does not use: 177 MiB, a second of 5.6.

`torchmetrics` imports `scipy.signal` for a patch and `matplotlib` for type hints, `transformers` imports
`scipy.optimize` for the losses of object detection, and `torch._dynamo` imports `triton`, which is for GPUs. The first
three are stood in for while those libraries load, by modules that load the real ones as soon as somebody asks for more
of them. Afterwards every import is as it always was, but that `scipy.signal.hamming`, which `torchmetrics` adds for a
metric of speech, is not there.
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

STOOD_IN_FOR = ("matplotlib", "scipy")
FOR_GPUS = "triton"


def load_libraries() -> None:
    """Import Lightning, torchmetrics and transformers, for `train.py`; they may be there already."""
    with _without_triton():
        with _stand_ins():
            importlib.import_module("torchmetrics")
            importlib.import_module("transformers.modeling_utils")
        importlib.import_module("lightning.pytorch")


class _StandIn(ModuleType):
    """A module that has what is `known` of it, and becomes the real one when it is asked for anything else."""

    def __init__(self, name: str, **known: Any) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None, is_package=True)
        self.__dict__.update(known, __path__=[])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__version__":
            raise AttributeError(name)  # `inspect` asks every module for its file
        _withdraw(self.__name__.partition(".")[0])
        return getattr(importlib.import_module(self.__name__), name)


class _Finder(MetaPathFinder):
    """Has the real package stand where a module is imported that has no stand-in."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return find_spec(name) if _withdraw(name.partition(".")[0]) else None


@contextmanager
def _stand_ins() -> Iterator[None]:
    finder = _Finder()
    for name in STOOD_IN_FOR:
        if name not in sys.modules and find_spec(name) is not None:
            sys.modules.update({module.__name__: module for module in _modules(name)})
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in STOOD_IN_FOR:
            _withdraw(name)


def _modules(package: str) -> list[_StandIn]:
    """What `torchmetrics` and `transformers` ask of `package` while they load, and nothing more."""
    if package == "scipy":
        signal = _StandIn("scipy.signal", hamming=_later("scipy.signal.windows", "hamming"))
        optimize = _StandIn("scipy.optimize", linear_sum_assignment=_later("scipy.optimize", "linear_sum_assignment"))
        return [_StandIn("scipy", signal=signal, optimize=optimize), signal, optimize]
    axes = _StandIn("matplotlib.axes", Axes=object)
    colors = _StandIn("matplotlib.colors", Colormap=object)
    pyplot = _StandIn("matplotlib.pyplot", Figure=object, style=SimpleNamespace(context=_style))
    return [_StandIn("matplotlib", axes=axes, colors=colors, pyplot=pyplot), axes, colors, pyplot]


def _withdraw(package: str) -> bool:
    """Take the stand-ins for `package` and its modules away; False if there were none."""
    of_package = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == package}
    names = [name for name, module in of_package.items() if isinstance(module, _StandIn)]
    for name in names:
        del sys.modules[name]
    return bool(names)


def _later(module: str, name: str) -> Callable[..., Any]:
    """The function `name` of `module`, which is imported when it is called."""

    def call(*arguments: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*arguments, **options)

    return call


@contextmanager
def _style(style: Any) -> Iterator[None]:
    """`pyplot.style.context`, as a decorator that loads nothing before what it decorates is called."""
    with importlib.import_module("matplotlib.pyplot").style.context(style):
        yield


@contextmanager
def _without_triton() -> Iterator[None]:
    """Import nothing of triton, on a machine that has nothing to run it on."""
    import torch
    from torch.utils import _triton

    # As Lightning sets it: else asking for GPUs readies CUDA, and processes that are forked later cannot use it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if FOR_GPUS in sys.modules or torch.cuda.is_available() or torch.xpu.is_available():
        yield
        return
    sys.modules[FOR_GPUS] = None  # type: ignore[assignment]  # an import then fails as if it were not installed
    try:
        yield
    finally:
        sys.modules.pop(FOR_GPUS, None)
        _triton.has_triton_package.cache_clear()
