import math

import pytest

from lion_lightning.hyperparams import amos, constant, cosine, linear


def test_each_schedule_starts_at_the_peak_and_ends_where_it_says():
    assert [constant(100)(step) for step in (0, 50, 1000)] == [1.0, 1.0, 1.0]
    for schedule in (linear, cosine, amos):
        factor = schedule(100, final=0.2)
        assert factor(0) == 1.0
        assert factor(100) == pytest.approx(0.2)


def test_linear_and_cosine_pass_half_way_in_the_middle_and_stay_at_the_end():
    for schedule in (linear, cosine):
        factor = schedule(100, final=0.0)
        assert factor(50) == pytest.approx(0.5)
        assert factor(150) == pytest.approx(0.0)
    assert cosine(100)(25) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert linear(100)(25) == pytest.approx(0.75)


def test_amos_is_the_inverse_of_a_line_in_the_step():
    factor = amos(90, final=0.1)
    assert [1 / factor(step) for step in (0, 30, 60, 90)] == pytest.approx([1, 4, 7, 10])


@pytest.mark.parametrize("schedule", [linear, cosine, amos])
def test_impossible_schedules_are_refused_with_the_value(schedule):
    with pytest.raises(ValueError, match=r"total_steps must be at least 1, got 0"):
        schedule(0)
    with pytest.raises(ValueError, match=r"final must be in \[0, 1\], got 1\.5"):
        schedule(10, final=1.5)
    with pytest.raises(ValueError, match=r"final must be above 0"):
        amos(10, final=0.0)
