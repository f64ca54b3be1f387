"""Memory that is free again, given back to the machine."""

import ctypes
import sys


def release_freed_memory() -> None:
    """Give back what the C library keeps of freed memory, such as that of training a tokenizer; only glibc can.

    It would keep most of it for the rest of the run, in pieces too small for the tensors that come then.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
