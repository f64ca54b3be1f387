"""Checkpoint files: whole or not there, plain or refused, and a damaged one is named and skipped."""

import errno
import os
import pickle
import resource
import signal
from collections import OrderedDict
from enum import Enum
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from lion_lightning.errors import ConfigError
from lion_lightning.training.checkpoint import files
from lion_lightning.training.checkpoint.files import (
    DurableCheckpointIO,
    InvalidCheckpoint,
    load,
    marker_of,
    newest_valid,
    plain,
    step_files,
    step_path,
    verify,
    write,
)
from lion_lightning.training.checkpoint.resume import checkpoint_to_resume


def state(step: int, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    weights = OrderedDict(weight=torch.randn(64, 64, generator=generator), bias=torch.zeros(64))
    return {"state_dict": weights, "global_step": step, **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of the steps 1, 2 and 3."""
    for step in (1, 2, 3):
        write(state(step), step_path(tmp_path, step))
    return tmp_path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": (truncate, "bytes, but"),
    "one byte flipped": (flip_a_byte, "its bytes have changed"),
    "zero length": (lambda path: path.write_bytes(b""), "0 bytes, but"),
    "missing": (lambda path: path.unlink(), "the file is missing"),
    "no marker": (lambda path: marker_of(path).unlink(), "no marker beside it"),
    "half a marker": (lambda path: truncate(marker_of(path)), "its marker cannot be read"),
    "an empty marker": (lambda path: marker_of(path).write_bytes(b""), "its marker cannot be read"),
    "a marker of something else": (lambda path: marker_of(path).write_text('{"a": 1}'), "its marker cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_older_one_used(
    folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    act, told = DAMAGE[damage]
    newest = step_path(folder, 3)
    assert checkpoint_to_resume("auto", folder) == newest
    act(newest)
    with pytest.raises(InvalidCheckpoint, match=told) as error:
        verify(newest)
    assert str(newest) in str(error.value)
    assert checkpoint_to_resume("auto", folder) == step_path(folder, 2)
    assert f"resume=auto skips {newest}" in caplog.text
    act(step_path(folder, 2))
    assert checkpoint_to_resume("auto", folder) == step_path(folder, 1)
    act(step_path(folder, 1))
    with pytest.raises(ConfigError, match=r"none of the checkpoints .* is valid") as refused:
        checkpoint_to_resume("auto", folder)
    assert "\n" not in str(refused.value)


def test_a_flipped_byte_is_seen_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "step-000000001.ckpt"
    write({"state_dict": {"w": torch.ones(2)}, "global_step": 1}, path)
    data = path.read_bytes()
    for position in range(0, len(data), 11):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(InvalidCheckpoint):
            verify(path)
    path.write_bytes(data)
    assert verify(path).global_step == 1


def test_last_stands_in_where_the_step_files_are_gone(folder: Path) -> None:
    files.link_marked(step_path(folder, 2), folder / "last.ckpt")
    for step in (1, 2, 3):
        files.remove_marked(step_path(folder, step))
    path, wrong = newest_valid(folder)
    assert path == folder / "last.ckpt"
    assert not wrong
    assert load(path)["global_step"] == 2


def test_an_empty_folder_starts_afresh_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert checkpoint_to_resume("auto", tmp_path / "nothing") is None
    assert "starts afresh" in caplog.text
    assert checkpoint_to_resume(None, tmp_path) is None


def test_a_new_run_is_not_started_where_another_one_was(folder: Path) -> None:
    for resume in (None, str(step_path(folder, 1))):
        with pytest.raises(ConfigError, match=r"step-000000003\.ckpt: resume=auto goes on with it"):
            checkpoint_to_resume(resume, folder)


def test_a_given_file_is_checked_too(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("another") / "checkpoints"
    path = step_path(folder, 3)
    assert checkpoint_to_resume(str(path), elsewhere) == path
    flip_a_byte(path)
    with pytest.raises(ConfigError, match="have changed"):
        checkpoint_to_resume(str(path), elsewhere)
    with pytest.raises(ConfigError, match="no such checkpoint file"):
        checkpoint_to_resume("/nowhere.ckpt", elsewhere)


@pytest.mark.parametrize("url", ["https://example.org/a.ckpt", "http://x/a", "s3://bucket/a.ckpt", "file:///a", "hf:a"])
def test_a_url_is_no_checkpoint(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a file on this machine, not a URL"):
        checkpoint_to_resume(url, tmp_path)
    with pytest.raises(ValueError, match="not a URL"):
        DurableCheckpointIO().load_checkpoint(url)


class Colour(Enum):
    RED = "red"


def test_what_is_not_plain_becomes_plain(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    odd = {
        "path": Path("/a/b"),
        "numpy": np.float64(1.5),
        "whole": np.int32(3),
        "array": np.arange(3),
        "config": OmegaConf.create({"a": [1, {"b": 2}]}),
        "enum": Colour.RED,
        "tuple": (1, "a", None, True),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "dtype": torch.bfloat16,
    }
    checkpoint = {"state_dict": module.state_dict(), "global_step": np.int64(7), "odd": odd}
    checkpoint["hyper_parameters"] = {"factory": partial(print, 1), "path": Path("x")}
    write(checkpoint, tmp_path / "a.ckpt")
    kept = load(tmp_path / "a.ckpt")
    assert kept["global_step"] == 7
    assert kept["odd"]["path"] == "/a/b"
    assert (kept["odd"]["numpy"], kept["odd"]["whole"]) == (1.5, 3)
    assert kept["odd"]["array"].tolist() == [0, 1, 2]
    assert kept["odd"]["config"] == {"a": [1, {"b": 2}]}
    assert kept["odd"]["enum"] == "red"
    assert kept["odd"]["tuple"] == (1, "a", None, True)
    assert type(kept["odd"]["parameter"]) is torch.Tensor
    assert kept["odd"]["dtype"] is torch.bfloat16
    assert kept["hyper_parameters"] == {"factory": repr(partial(print, 1)), "path": "x"}
    assert kept["state_dict"]._metadata[""]["version"] == 1


def test_what_cannot_be_kept_is_named() -> None:
    with pytest.raises(TypeError, match=r"checkpoint\['callbacks'\]\['mine'\]\[1\] is a functools.partial"):
        plain({"callbacks": {"mine": [1, partial(print)]}})


class Exploit:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def test_a_malicious_checkpoint_is_refused_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owned = tmp_path / "owned"
    path = tmp_path / "step-000000001.ckpt"
    torch.save({**state(1), "x": Exploit(owned)}, path)
    files.mark(path, 1)
    assert checkpoint_to_resume(str(path), tmp_path / "run") == path, "its bytes are what was written"
    for read in (load, DurableCheckpointIO().load_checkpoint, lambda p: DurableCheckpointIO().load_checkpoint(p, weights_only=False)):  # noqa: E501  # fmt: skip
        with pytest.raises(pickle.UnpicklingError):
            read(path)
    assert not owned.exists()
    torch.load(path, weights_only=False)
    assert owned.exists(), "the exploit does not work, so nothing was shown"


def test_links_and_weights_come_with_the_file(tmp_path: Path) -> None:
    best, last = tmp_path / "best.ckpt", tmp_path / "last.ckpt"
    write(state(1), step_path(tmp_path, 1))
    files.write_weights(files.weights_of(step_path(tmp_path, 1)), tmp_path / "best.safetensors")
    for link in (last, best):
        files.link_marked(step_path(tmp_path, 1), link)
    write(state(2), step_path(tmp_path, 2))
    files.link_marked(step_path(tmp_path, 2), last)
    files.remove_marked(step_path(tmp_path, 1))
    assert verify(best).global_step == 1
    assert verify(last).global_step == 2
    assert not step_path(tmp_path, 1).exists()
    weights = load_file(tmp_path / "best.safetensors")
    assert torch.equal(weights["weight"], state(1)["state_dict"]["weight"])
    assert not list(tmp_path.glob(".writing*"))


def test_a_link_is_a_copy_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    write(state(1), step_path(tmp_path, 1))
    files.link_marked(step_path(tmp_path, 1), tmp_path / "last.ckpt")
    assert verify(tmp_path / "last.ckpt").global_step == 1
    assert (tmp_path / "last.ckpt").stat().st_ino != step_path(tmp_path, 1).stat().st_ino


def test_a_compiled_model_is_saved_under_its_own_names(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.compile(torch.nn.Linear(2, 2), backend="eager"))
    assert "0._orig_mod.weight" in model.state_dict()
    io = DurableCheckpointIO()
    parts: dict[str, Any] = {"optimizer_states": [], "lr_schedulers": [], "callbacks": {}, "loops": {}}
    io.save_checkpoint({"state_dict": model.state_dict(), "global_step": 1, **parts}, tmp_path / "a.ckpt")
    assert set(load(tmp_path / "a.ckpt")["state_dict"]) == {"0.weight", "0.bias"}
    io.model = model
    model.load_state_dict(io.load_checkpoint(tmp_path / "a.ckpt")["state_dict"])
    io.model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    io.model.load_state_dict(io.load_checkpoint(tmp_path / "a.ckpt")["state_dict"])


def test_a_failed_write_leaves_the_old_file_and_is_told(tmp_path: Path) -> None:
    """A file that the kernel does not let grow (RLIMIT_FSIZE), half-way through."""

    def save_two_steps() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        io = DurableCheckpointIO()
        for step, size in ((1, 1000), (2, 100_000)):
            assert io.error is None
            weights = {"w": torch.full((size,), float(step))}
            io.save_checkpoint({"state_dict": weights, "global_step": step}, tmp_path / "a.ckpt")
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        assert "File too large" in str(io.error)

    process = get_context("fork").Process(target=save_two_steps)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert verify(tmp_path / "a.ckpt").global_step == 1
    assert load(tmp_path / "a.ckpt")["state_dict"]["w"].tolist() == [1.0] * 1000
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.ckpt", "a.ckpt.json"]


def save_for_ever(folder: Path) -> None:
    path, _ = newest_valid(folder)
    step = 0 if path is None else load(path)["global_step"]
    while True:
        step += 1
        old, path = step_files(folder)[:-1], step_path(folder, step)
        write({"state_dict": {"w": torch.full((50_000,), float(step))}, "global_step": step}, path)
        for name in ("best.ckpt", "last.ckpt"):
            files.link_marked(path, folder / name)
        for file in old:
            files.remove_marked(file)


def test_a_kill_at_any_moment_of_a_save_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    """Real processes that save over and over, killed at random moments."""
    random, steps, pause = np.random.default_rng(1), [1], 0.03
    write({**state(1), "state_dict": {"w": torch.ones(2)}}, step_path(tmp_path, 1))
    for _ in range(20):
        process = get_context("fork").Process(target=save_for_ever, args=(tmp_path,))
        process.start()
        process.join(pause * (1 + random.random()))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        path, _ = newest_valid(tmp_path)
        assert path is not None
        kept = load(path)
        assert kept["state_dict"]["w"].eq(float(kept["global_step"])).all()
        steps.append(kept["global_step"])
        pause *= 1 if steps[-1] > 1 else 2  # on a machine so busy that nothing was saved yet
    assert steps == sorted(steps), "an older checkpoint was all that was left"
    assert steps[-1] > steps[0], "nothing was ever saved"


@pytest.mark.parametrize("layout", ["sparse", "csr"])
def test_sparse_buffers_are_written_and_read_back(tmp_path: Path, layout: str) -> None:
    found = torch.eye(3).to_sparse() if layout == "sparse" else torch.eye(3).to_sparse_csr()
    torch.save(files.plain({"adjacency": found}), tmp_path / "state.pt")
    assert torch.equal(torch.load(tmp_path / "state.pt", weights_only=True)["adjacency"].to_dense(), torch.eye(3))


def test_weights_with_sparse_buffers_are_written_dense(tmp_path: Path) -> None:
    files.write_weights({"adjacency": torch.eye(3).to_sparse(), "weight": torch.ones(2)}, tmp_path / "best.safetensors")
    assert torch.equal(load_file(tmp_path / "best.safetensors")["adjacency"], torch.eye(3))
