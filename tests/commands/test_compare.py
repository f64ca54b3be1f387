"""lion-compare on what people have: good runs, one run, unlike runs, killed and broken ones, nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import wandb

from lion_lightning.commands import compare
from lion_lightning.tracking.wandb import RunLogger

ROOT = Path(__file__).parents[2]


def log_run(
    place: Path, optimizer: str, seed: int | None, values: list[float], group: str = "g", code: int = 0
) -> None:
    logger = RunLogger(
        project="p",
        run_name=f"{optimizer}-s{seed}",
        group=group,
        save_dir=str(place / f"{group}-{optimizer}-{seed}"),
        mode="offline",
    )
    config = {"optim": {"name": optimizer}, "recipe": {"monitor": "val/loss", "mode": "min"}}
    logger.log_hyperparams({**config, **({} if seed is None else {"seed": seed})})
    for step, value in enumerate(values):
        logger.log_metrics({"val/loss": value, "perf/seconds": step + 1.0, "guard/events": float(step > 0)}, step=step)
    logger.finish(code)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        log_run(place / "good", "lion", seed, [3.0, 2.0 + seed / 10])
        log_run(place / "good", "adamw", seed, [3.0, 1.0 + seed / 10])
    log_run(place / "one", "lion", 1, [3.0, 2.0])
    log_run(place / "seedless", "lion", None, [3.0, 2.0])
    log_run(place / "unlike", "lion", 1, [3.0], group="short")
    log_run(place / "unlike", "adamw", 1, [2.0], group="long")
    log_run(place / "stopped", "lion", 1, [3.0, 2.5], code=42)
    (place / "empty").mkdir()
    (place / "corrupt").mkdir()
    (place / "corrupt" / "run-torn.wandb").write_bytes(os.urandom(5000))
    return place


def call(arguments: list[object], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> tuple[int, str, str]:
    code = compare.main([*map(str, arguments), "--output", str(tmp_path / "out")])
    output = capsys.readouterr()
    return code, " ".join(output.out.split()), output.err


def test_a_good_comparison_writes_every_file(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, output, error = call([runs / "good"], capsys, tmp_path)
    assert (code, error) == (0, "")
    assert "adamw is best with 1.1500 ± 0.0707 over 2 seeds, 1.0000 ahead of the next, lion" in output
    written = {file.name for file in (tmp_path / "out").iterdir()}
    pictures = {"val_loss-steps.png", "val_loss-seconds.png"}
    assert written == {"compare.md", "compare.html", "runs.csv", *pictures}
    assert "![val_loss-steps](val_loss-steps.png)" in (tmp_path / "out" / "compare.md").read_text()


def test_of_two_copies_the_whole_one_counts(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (whole,) = (runs / "one").rglob("run-*.wandb")
    for name, size in (("a backup of the run as it was", 2000), ("z", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / whole.name).write_bytes(whole.read_bytes()[:size])
    code, output, _ = call([tmp_path], capsys, tmp_path)
    assert code == 0
    assert "lion is best with 2.0000 over 1 seed" in output


def test_an_output_that_is_a_file_is_one_line(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    code, _, error = call([runs / "one"], capsys, tmp_path)
    assert code == 2
    assert error.startswith("error: ")
    assert "out" in error
    assert error.count("\n") == 1


def test_one_run_is_shown_and_nothing_is_claimed(
    runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, output, _ = call([runs / "one"], capsys, tmp_path)
    assert code == 0
    assert "lion is best with 2.0000 over 1 seed; there is nothing to compare it with." in output


def test_runs_without_seeds_are_said_to_be(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, output, _ = call([runs / "seedless"], capsys, tmp_path)
    assert code == 0
    assert "lion: no `seed` in the configuration" in output


def test_unlike_groups_are_refused_and_compared_when_told(
    runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, output, error = call([runs / "unlike"], capsys, tmp_path)
    assert (code, output) == (2, "")
    assert error.startswith("error: the runs belong to 2 groups: long (1 runs); short (1 runs)")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    code, output, _ = call([runs / "unlike", "--group", "short"], capsys, tmp_path)
    assert (code, "adamw" in output) == (0, False)
    assert call([runs / "unlike", "--each-group"], capsys, tmp_path)[0] == 0
    assert {"long", "short"} <= {file.name for file in (tmp_path / "out").iterdir()}
    code, _, error = call([runs / "unlike", "--group", "middling"], capsys, tmp_path)
    assert (code, error) == (2, "error: no run of group middling; there are: long, short\n")


def test_a_group_without_a_result_does_not_stop_the_others(
    runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log_run(tmp_path / "runs", "lion", 1, [], group="a lost one")
    code, output, error = call([tmp_path / "runs", runs / "good", "--each-group"], capsys, tmp_path)
    assert (code, error) == (2, "error: a lost one: no run has logged val/loss; there are: nothing\n")
    assert "adamw is best with" in output
    assert (tmp_path / "out" / "g" / "compare.md").is_file()


def test_a_run_that_failed_is_shown_as_such(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, output, _ = call([runs / "stopped"], capsys, tmp_path)
    assert code == 0
    assert "there is no result yet" in output
    assert "lion-s1 is failed with code 42 at step 2, val/loss 2.5000: not counted" in output


def test_a_corrupt_file_alone_is_an_error_and_beside_others_a_remark(
    runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, error = call([runs / "corrupt"], capsys, tmp_path)
    assert code == 2
    assert error.startswith("error: not read: run-torn.wandb: ")
    code, output, _ = call([runs / "one", runs / "corrupt"], capsys, tmp_path)
    assert code == 0
    assert "! not read: run-torn.wandb: " in output
    assert "not read: run-torn.wandb" in (tmp_path / "out" / "compare.md").read_text()


def test_an_empty_folder_and_no_folder_are_named(
    runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call([runs / "empty"], capsys, tmp_path)[::2] == (2, f"error: no W&B run in {runs / 'empty'}\n")
    code, _, error = call([runs / "nowhere"], capsys, tmp_path)
    assert (code, "there is no such folder" in error) == (2, True)
    assert call([], capsys, tmp_path)[2].startswith("error: nothing to compare")


def test_the_parts_of_a_run_that_was_resumed_under_one_id_are_joined(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """As online runs are resumed: two folders, one id."""
    config = {"optim": {"name": "lion"}, "seed": 1, "resume": "auto", "recipe": {"monitor": "val/loss", "mode": "min"}}
    for number, code in ((0, 1), (1, 0)):
        (tmp_path / "runs" / str(number)).mkdir(parents=True)
        logged = wandb.init(
            id="aaaa1111", mode="offline", dir=tmp_path / "runs" / str(number), config=config,
            settings=wandb.Settings(silent=True),
        )  # fmt: skip
        logged.log({"val/loss": 3.0 - number, "trainer/global_step": 10 * number})
        logged.finish(exit_code=code)
    code, output, _ = call([tmp_path / "runs"], capsys, tmp_path)
    assert code == 0
    assert "lion is best with 2.0000 over 1 seed" in output
    assert "lion, seed 1: 2 runs; the last goes on from the one before" in output


def test_a_copied_run_counts_once(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(runs / "one", tmp_path / "copy")
    _, output, _ = call([runs / "one", tmp_path / "copy"], capsys, tmp_path)
    assert "over 1 seed;" in output
    assert "!" not in output


@pytest.mark.slow
def test_a_crash_in_a_multirun_leaves_the_other_runs_and_the_comparison(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Of three jobs the second breaks in the middle of training; the sweep goes on, and the comparison says so."""
    short = ["trainer.max_steps=4", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "export=false"]
    breaking = ["guard=none", "+trainer.detect_anomaly=true", "optim=lion", "optim.lr=1e-3,1e30,1e-4"]
    command = [sys.executable, "train.py", "-m", "recipe=image_classification", *breaking, *short]
    subprocess.run([*command, f"hydra.sweep.dir={tmp_path / 'runs'}"], cwd=ROOT, capture_output=True, check=False)
    code, output, error = call([tmp_path / "runs"], capsys, tmp_path)
    assert (code, error) == (0, "")
    assert "lion (lr 0.001) 1 0." in output
    assert "lion (lr 0.0001) 1 0." in output
    assert "lion (lr 1e+30) 0 + 1 failed" in output
    assert "image_classification-lion-s1 is failed with code 1 at step" in output
