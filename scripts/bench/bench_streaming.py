"""The streaming limit of a device: GB/s of reading three fp32 arrays and writing two of them in place."""

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("streaming.c")
BYTES_PER_ELEMENT = 20


class Streaming:
    """The arrays, and the ways to stream over them, by name."""

    def __init__(self, elements: int, device: torch.device) -> None:
        self.arrays = [torch.full((elements,), 1e-3, device=device) for _ in range(3)]
        self.elements = elements
        self.ways: dict[str, Callable[[], None]] = {"torch._fused_sgd_ with momentum": self._fused_sgd}
        self._threads = ThreadPoolExecutor(max(torch.get_num_threads() - 1, 1))
        if device.type == "cpu" and (library := compiled()) is not None:
            self._library = library
            self.ways["streaming.c"] = self._c

    def _fused_sgd(self) -> None:
        param, momentum, grad = self.arrays
        torch._fused_sgd_(
            [param],
            [grad],
            [momentum],
            weight_decay=0.0,
            momentum=0.9,
            lr=1e-9,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )

    def _c(self) -> None:
        following = ctypes.c_long(0)
        pointers = [ctypes.c_void_p(array.data_ptr()) for array in self.arrays]
        arguments = [*pointers, ctypes.c_long(self.elements), ctypes.byref(following)]
        others = [self._threads.submit(self._library.stream, *arguments) for _ in range(torch.get_num_threads() - 1)]
        self._library.stream(*arguments)
        for other in others:
            other.result()


def compiled() -> ctypes.CDLL | None:
    """streaming.c as a library; None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "streaming.so"
        command = [compiler, "-O3", "-fPIC", "-shared", "-ffp-contract=off", "-o", str(path), str(SOURCE)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            return None
        return ctypes.CDLL(str(path))
