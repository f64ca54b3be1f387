"""Prepared data on disk: made once, whole or not at all."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from lion_lightning.data.cache import cache_at, cached_folder
from lion_lightning.errors import ConfigError

PARTS = 20


def write_slowly(folder: Path) -> None:
    for part in range(PARTS):
        (folder / f"{part}").write_text(str(os.getpid()))
        time.sleep(0.01)


def write_forever(folder: Path) -> None:
    (folder / "half").touch()
    time.sleep(600)


def fill(name: str):  # type: ignore[no-untyped-def]
    return lambda folder: (folder / name).touch()


def must_not_write(folder: Path) -> None:
    raise AssertionError("written twice")


def test_the_second_caller_gets_what_the_first_wrote(tmp_path: Path) -> None:
    folder, reused = cached_folder(tmp_path / "deep" / "cache", "key", fill("file"))
    assert not reused
    again, reused_again = cached_folder(tmp_path / "deep" / "cache", "key", must_not_write)
    assert reused_again
    assert again == folder
    assert [file.name for file in again.iterdir()] == ["file"]


def test_another_key_is_another_folder(tmp_path: Path) -> None:
    first, _ = cached_folder(tmp_path, "key", fill("one"))
    second, reused = cached_folder(tmp_path, "yek", fill("two"))
    assert first != second
    assert not reused


def test_a_killed_writer_leaves_nothing_that_is_taken_for_complete(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=cached_folder, args=(tmp_path, "key", write_forever))
    process.start()
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*/half")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert list(tmp_path.glob("*/half")), "the writer was killed half-way"
    folder, reused = cached_folder(tmp_path, "key", fill("whole"))
    assert not reused
    assert [file.name for file in folder.iterdir()] == ["whole"]


def test_a_writer_that_raises_leaves_nothing(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cached_folder(tmp_path, "key", fails)
    assert [entry.name for entry in tmp_path.iterdir()] == ["locks"]


def test_the_default_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_at() == tmp_path / "lion_lightning"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_at() == tmp_path / ".cache" / "lion_lightning"


def write_and_wait(folder: Path) -> None:
    (folder / "part").write_text(str(os.getpid()))
    time.sleep(600)


def test_an_interrupted_writer_goes_on_with_what_it_had(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=cached_folder, args=(tmp_path, "key", write_and_wait, True)
    )
    process.start()
    deadline = time.monotonic() + 60
    while not [file for file in tmp_path.glob("unfinished-*/part") if file.read_text()]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    found = []
    folder, reused = cached_folder(
        tmp_path, "key", lambda folder: found.append((folder / "part").read_text()), resumable=True
    )
    assert found == [str(process.pid)]
    assert not reused
    assert cached_folder(tmp_path, "key", must_not_write) == (folder, True)


def test_only_one_of_two_processes_prepares_and_the_other_waits(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    barrier, answers = fork.Barrier(2), fork.Queue()

    def prepare() -> None:
        barrier.wait()
        folder, reused = cached_folder(tmp_path, "key", write_slowly)
        answers.put((reused, {file.read_text() for file in folder.iterdir()}))

    processes = [fork.Process(target=prepare) for _ in range(2)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert sorted(reused for reused, _ in found) == [False, True]
    assert found[0][1] == found[1][1]
    assert len(found[0][1]) == 1, "both have written"


def test_a_setting_that_cannot_work_leaves_nothing_and_a_full_disk_leaves_what_is_there(tmp_path: Path) -> None:
    def fails(error: Exception):  # type: ignore[no-untyped-def]
        def write(folder: Path) -> None:
            (folder / "half").touch()
            raise error

        return write

    with pytest.raises(ConfigError):
        cached_folder(tmp_path, "key", fails(ConfigError("too little text")), resumable=True)
    assert not list(tmp_path.glob("*/half"))
    with pytest.raises(OSError, match="disk full"):
        cached_folder(tmp_path, "key", fails(OSError("disk full")), resumable=True)
    assert list(tmp_path.glob("unfinished-*/half"))
