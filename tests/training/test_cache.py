"""Prepared data on disk: made once, whole or not at all."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from lion_lightning.training.cache import cached_folder, default_cache

PARTS = 20


def write_slowly(folder: Path) -> None:
    for part in range(PARTS):
        (folder / f"{part}").write_text(str(os.getpid()))
        time.sleep(0.01)


def race(cache: Path, barrier, answers) -> None:  # type: ignore[no-untyped-def]
    barrier.wait()
    folder, reused = cached_folder(cache, "key", write_slowly)
    written = {file.name: file.read_text() for file in folder.iterdir()}
    answers.put((str(folder), reused, sorted(written), set(written.values())))


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


def test_two_processes_that_race_get_one_whole_folder(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    barrier, answers = fork.Barrier(2), fork.Queue()
    processes = [fork.Process(target=race, args=(tmp_path, barrier, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    first, second = (answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert first == second  # the same folder, made by neither before, the same files, all by one writer
    assert first[2] == sorted(str(part) for part in range(PARTS))
    assert len(first[3]) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == [Path(first[0]).name], "the loser's copy stays behind"


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
    assert list(tmp_path.iterdir()) == []


def test_the_default_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "lion_lightning"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "lion_lightning"
