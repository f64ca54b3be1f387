"""Host memory of training on a CPU: what a step frees is kept for the next one."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of mallopt, from glibc's malloc.h."""
NEVER, NONE = -1, 0


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed, for as long as the process lives.

    Left alone, glibc maps the memory of a large tensor anew for each operation and gives it back afterwards, and the
    system clears every page that it hands out: a tenth of a training step of BERT-mini on two cores. Kept, the process
    never gets smaller; how large it gets at most is the same but for gaps between blocks.

    Returns:
        Whether that is so now; False where the C library is not glibc, and nothing was changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, NONE) and mallopt(M_TRIM_THRESHOLD, NEVER))
