"""What a person sees: panels at several widths, and the progress bar of a run and of its continuation."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from lion_lightning.__main__ import report_error
from lion_lightning.training.report import show

PATH = "/data/experiments/of/this/autumn/outputs/bert_mlm-lion-s1/2026-11-29_13-14-15/checkpoints/best.ckpt"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_long_path_is_broken_after_slashes_alone(width: int) -> None:
    console = Console(width=width, file=io.StringIO())
    show(console, "title", {"kept in": PATH, "words": "a sentence that is longer than a line is " * 3})
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= width
    cells = [line.strip("│ ").removeprefix("kept in").strip() for line in lines[1:-1]]
    pieces = cells[: next(number for number, cell in enumerate(cells) if cell.startswith("words"))]
    assert "".join(pieces) == PATH
    assert all(piece.endswith("/") for piece in pieces[:-1])


def test_brackets_are_no_markup() -> None:
    console = Console(width=60, file=io.StringIO())
    show(console, "[red]", {"[/a]": "[/b]", ":cat:": "[bold]c"})
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(word in said for word in ("[red]", "[/a]", "[/b]", ":cat:", "[bold]c"))


def test_a_place_that_cannot_be_written_or_read_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stopped:
        report_error(PermissionError(13, "Permission denied", "/srv/outputs"))
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: /srv/outputs: Permission denied; run_dir=FOLDER keeps a run elsewhere, data.cache_dir=FOLDER or the "
        "variable XDG_CACHE_HOME its prepared data"
    ]
    file = tmp_path / "text.txt"
    file.touch()
    monkeypatch.setattr(os, "access", lambda *_: False)  # as root may read everything
    with pytest.raises(SystemExit):
        report_error(PermissionError(13, "Permission denied", str(file)))
    assert capsys.readouterr().err == f"error: {file}: Permission denied\n"
    with pytest.raises(FileNotFoundError):  # may be a defect of ours: its traceback is needed
        report_error(FileNotFoundError(2, "No such file or directory", "x"))


def on_a_terminal(command: list[str], root: Path) -> list[str]:
    """The lines that a command writes on a terminal of 80 columns."""
    pty = pytest.importorskip("pty")  # Windows has none
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=root, env=environment, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        written = b""
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # Linux ends a terminal so
                break
            if not chunk:
                break
            written += chunk
    os.close(ours)
    assert process.returncode == 0, written[-2000:]
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode()))


@pytest.mark.slow
def test_the_bar_counts_the_steps_of_the_whole_run_after_a_resume_too(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = ["recipe=image_classification", f"run_dir={folder}", "resume=auto", "logger=none", "export=false"]
    command = [sys.executable, "train.py", *settings, "trainer.val_check_interval=4", "trainer.accelerator=cpu"]
    for steps, first in ((4, 1), (8, 5)):
        lines = on_a_terminal([*command, f"trainer.max_steps={steps}"], root)
        bars = [line for line in lines if line.startswith("Training") and "loss" in line]
        counted = [int(found[1]) for line in bars if (found := re.search(rf"(\d+)/{steps} ", line))]
        assert set(counted) == set(range(first, steps + 1)), bars
        assert any(line.startswith(f"step {steps}/{steps}  train/loss") for line in lines), lines
        panel = " ".join("".join(lines).replace("│", " ").split())
        assert re.search(
            r"conf/tuned/image_classification_lion\.yaml \(best of \d+ trials with vit_micro on digits\)", panel
        )
    assert [entry.name for entry in folder.glob("*.log")] == ["image_classification.log"]
