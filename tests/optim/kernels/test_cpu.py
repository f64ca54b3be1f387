"""How cpu.c gets compiled: into the cache, by many processes at once, or not at all and said once."""

import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from lion_lightning.optim import Lion
from lion_lightning.optim.kernels import compile_cpu, cpu

STEP = """
import torch
from lion_lightning.optim import Lion
param = torch.nn.Parameter(torch.ones(1000))
param.grad = torch.ones(1000)
Lion([param], fused={fused}).step()
"""


def run(code: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "XDG_CACHE_HOME": str(cache), **environment}
    command = [sys.executable, "-c", code]
    root = Path(__file__).parents[3]
    return subprocess.run(command, env=variables, cwd=root, capture_output=True, text=True, timeout=300, check=False)


def test_processes_may_compile_at_the_same_time(tmp_path: Path) -> None:
    code = (
        "from lion_lightning.optim.kernels import compile_cpu, cpu\n"
        "compile_cpu.FLAGS = ('-O0', *compile_cpu.FLAGS[1:])\nprint(cpu.cached())"
    )
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: run(code, tmp_path), range(2)))
    assert [result.returncode for result in results] == [0, 0], results[0].stderr
    assert [path.name for path in (tmp_path / "lion_lightning").iterdir()] == [Path(results[0].stdout.strip()).name]


def test_lion_needs_torch_alone_and_without_a_compiler_the_eager_engine_serves_and_says_so_once(tmp_path: Path) -> None:
    code = "import sys, torch; before = set(sys.modules); from lion_lightning import Lion; "
    code += "print({name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))\n"
    code += "from lion_lightning.optim.kernels import cpu\ncpu.installed = cpu.cached\n"
    code += STEP.format(fused=None) + "Lion([param]).step(); print('stepped')" + STEP.format(fused=True)
    result = run(code, tmp_path, PATH="/nowhere", CC="no-such-compiler")
    assert result.stdout.splitlines() == ["{'lion_lightning'}", "stepped"], result.stderr
    assert result.stderr.count("the slower eager engine serves instead") == 1
    assert "fused=True needs a fused engine (cpu: cpu.c could not be compiled)" in result.stderr


def test_a_failing_compiler_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "installed", cpu.cached)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compile_cpu, "FLAGS", ("-no-such-flag",))
    with caplog.at_level(logging.WARNING):
        assert cpu.load.__wrapped__() is None
    assert "eager engine serves" in caplog.text
    assert list((tmp_path / "lion_lightning").iterdir()) == []


def test_the_struct_matches_the_source() -> None:
    loaded = cpu.load()
    assert loaded is not None
    assert loaded.lion_task_bytes() == cpu.TASK.size


def test_threads_survive_a_fork_and_share_the_work() -> None:
    torch.set_num_threads(2)
    try:
        param = nn.Parameter(torch.zeros(300_000))
        optimizer = Lion([param], lr=1e-2)
        for _ in range(3):
            param.grad = torch.ones_like(param)
            optimizer.step()
        torch.testing.assert_close(param.detach(), torch.full((300_000,), -3e-2))
    finally:
        torch.set_num_threads(1)
