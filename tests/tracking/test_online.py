"""Runs from a server, and a report to it: W&B's own client over a real socket, the server is ours."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb_server import Server, serving

from lion_lightning.commands import compare
from lion_lightning.tracking.compare import Incomparable
from lion_lightning.tracking.report import publish_report

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as server:
        for seed in (1, 2):
            server.add("lion", seed, [3.0, 2.0 + seed / 10])
            server.add("adamw", seed, [3.0, 1.0 + seed / 10])
        server.add("lion", 3, [9.0], state="killed")
        server.add("sgd", 1, [1.0], group="another")
        yield server


MISTAKES = {
    "--wandb me/nothing": "error: --wandb me/nothing: Could not find project nothing",
    "--wandb me/p --group nobody": "error: no run of group nobody in me/p",
    "--wandb me/p": "the runs belong to 2 groups: another (1 runs); g (5 runs)",
}
CALLS = """import sys
from lion_lightning.commands.compare import main
print([main(line.split()) for line in sys.argv[1:]])"""


@pytest.fixture(scope="module")
def called(server: Server, tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """One process with the key of the server: a comparison with its report, then every mistake."""
    good = f"--wandb me/p --group g --report --output {tmp_path_factory.mktemp('report')}"
    command = [sys.executable, "-c", CALLS, good, *MISTAKES]
    environment = {**os.environ, **server.environment()}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True)


def test_a_group_is_fetched_compared_and_published(server: Server, called: subprocess.CompletedProcess[str]) -> None:
    output = " ".join(called.stdout.split())
    assert "adamw is best with 1.1500 ± 0.0707 over 2 seeds" in output
    assert "r-lion-s3 is crashed at step 1" in output
    assert "sgd" not in output
    assert f"W&B report: {server.address}/me/p/reports/" in output
    asked = [variables for query, variables in server.asked if "query Runs(" in query]
    assert {"group": "g"} in [json.loads(variables["filters"]) for variables in asked]
    (report,) = [variables for query, variables in server.asked if "upsertView" in query]
    assert report["type"] == "runs"
    assert "adamw is best" in report["spec"]
    (runset,) = [
        one for block in json.loads(report["spec"])["blocks"] for one in block.get("metadata", {}).get("runSets", [])
    ]
    assert runset["filters"]["filters"] == [
        {"key": {"section": "run", "name": "group"}, "op": "IN", "value": ["g"], "disabled": False}
    ]
    assert [one["name"] for one in runset["grouping"]] == ["optim.value.name"]
    assert plotted(report) >= {("val/loss", "trainer/global_step"), ("val/loss", "perf/seconds")}


def plotted(view: dict[str, Any]) -> set[tuple[str, str]]:
    """Metric and axis of every line plot, wherever in the specification it is."""
    found: set[tuple[str, str]] = set()

    def search(node: Any) -> None:
        if isinstance(node, dict):
            if "metrics" in node and "xAxis" in node:
                found.update((metric, node["xAxis"]) for metric in node["metrics"])
            for value in node.values():
                search(value)
        elif isinstance(node, list):
            for value in node:
                search(value)

    search(json.loads(view["spec"]))
    return found


def test_a_mistake_is_reported_in_one_line(called: subprocess.CompletedProcess[str]) -> None:
    assert called.stdout.splitlines()[-1] == "[0, 2, 2, 2]"
    told = [line for line in called.stderr.splitlines() if line.startswith("error: ")]
    for line, message in zip(told, MISTAKES.values(), strict=True):
        assert message in line


def test_without_a_key_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["--wandb", "me/p"]) == 2
    assert "No API key" in capsys.readouterr().err


def test_a_report_needs_a_project() -> None:
    with pytest.raises(Incomparable, match="--wandb ENTITY/PROJECT"):
        publish_report(None, None)  # type: ignore[arg-type]
