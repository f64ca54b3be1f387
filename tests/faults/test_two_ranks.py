"""Two real processes over gloo: a fault on one of them, the same decision on both."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.faults.two_ranks import run
from tests.processes import run_python_together

LIMIT_SECONDS = 240


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module", params=["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def outcomes(request: pytest.FixtureRequest, root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two processes reports of its run with each fault."""
    folder, port = tmp_path_factory.mktemp(request.param), str(free_port())
    torchrun = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2"}
    answers = run_python_together(
        [["-m", "tests.faults.two_ranks", request.param, str(folder / f"{rank}.json")] for rank in "01"],
        root,
        [{**os.environ, **torchrun, "RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": "0"} for rank in "01"],
        LIMIT_SECONDS,
    )
    for rank, answer in enumerate(answers):
        assert answer.returncode == 0, f"rank {rank}:\n{answer.stderr[-4000:]}"
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.distributed
def test_a_nan_on_one_rank_is_skipped_by_both_and_the_rank_is_named(outcomes: list[Any]):
    first, second = (outcome["nan"] for outcome in outcomes)
    assert first == second  # weights and diaries
    (event,) = (event for event in first["events"] if event[1] == "nonfinite")
    assert event[0] == 41
    assert "rank 1" in event[2]
    assert "skipped" in event[3]
    assert all(weight == weight for weight in first["weights"])
    assert first["batch"] == 64


@pytest.mark.distributed
def test_every_rank_judges_by_the_norm_of_the_whole(outcomes: list[Any]):
    """Two processes see the gradient norms that one process sees, and clip the same outlier."""
    alone, two = run("one", "outlier", 1), outcomes[0]["outlier"]
    assert two == outcomes[1]["outlier"]
    assert two["norms"] == pytest.approx(alone["norms"], rel=1e-3)
    assert [event[:2] for event in two["events"]] == [event[:2] for event in alone["events"]]
    assert [41, "outlier"] in [event[:2] for event in two["events"]]
