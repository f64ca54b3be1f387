"""lion-replay-guard on a run with real faults: its own rules see what they saw then, others see other things."""

import shutil
from dataclasses import replace

import pytest

from lion_lightning import LionGuard
from lion_lightning.commands import replay_guard
from lion_lightning.guard.events import read_trace
from lion_lightning.guard.recovery import Remedy
from lion_lightning.guard.replay import Settings, changed, replay, settings_of
from lion_lightning.guard.rules import Thresholds
from lion_lightning.tracking.wandb import RunLogger
from tests.faults.injected import LabelNoise, NaNBatch, Outlier, every
from tests.faults.task import train

AS_RUN = Settings(on_divergence="recover", on_bad_loss="skip")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An outlier, two NaN batches, and labels that are wrong for good: a rewind that is undone."""
    folder = tmp_path_factory.mktemp("run")
    guard = LionGuard(on_bad_loss="skip", on_divergence="recover", trace=folder / "guard.csv")
    (folder / "config.yaml").write_text("guard:\n  on_divergence: recover\n  on_bad_loss: skip\n")
    faults = [Outlier(150, 1e4), NaNBatch([170, 171]), LabelNoise(every(205))]
    return folder, train(1, guard, faults, steps=400)


def call(capsys, monkeypatch, *arguments, columns=120):
    monkeypatch.setenv("COLUMNS", str(columns))
    code = replay_guard.main([*map(str, arguments)])
    output = capsys.readouterr()
    return code, output.out, output.err


def row(output, event):
    """Cells of the table's row of an event, folded lines joined."""
    cells, here = [], False
    for line in output.splitlines():
        parts = [part.strip() for part in line.split("│")[1:-1]]
        here = bool(parts) and (parts[0] == event or (here and not parts[0]))
        if here:
            cells = [f"{left} {right}".strip() for left, right in zip(cells or [""] * len(parts), parts, strict=True)]
    return cells


def test_the_settings_of_a_run_see_in_it_what_they_saw_then(run):
    folder, outcome = run
    noted = [event for event in outcome.events if event.step]  # without preflight
    seen = replay(read_trace(folder / "guard.csv"), AS_RUN)
    assert [(event.step, event.kind) for event in seen] == [(event.step, event.kind) for event in noted]
    assert all(event.remedy.startswith(other.remedy.value) for event, other in zip(noted, seen, strict=True))
    assert {event.remedy for event in seen} >= {Remedy.CLIP, Remedy.SKIP, Remedy.REWIND, Remedy.UNDO_REWIND}


def test_a_rewind_drops_the_reading_that_was_on_its_way_as_in_a_run(run):
    rules = replace(AS_RUN, thresholds=changed(Thresholds(), ["divergence_steps=10"]))
    seen = replay(read_trace(run[0] / "guard.csv"), rules)
    rewind = next(event.step for event in seen if event.remedy is Remedy.REWIND)
    told = {event.step for event in seen}
    assert rewind in told
    assert rewind + 1 not in told
    (known,) = read_trace(run[0] / "guard.csv").values()
    assert known[rewind].step == rewind + 1, "it was on its way"
    assert known[rewind].loss_z > rules.thresholds.loss_z, "and would have told of a bad loss"


def test_the_table_sets_old_and_new_side_by_side(run, capsys, monkeypatch):
    settings = ("--set", "divergence_steps=10", "--set", "outlier_ratio=1e9")
    code, output, error = call(capsys, monkeypatch, run[0], *settings)
    assert (code, error) == (0, "")
    assert row(output, "nonfinite") == ["nonfinite", "2", "171-172", "2", "171-172"]
    outlier, rewind = row(output, "outlier"), row(output, "divergence: rewind")
    assert outlier[2].startswith("151")
    assert outlier[3:] == ["0", ""]
    assert (rewind[1], rewind[3]) == ("1", "1")
    assert int(rewind[2]) == int(rewind[4]) + 10
    assert "the run itself clipped" in output


def test_nothing_asked_is_one_column(run, capsys, monkeypatch):
    _, output, _ = call(capsys, monkeypatch, run[0] / "guard.csv")
    assert row(output, "nonfinite") == ["nonfinite", "2", "171-172"]
    assert "asked" not in output


@pytest.mark.parametrize("columns", [80, 120])
def test_it_fits_the_terminal(run, capsys, monkeypatch, columns):
    _, output, _ = call(
        capsys, monkeypatch, run[0], "--set", "outlier_z=1", "--set", "outlier_ratio=1.01", columns=columns
    )
    assert max(map(len, output.splitlines())) <= columns
    assert "…" not in output, "nothing is cut off"


def test_other_modes_of_divergence_may_be_tried(run, capsys, monkeypatch):
    _, output, _ = call(capsys, monkeypatch, run[0], "--on-divergence", "stop")
    assert row(output, "divergence: stop")[3] == "1"
    assert row(output, "divergence: rewind")[3] == "0"
    assert "As it was, the run stops" not in output
    assert f"As asked, the run stops at step {row(output, 'divergence: stop')[4]}." in output


def test_the_runs_own_thresholds_come_from_its_configuration(run, capsys, monkeypatch, tmp_path):
    shutil.copy(run[0] / "guard.csv", tmp_path)
    (tmp_path / "config.yaml").write_text(
        "guard:\n  on_divergence: warn\n  thresholds:\n    _target_: lion_lightning.guard.rules.Thresholds\n"
        "    outlier_ratio: 1000000.0\n    window: 64\ntrainer:\n  max_steps: 400\n"
    )
    _, output, _ = call(capsys, monkeypatch, tmp_path, "--set", "outlier_ratio=3")
    assert row(output, "outlier")[1] == "0"
    assert row(output, "outlier")[4].startswith("151")
    assert int(row(output, "divergence: new level")[1]) > 0, "only noted"
    assert not row(output, "divergence: rewind")


def test_the_settings_of_a_configuration():
    config = {
        "guard": {"on_divergence": "stop", "thresholds": {"_target_": "x", "window": 64, "loss_z": 7.5}},
        "trainer": {"gradient_clip_val": 0.5},
    }
    assert settings_of(config) == Settings(Thresholds(window=64, loss_z=7.5), "stop", clip_val=0.5)
    assert settings_of({"guard": {"name": "none"}}) == Settings()
    by_value = {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}
    assert settings_of({"trainer": by_value}) == Settings()
    assert settings_of({"trainer": {"gradient_clip_val": 0}}) == Settings(), "0 clips nothing, as for the Trainer"


def test_an_offline_wandb_run_is_replayed_from_what_it_logged(capsys, monkeypatch, tmp_path):
    logger = RunLogger(project="p", run_name="r", group="g", save_dir=str(tmp_path), mode="offline")
    logger.log_hyperparams({"guard": {"thresholds": {"outlier_z": 5.0}}})
    for number in range(60):
        norm = 500.0 if number == 50 else 1 + 0.01 * (number % 5)
        logger.log_metrics({"guard/grad_norm": norm, "guard/loss": 2.0, "train/loss": 2.0}, step=number * 10 + 9)
    logger.finish(0)
    code, output, _ = call(capsys, monkeypatch, tmp_path)
    assert code == 0
    assert row(output, "outlier") == ["outlier", "1", "510"]
    assert "Only the 60 logged steps of 600 are known" in " ".join(output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{empty}"], "neither a guard.csv nor a W&B run is in there"),
        (["{empty}/nothing"], "there is no such file or folder"),
        (["{other}"], "is not a trace of this version of the guard"),
        (["{heading}"], "holds no readings of the guard"),
        (["{run}", "--set", "outlierz=3"], "there is no threshold 'outlierz': use one of window, armed_after"),
        (["{run}", "--set", "window=1.5"], "thresholds.window must be a whole number, got '1.5'"),
        (["{run}", "--set", "outlier_z"], "thresholds.outlier_z must be a number, got ''"),
        (["{run}", "--set", "outlier_z=-1"], "thresholds.outlier_z must be above 0, got -1.0"),
    ],
)
def test_bad_input_is_one_line(run, capsys, monkeypatch, tmp_path, arguments, message):
    places = {"run": run[0], "empty": tmp_path / "empty", "other": tmp_path / "a.csv", "heading": tmp_path / "b.csv"}
    places["empty"].mkdir()
    places["other"].write_text("step,loss\n")
    places["heading"].write_text((run[0] / "guard.csv").read_text().splitlines()[0] + "\n")
    code, output, error = call(capsys, monkeypatch, *(argument.format(**places) for argument in arguments))
    assert (code, output) == (2, "")
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_several_steps_are_written_as_stretches():
    assert replay_guard.stretches([]) == ""
    assert replay_guard.stretches([3, 7, 8, 9, 9, 12]) == "3, 7-9, 12"
    assert replay_guard.stretches(range(0, 60, 2)).endswith("20, 22, ...")


def test_thresholds_are_changed_one_by_one():
    assert changed(Thresholds(), ["window=64", "outlier_z=6"]) == Thresholds(window=64, outlier_z=6.0)


def test_a_torn_configuration_is_one_line(run, capsys, monkeypatch, tmp_path):
    (tmp_path / "guard.csv").write_bytes((run[0] / "guard.csv").read_bytes())
    (tmp_path / "config.yaml").write_text("guard: {on_divergence: [recover\n")
    code, _, error = call(capsys, monkeypatch, tmp_path)
    assert code == 2
    assert "config.yaml cannot be read" in error
    assert error.count("\n") == 1
