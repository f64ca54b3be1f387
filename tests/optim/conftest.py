"""One thread each: OpenMP threads of parallel test workers wait for one another by spinning."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def single_thread() -> None:
    torch.set_num_threads(1)
