"""What preparing a corpus took is given back before there is a model."""

import ctypes
import resource
import sys
from pathlib import Path

import pytest

import lion_lightning.recipes.text.blocks as tokens_module
from lion_lightning.data.cache import release_freed_memory
from lion_lightning.recipes.text.blocks import prepare_blocks
from tests.recipes.listed import SETTINGS, Listed


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc's malloc_trim"
)
def test_freed_memory_goes_back_to_the_machine() -> None:
    pieces = [bytes(4096) for _ in range(40_000)]  # 156 MiB in pieces that the C library keeps
    last = [bytes(4096) for _ in range(16)]  # above them on the heap: nothing goes back by itself
    del pieces
    before = resident_mib()
    release_freed_memory()
    assert before - resident_mib() > 100
    del last


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def test_it_is_given_back_when_blocks_were_made_and_not_when_they_are_reused(
    documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back: list[int] = []
    monkeypatch.setattr(tokens_module, "release_freed_memory", lambda: given_back.append(1))
    for _ in range(2):
        prepare_blocks([Listed(documents)], SETTINGS, tmp_path)
        assert given_back == [1]
