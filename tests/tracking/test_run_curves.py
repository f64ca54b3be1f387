"""A run's curves: where a value lies on each axis."""

import math

import numpy as np
import pytest

from lion_lightning.tracking.runs import Run, continued


def run_of(history):
    return Run("place", "id", "name", "group", "finished", 0, {"optim": {"lr": 0.5}}, history)


@pytest.fixture
def run():
    """Training logs every 10 steps; validations at 15 and 30; the axis goes twice as fast after step 20."""
    return run_of([
        {"trainer/global_step": 9, "perf/seconds": 10.0, "guard/events": 0},
        {"trainer/global_step": 14, "val/loss": 2.0},
        {"trainer/global_step": 19, "perf/seconds": 20.0, "guard/events": 1},
        {"trainer/global_step": 29, "perf/seconds": 40.0, "guard/events": 3},
        {"trainer/global_step": 29, "val/loss": "NaN"},
        {"trainer/global_step": 39, "val/loss": 1.0},
    ])  # fmt: skip


def test_steps_are_counted_from_one(run):
    steps, values = run.curve("val/loss")
    assert steps.tolist() == [15, 30, 40]
    assert values[[0, 2]].tolist() == [2.0, 1.0]
    assert math.isnan(values[1]), "a loss that is not a number must be seen"


def test_a_validation_lies_between_the_rows_that_have_the_axis(run):
    seconds, _ = run.curve("val/loss", "seconds")
    assert seconds.tolist() == [15.0, 40.0, pytest.approx(40 + 10 * 40 / 30)], "past the end the mean rate goes on"


def test_an_axis_that_was_not_logged_has_no_places(run):
    assert not run.has_axis("tokens")
    assert np.isnan(run.place([10], "tokens")).all()


def test_guard_events_are_where_the_count_rises(run):
    assert run.guard_steps() == [20, 30]


def test_the_last_finite_value_counts(run):
    assert run.last("val/loss") == 1.0
    assert run_of([{"trainer/global_step": 0, "x": 1.0}, {"trainer/global_step": 1, "x": "NaN"}]).last("x") == 1.0
    assert run.last("nothing") is None


def test_of_one_step_the_last_value_counts():
    rows = [{"trainer/global_step": step, "x": value} for step, value in ((4, 1.0), (4, 2.0), (9, 3.0))]
    steps, values = run_of(rows).curve("x")
    assert (steps.tolist(), values.tolist()) == ([5.0, 10.0], [2.0, 3.0])


def test_settings_are_found_by_dotted_keys(run):
    assert run.setting("optim.lr") == 0.5
    assert run.setting("optim.lr.deeper") is None
    assert run.setting("no.such") is None


def test_seconds_of_a_run_that_was_resumed_online_go_on():
    """The first process got to step 40 and saved step 30; the second one begins there, and its seconds at 0."""
    first = [{"trainer/global_step": step - 1, "perf/seconds": step / 2} for step in (10, 20, 30, 40)]
    second = [{"trainer/global_step": step - 1, "perf/seconds": (step - 30) / 2} for step in (40, 50)]
    rows = continued([*first, {"trainer/global_step": 39, "val/loss": 1.0}, *second])
    assert [row["perf/seconds"] for row in rows if "perf/seconds" in row] == [5.0, 10.0, 15.0, 20.0, 20.0, 25.0]
    assert rows[4] == {"trainer/global_step": 39, "val/loss": 1.0}
