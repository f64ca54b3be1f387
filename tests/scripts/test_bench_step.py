"""bench_step.py runs on a tiny model and writes its three files; no timing is asserted."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lion_lightning.optim import Lion
from scripts.bench import bench_step
from scripts.bench.bench_measure import Arena, Clock, Result, _round, attempt, survive
from scripts.bench.bench_models import MODELS
from scripts.bench.bench_peers import MODES, Subject, ours, theirs

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("bench")
    command = ["--model", "tiny", "--repeats", "2", "--steps", "1", "--modes", "fp32", "bf16/32", "bf16/16"]
    command += ["--only", "Lion cpu", "Lion eager", "SGD", "lion-pytorch", "--device", "cpu", "--output", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "lion_pytorch", None)  # missing, whether or not it is installed
        assert bench_step.main(command) == 0
    return folder, json.loads((folder / "bench.json").read_text())


def entry(figures: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in figures["results"] if entry["name"] == name)


def test_the_files_name_every_optimizer(report: tuple[Path, dict[str, Any]]) -> None:
    folder, figures = report
    table = (folder / "bench.md").read_text()
    names = [entry["name"] for entry in figures["results"]]
    assert {"Lion eager fp32", "Lion eager bf16/16", "AdamW fused bf16", "SGD fused fp32"} <= set(names)
    assert "Lion eager bf16/24" not in names
    for name in names:
        assert name in table
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "bench.png" in table
    assert figures["parameters"] == 138_432
    assert figures["versions"]["torch"] == torch.__version__
    assert all(len(entry["times_ms"]) == 2 for entry in figures["results"])
    assert figures["streaming_limit_gb_per_second"] > 0


def test_bytes_moved_are_those_of_the_design(report: tuple[Path, dict[str, Any]]) -> None:
    moved = {entry["name"]: entry["bytes_moved_per_parameter"] for entry in report[1]["results"]}
    expected = {"Lion eager fp32": 20, "Lion eager bf16/32": 14, "Lion eager bf16/16": 10, "AdamW fused fp32": 28}
    for name, figure in expected.items():
        assert moved[name] == pytest.approx(figure, abs=0.01)
    assert entry(report[1], "Lion eager fp32")["bytes_kept_per_parameter"] == pytest.approx(8, abs=0.01)


def test_step_and_decay_survive_in_ours_and_not_in_fused_adamw(report: tuple[Path, dict[str, Any]]) -> None:
    for name in ("Lion eager fp32", "Lion eager bf16/32", "Lion eager bf16/16"):
        assert entry(report[1], name)["step_kept"] == pytest.approx(1, abs=0.02)
        assert entry(report[1], name)["decay_kept"] == pytest.approx(1, abs=0.03)
    assert entry(report[1], "AdamW fused bf16")["decay_kept"] == 0.0
    assert entry(report[1], "AdamW fused fp32")["decay_kept"] == pytest.approx(1, abs=0.01)


def test_a_missing_peer_is_named_and_skipped(report: tuple[Path, dict[str, Any]]) -> None:
    skipped = {item["name"]: item for item in report[1]["skipped"]}
    assert skipped["lion-pytorch bf16"]["missing"] is True
    assert "lion-pytorch fp32: lion_pytorch is not installed" in (report[0] / "bench.md").read_text()


def test_a_peer_that_crashes_is_named_with_its_error() -> None:
    def crash() -> Any:
        raise RuntimeError("no such kernel")

    result = Result(theirs("peer", "Peer", crash)[0])
    attempt(result, lambda result: _round(result, Arena([(4, 4)], CPU), Clock(CPU), 1))
    assert result.error == "RuntimeError: no such kernel"
    assert not result.missing


def test_what_survives_tells_a_broken_lion() -> None:
    class Backwards(Lion):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for param in group["params"]:
                    param.grad = -param.grad
            return super().step(closure)

    def make(params: Any, lr: float, decay: float) -> Backwards:
        return Backwards(params, lr, weight_decay=0.0)

    result = Result(Subject("broken", "lion_lightning", "bf16/32", "bf16", make))
    survive(result, CPU)
    assert result.step_kept == pytest.approx(-1, abs=0.02)
    assert result.decay_kept == 0.0


def test_models_have_the_published_sizes() -> None:
    sizes = {name: sum(math.prod(shape) for shape in shapes()) for name, shapes in MODELS.items()}
    assert sizes["bert_base"] == 109_482_240
    assert sizes["bert_large"] == 335_141_888
    assert sizes["vit_b16"] == 86_567_656
    assert 1.3e9 < sizes["decoder_1.3b"] < 1.33e9


def test_every_mode_runs_on_every_engine_of_the_device() -> None:
    names = {subject.name for subject in ours(CPU)}
    assert names == {f"Lion {engine} {mode}" for mode in MODES for engine in ("cpu", "eager")}


def test_the_table_reads_at_80_columns(report: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from scripts.bench.bench_report import terminal

    entries = [{**item, "name": "Lion triton bf16/24, m int8", "median_ms": 1234.5} for item in report[1]["results"]]
    terminal(entries, [], Console(width=80, force_terminal=False))
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if "Lion triton" in line]
    assert rows
    assert all("Lion triton bf16/24, m int8" in line and line.rstrip().endswith("%") for line in rows)


def test_an_unknown_mode_ends_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        bench_step.main(["--modes", "bf16/8"])
    assert done.value.code == 2
    assert "use fp32" in capsys.readouterr().err
