"""guard.csv: what goes in comes out."""

import math
import random

import pytest

from lion_lightning.guard.events import FLUSH_EVERY_ROWS, Trace, read_trace
from lion_lightning.guard.reading import Reading
from tests.guard.made_readings import troubled


def same(left, right):
    """Equal, where NaN equals NaN."""
    return repr(left) == repr(right)


def test_readings_come_back_to_the_last_bit(tmp_path):
    trace, readings = Trace(tmp_path / "deep" / "guard.csv"), list(troubled(1, 250))
    readings[3] = Reading(step=4, loss=math.inf, grad_norm=0.1 + 0.2, bad_ranks=(0, 12), skipped=True)
    for reading in readings:
        trace.add(0, reading)
    trace.flush()
    assert same(read_trace(trace.path), {0: readings})


def test_each_optimizer_has_its_own(tmp_path):
    trace, dice = Trace(tmp_path / "guard.csv"), random.Random(1)
    rows = [(dice.randrange(2), reading) for reading in troubled(2, 60)]
    for number, reading in rows:
        trace.add(number, reading)
    trace.flush()
    for number in (0, 1):
        assert same(read_trace(trace.path)[number], [reading for other, reading in rows if other == number])


def test_a_resumed_run_goes_on_in_the_same_file_and_the_last_try_of_a_step_counts(tmp_path):
    path = tmp_path / "guard.csv"
    for steps, loss in ((range(1, 6), 1.0), (range(4, 9), 2.0)):
        trace = Trace(path)
        for step in steps:
            trace.add(0, Reading(step=step, loss=loss))
        trace.flush()
    readings = read_trace(path)[0]
    assert [(reading.step, reading.loss) for reading in readings] == [
        *((step, 1.0) for step in range(1, 4)),
        *((step, 2.0) for step in range(4, 9)),
    ]


def test_it_is_written_a_hundred_rows_at_a_time_and_not_without_a_row(tmp_path):
    trace = Trace(tmp_path / "guard.csv")
    trace.flush()
    for step in range(FLUSH_EVERY_ROWS - 1):
        trace.add(0, Reading(step=step))
    assert not trace.path.exists()
    trace.add(0, Reading(step=FLUSH_EVERY_ROWS))
    assert len(trace.path.read_text().splitlines()) == FLUSH_EVERY_ROWS + 1


def test_another_csv_file_is_refused(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(
        ValueError, match=r"metrics.csv is not a trace of this version of the guard: its columns are \['step', 'loss'\]"
    ):
        read_trace(tmp_path / "metrics.csv")
