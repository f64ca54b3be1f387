"""The statistics, on runs whose numbers are known."""

import math

import pytest

from lion_lightning.tracking.compare import Incomparable, compare, guess_mode, holm, welch


@pytest.fixture
def four(make_run):
    """Lion and AdamW, two seeds each; AdamW's bests are 1.0 and 2.0, so the target is 1.5."""
    return [
        make_run("lion", 1, [4.0, 1.4, 1.2]),
        make_run("lion", 2, [4.0, 3.0, 1.4]),
        make_run("adamw", 1, [3.0, 1.0, 1.1]),
        make_run("adamw", 2, [3.0, 2.0, 2.5]),
    ]


def test_best_and_final_over_seeds(four):
    comparison = compare(four)
    best = comparison.best(comparison.variant("lion"))
    assert best.values == (1.2, 1.4)
    assert best.mean == pytest.approx(1.3)
    assert best.std == pytest.approx(math.sqrt(2) * 0.1), "the sample deviation"
    adamw = comparison.variant("adamw")
    assert (comparison.best(adamw).mean, comparison.final(adamw).mean) == (1.5, pytest.approx(1.8))


def test_more_is_better_for_an_accuracy(make_run):
    runs = [
        make_run(name, 1, values, metric="val/top1") for name, values in (("lion", [0.2, 0.9]), ("adamw", [0.8, 0.7]))
    ]
    comparison = compare(runs)
    assert [variant.label for variant in comparison.ranking] == ["lion", "adamw"]
    assert comparison.target == 0.8
    assert comparison.to_target(comparison.variant("lion"), "steps") == [20.0]
    assert guess_mode("val/top1") == guess_mode("val/accuracy") == "max"
    assert guess_mode("val/loss") == guess_mode("val/perplexity") == "min"


def test_the_target_is_the_baselines_mean_best_and_those_who_miss_it_do_not_count(four):
    comparison = compare(four)
    assert (comparison.baseline.label, comparison.target) == ("adamw", 1.5)
    assert comparison.to_target(comparison.variant("lion"), "steps") == [20.0, 30.0]
    assert comparison.to_target(comparison.variant("lion"), "seconds") == [10.0, 15.0]
    assert comparison.to_target(comparison.variant("lion"), "samples") == [20 * 64, 30 * 64]
    assert comparison.to_target(comparison.variant("adamw"), "steps") == [20.0], "the second seed never was that good"
    assert comparison.axes == ["steps", "samples", "seconds"]


def test_the_baseline_can_be_chosen(four):
    assert compare(four, baseline="lion").target == pytest.approx(1.3)
    assert compare([run for run in four if run.name != "r-adamw-s1"][:2]).baseline.label == "lion", (
        "no adamw: the first"
    )
    with pytest.raises(Incomparable, match="there is no sgd to compare with; there are: lion, adamw"):
        compare(four, baseline="sgd")


def test_welch_against_the_textbook():
    """Student's sleep data (1908), as R's `t.test(extra ~ group)` prints them: t = -1.8608, p = 0.07939."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    test = welch(first, second)
    assert test.p == pytest.approx(0.07939, abs=5e-6)
    assert (test.low, test.high) == (pytest.approx(-3.3654832), pytest.approx(0.2054832))


def test_the_difference_by_seed_against_the_textbook(make_run):
    """The same data, paired: R prints the interval -2.4598858 to -0.7001142."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    runs = [make_run("lion", seed, [value]) for seed, value in reversed(list(enumerate(first)))]
    runs += [make_run("adamw", seed, [value]) for seed, value in enumerate(second)]
    comparison = compare(runs)
    assert comparison.paired_error(comparison.variant("lion")) == pytest.approx((2.4598858 - 0.7001142) / 2)
    assert math.isnan(comparison.paired_error(comparison.baseline))
    comparison = compare(runs[1:])
    assert math.isnan(comparison.paired_error(comparison.variant("lion"))), "other seeds"


def test_p_is_corrected_for_the_number_of_comparisons(make_run):
    assert holm([0.01, 0.04, math.nan, 0.03, 0.005])[:2] == pytest.approx([0.03, 0.06])
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02]), "as R's p.adjust"
    bests = {"lion": (1.0, 1.1, 1.2), "sgd": (1.3, 1.5, 1.9), "adamw": (1.4, 1.6, 1.8)}
    comparison = compare([make_run(name, seed, [best]) for name, own in bests.items() for seed, best in enumerate(own)])
    test = comparison.against_baseline(comparison.variant("lion"))
    assert test.p == pytest.approx(2 * welch(bests["lion"], bests["adamw"]).p)


def test_one_seed_cannot_be_tested(make_run):
    runs = [make_run("lion", 1), make_run("adamw", 1), make_run("adamw", 2)]
    comparison = compare(runs)
    assert comparison.against_baseline(comparison.variant("lion")) is None
    assert math.isnan(welch([1.0, 1.0], [1.0, 1.0]).p)
    assert math.isnan(welch([0.97, 0.97, 0.97], [1.0, 1.0, 1.0]).p), "nothing varies, so nothing was tested"


def test_runs_that_did_not_finish_are_kept_apart(make_run):
    runs = [
        make_run("lion", 1, [2.0]),
        make_run("lion", 2, [0.1], state="crashed", exit_code=None),
        make_run("lion", 3, [0.1], state="failed", exit_code=42),
        make_run("adamw", 1, [3.0]),
        make_run("adamw", 2, [0.1], state="running", exit_code=None),
    ]
    comparison = compare(runs)
    lion = comparison.variant("lion")
    assert comparison.best(lion).values == (2.0,)
    assert [run.state for run in lion.others] == ["crashed", "failed"]
    assert comparison.target == 3.0
    assert len(comparison.runs) == 5


def test_nothing_has_finished_yet(make_run):
    comparison = compare([make_run("lion", 1, state="running", exit_code=None)])
    assert comparison.ranking == []
    assert math.isnan(comparison.target)


def test_of_two_runs_of_a_seed_the_newest_finished_one_counts(make_run):
    runs = [
        make_run("lion", 1, [3.0], created="2026-01-01"),
        make_run("lion", 1, [2.0], created="2026-01-02"),
        make_run("lion", 1, [1.0], created="2026-01-03", state="crashed", exit_code=None),
    ]
    comparison = compare(runs)
    assert comparison.best(comparison.variant("lion")).values == (2.0,)
    assert comparison.remarks == ["lion, seed 1: 3 runs; the newest finished one counts"]


def test_a_run_that_had_nothing_left_to_do_does_not_hide_the_one_that_did_it(make_run):
    picture = {"trainer/global_step": 0, "val/predictions.path": "table.json"}
    again = make_run("lion", 1, [], created="2026-01-02", config={"resume": "auto"}, rows=[picture])
    comparison = compare([make_run("lion", 1, [3.0, 2.0], created="2026-01-01"), again, make_run("adamw", 1)])
    assert comparison.best(comparison.variant("lion")).values == (2.0,)
    assert comparison.remarks == ["lion, seed 1: 2 runs; the newest finished one counts"]


def test_runs_with_other_data_are_no_repeats_of_a_seed(make_run):
    def data(seed: int) -> dict[str, object]:
        return {"data": {"name": "d", "batch_size": 64, "seed": seed}}

    runs = [make_run("lion", 1, [2.0]), make_run("lion", 1, [9.0], created="later", config=data(2))]
    runs += [make_run("adamw", 1, [1.0]), make_run("adamw", 1, [7.0], config=data(2))]
    comparison = compare(runs)
    assert comparison.best(comparison.variant("lion")).values == (2.0, 9.0)
    assert comparison.remarks == []
    # The differences are 1 and 2: the quantile of one degree of freedom is 12.706, their standard error 0.5.
    assert comparison.paired_error(comparison.variant("lion")) == pytest.approx(12.706 * 0.5, rel=1e-3)


def test_a_resumed_run_carries_its_first_part(make_run):
    first = make_run("lion", 1, [3.0, 1.0, 9.0], created="2026-01-01", state="crashed", exit_code=None)
    whole = make_run("lion", 1, [9.0, 9.0, 2.0, 1.5], created="2026-01-02", config={"resume": "last.ckpt"})
    rest = [row for row in whole.history if row["trainer/global_step"] >= 20]
    rest = [{**row, "perf/seconds": row["perf/seconds"] - 10.0} if "perf/seconds" in row else row for row in rest]
    resumed = make_run("lion", 1, [], created="2026-01-02", config={"resume": "last.ckpt"}, rows=rest)
    comparison = compare([first, resumed])
    (joined,) = comparison.variant("lion").counted
    steps, values = joined.curve("val/loss", "steps")
    assert (steps.tolist(), values.tolist()) == ([10, 20, 30, 40], [3.0, 1.0, 2.0, 1.5]), "9.0 came after the crash"
    assert joined.curve("val/loss", "seconds")[0].tolist() == [5, 10, 15, 20]
    assert "goes on from the one before" in comparison.remarks[0]


def test_a_run_resumed_twice_carries_both_parts(make_run):
    values = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    whole = make_run("lion", 1, values)
    parts = []
    for number, first in enumerate((0, 20, 40)):
        rows = [row for row in whole.history if first <= row["trainer/global_step"] < first + 20]
        rows = [{key: x - first / 2 if key == "perf/seconds" else x for key, x in row.items()} for row in rows]
        end = {"state": "crashed", "exit_code": None} if number < 2 else {}
        parts.append(make_run("lion", 1, [], created=f"2026-01-0{number}", config={"resume": "auto"}, rows=rows, **end))
    (joined,) = compare(parts).variant("lion").counted
    assert joined.curve("val/loss")[1].tolist() == values
    assert joined.curve("val/loss", "seconds")[0].tolist() == whole.curve("val/loss", "seconds")[0].tolist()


def test_a_run_that_crashed_at_once_takes_no_axis_from_the_others(make_run):
    lost = make_run("lion", 2, [], state="crashed", exit_code=None, rows=[{"trainer/global_step": 0, "guard/lr": 1.0}])
    assert compare([make_run("lion", 1), make_run("adamw", 1), lost]).axes == compare([make_run("lion", 1)]).axes


def test_runs_without_seeds_count_one_by_one(make_run):
    comparison = compare([make_run("lion", None, [2.0]), make_run("lion", None, [4.0], created="later")])
    assert comparison.best(comparison.variant("lion")).values == (2.0, 4.0)
    assert "no `seed` in the configuration" in comparison.remarks[0]


def test_unlike_groups_are_refused_with_the_reason(make_run):
    runs = [make_run("lion", 1, group="short"), make_run("adamw", 1, group="long")]
    with pytest.raises(Incomparable, match=r"2 groups: long \(1 runs\); short \(1 runs\)"):
        compare(runs)
    mixed = compare(runs, unlike=True)
    assert mixed.remarks[0].startswith("UNLIKE RUNS")


def test_unlike_settings_in_one_group_are_refused_by_name(make_run):
    runs = [
        make_run("lion", 1),
        make_run("adamw", 1, config={"recipe": {"monitor": "val/loss", "mode": "min", "smoothing": 0.1}}),
    ]
    with pytest.raises(Incomparable, match=r"recipe\.smoothing is missing \(r-lion-s1\) and 0\.1 \(r-adamw-s1\)"):
        compare(runs)


def test_a_different_validation_text_is_refused(make_run):
    entropy = [[{"trainer/global_step": 0, "data/unigram_entropy": value}] for value in (5.9, 5.8)]
    runs = [make_run("lion", 1, rows=entropy[0]), make_run("adamw", 1, rows=entropy[1])]
    with pytest.raises(Incomparable, match=r"unigram entropy 5\.8, 5\.9"):
        compare(runs)


@pytest.mark.parametrize(
    "config",
    [
        {"run_dir": "elsewhere"},
        {"logger": {"mode": "online"}},
        {"schedule": {"name": "linear"}},
        {"guard": {"warmup_steps": 3}},
        {"checkpoint": {"keep": 3}},
        {"optim": {"name": "adamw", "lr": 7.0}},
    ],
    ids=str,
)
def test_optimizer_schedule_guard_and_names_may_differ(make_run, config):
    compare([make_run("lion", 1), make_run("adamw", 1, config=config)])


def test_settings_of_one_optimizer_become_variants_of_it(make_run):
    runs = [
        make_run("lion", seed, config={"optim": {"name": "lion", "lr": lr, "betas": [0.9, 0.99]}})
        for lr in (3e-4, 4e-5)
        for seed in (1, 2)
    ] + [make_run("adamw", 1)]
    labels = [variant.label for variant in compare(runs).variants]
    assert labels == ["lion (lr 0.0003)", "lion (lr 4e-05)", "adamw"]


def test_what_follows_from_it_is_set_aside(make_run):
    runs = [
        make_run("lion", 1, config={"data": {"batch_size": size}, "optim": {"name": "lion", "lr": size / 1e4}})
        for size in (8, 64)
    ]
    labels = [variant.label for variant in compare(runs, by=["data.batch_size"], aside=["optim.lr"]).variants]
    assert labels == ["lion (batch_size 8)", "lion (batch_size 64)"]


def test_files_of_a_run_make_no_variant(make_run):
    runs = [make_run("lion", seed, config={"guard": {"trace": f"outputs/{seed}/guard.csv"}}) for seed in (1, 2)]
    assert [variant.label for variant in compare(runs).variants] == ["lion"]


def test_what_is_compared_can_be_named(make_run):
    sizes = [
        make_run("lion", 1, group=f"g{size}", config={"data": {"name": "d", "batch_size": size}}) for size in (8, 64)
    ]
    with pytest.raises(Incomparable):
        compare(sizes)
    labels = [variant.label for variant in compare(sizes, by=["data.batch_size"]).variants]
    assert labels == ["lion (batch_size 8)", "lion (batch_size 64)"]


def test_a_metric_that_is_not_there_names_those_that_are(make_run):
    with pytest.raises(Incomparable, match=r"no run has logged val/nothing; there are: .*val/loss"):
        compare([make_run()], metric="val/nothing")
    with pytest.raises(Incomparable, match="name it with --metric"):
        compare([make_run(config={"recipe": {}})])


def test_bands_are_means_over_seeds_at_the_steps_they_share(make_run):
    runs = [make_run("lion", 1, [4.0, 2.0, 1.0]), make_run("lion", 2, [6.0, 4.0])]
    comparison = compare(runs)
    band = comparison.band(comparison.variant("lion"), "seconds")
    assert band.x.tolist() == [5.0, 10.0]
    assert band.mean.tolist() == [5.0, 3.0]
    assert band.std == pytest.approx([math.sqrt(2)] * 2)
    assert len(band.finished) == 2


def test_guard_events_lie_on_the_curve(make_run):
    events = [{"trainer/global_step": step, "guard/events": count} for step, count in ((4, 0.0), (14, 1.0))]
    comparison = compare([make_run("lion", 1, [3.0, 1.0], rows=events)])
    assert comparison.band(comparison.variants[0]).events == [(15.0, 2.0)]


def test_costs_are_means_of_what_was_logged(make_run):
    rows = [{"trainer/global_step": 29, "perf/peak_memory_gib": 2.0, "perf/bytes_per_parameter": 8.0}]
    comparison = compare([make_run("lion", 1, rows=rows), make_run("lion", 2)])
    assert comparison.costs(comparison.variants[0]) == {
        "step_ms": 500.0,
        "peak_memory_gib": 2.0,
        "bytes_per_parameter": 8.0,
    }
