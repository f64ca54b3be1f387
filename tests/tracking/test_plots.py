"""Pictures: what is drawn of few variants and of many, units that read well, a legend that covers no curve."""

import numpy as np
import pytest
from PIL import Image

from lion_lightning.commands.compare import write
from lion_lightning.tracking import page, plots
from lion_lightning.tracking.compare import compare

RATES = (3e-5, 1e-4, 3e-4, 1e-3)


@pytest.fixture
def two(make_run):
    return [make_run(name, seed, [4.0, 2.0 + seed / 100]) for name in ("lion", "adamw") for seed in (1, 2, 3)]


@pytest.fixture
def sweep(make_run):
    """Two optimizers at four rates, two seeds each; Lion is lost at the largest."""
    return [
        make_run(
            name, seed, [4.0, 2.0 + seed / 10], config={"optim": {"name": name, "lr": lr}}, run_id=f"{name}{seed}{lr}",
            state="failed" if (name, lr) == ("lion", RATES[-1]) else "finished",
        )
        for name in ("lion", "adamw") for lr in RATES for seed in (1, 2)
    ]  # fmt: skip


def colored(file, number):
    """Pixels in the colour of the curve with this number."""
    color = [int(plots.style_of(number)[0][place : place + 2], 16) for place in (1, 3, 5)]
    with Image.open(file) as drawn:
        return int((np.asarray(drawn.convert("RGB")) == color).all(-1).sum())


def test_a_comparison_has_at_most_two_x_axes(two, tmp_path):
    assert [file.name for file in plots.write_pictures(compare(two), tmp_path)] == [
        "val_loss-samples.png", "val_loss-seconds.png"
    ]  # fmt: skip
    assert plots.write_picture(compare(two), tmp_path / "none.png", metric="nothing") == 0
    assert not (tmp_path / "none.png").exists()


def test_a_single_point_is_seen(make_run, tmp_path):
    runs = [make_run("lion", 1, [3.0]), make_run("adamw", 1, [2.0])]
    assert plots.write_picture(compare(runs), tmp_path / "point.png") == 2
    legend = 60  # more than the line and the marker in the legend have
    assert min(colored(tmp_path / "point.png", number) for number in (0, 1)) > legend


def test_a_variant_that_crashed_before_its_first_validation_has_no_curve(two, make_run, tmp_path):
    lost = make_run("signum", 1, [], state="failed", exit_code=1, rows=[{"trainer/global_step": 0, "train/loss": 9.0}])
    comparison = compare([*two, lost])
    assert "signum" in [variant.label for variant in comparison.variants]
    files = write(comparison, tmp_path, "lion-compare", "2026-01-01")
    assert {"compare.md", "compare.html", "val_loss-samples.png"} <= {file.name for file in files}


@pytest.mark.parametrize("labels", [["a"], ["a long label of a curve " * 4] * 6, [str(n) for n in range(7)]])
def test_the_legend_covers_no_curve(labels, tmp_path):
    with plots.picture(tmp_path / "p.png", "title", "x", "y") as axes:
        for label in labels:
            axes.plot([0, 1], [0, 1], label=label)
    (legend,) = axes.figure.legends
    box = legend.get_window_extent()
    assert not box.overlaps(axes.get_window_extent())
    assert axes.get_window_extent().height > 150, "a picture of its legend"


@pytest.mark.parametrize("word", ["several words ", "bert_mlm-text_files-modernbert_tiny-"])
def test_a_long_title_stays_within_the_picture(word, tmp_path):
    with plots.picture(tmp_path / "p.png", f"{word * (200 // len(word))}\nits second line", "x", "y") as axes:
        axes.plot([0, 1], [0, 1])
    title = axes.figure.get_suptitle()
    assert title.endswith("\nits second line")
    assert axes.figure.texts[0].get_window_extent().x1 < axes.figure.bbox.x1


def test_of_many_groups_the_first_is_named(make_run):
    runs = [make_run("lion", 1, group=f"group-{size}") for size in (8, 16, 32)]
    groups = [plots._group_of(compare(runs[:count], unlike=True)) for count in (1, 2, 3)]
    assert groups == ["group-8", "group-16 and 1 other group", "group-16 and 2 other groups"]


@pytest.mark.parametrize(
    ("axis", "rows", "unit"),
    [
        ("tokens", {"data/tokens_seen": 8e6}, (1e6, "million tokens seen")),
        ("tokens", {"data/tokens_seen": 3e9}, (1e9, "billion tokens seen")),
        ("samples", {"data/samples_seen": 64_000}, (1e3, "thousand samples seen")),
        ("samples", {"data/samples_seen": 900}, (1, "samples seen")),
        ("seconds", {"perf/seconds": 90}, (1, "seconds of training and validation")),
        ("seconds", {"perf/seconds": 600}, (60, "minutes of training and validation")),
        ("seconds", {"perf/seconds": 36_000}, (3600, "hours of training and validation")),
    ],
)
def test_units_keep_numbers_short(make_run, axis, rows, unit):
    run = make_run("lion", 1, [], rows=[{"trainer/global_step": 99, "val/loss": 1.0, **rows}])
    assert plots.axis_unit(compare([run]), axis) == unit


def test_many_variants_are_a_value_against_what_varies(sweep, tmp_path):
    comparison = compare(sweep)
    study = plots.study_of(comparison)
    assert (study.key, study.is_logarithmic, list(study.lines)) == ("optim.lr", True, ["lion", "adamw"])
    assert [value for value, _ in study.lines["adamw"]] == list(RATES)
    assert study.lines["adamw"][0][1].values == (2.1, 2.2)
    assert study.lines["lion"][-1][1].values == (), "no finished run"
    (file,) = plots.write_pictures(comparison, tmp_path)
    assert file.name == "val_loss-lr.png"
    assert min(colored(file, number) for number in (0, 1)) > 150
    page.write_page(comparison, tmp_path / "compare.html", "x", "y")
    text = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert '"study": {"title": "lr", "is_log": true' in text


def test_a_second_setting_makes_a_line_each(make_run):
    runs = [
        make_run("lion", 1, config={"optim": {"name": "lion", "lr": lr, "weight_decay": decay}})
        for lr in RATES for decay in (0.1, 1.0)
    ]  # fmt: skip
    assert list(plots.study_of(compare(runs)).lines) == ["lion (weight_decay 0.1)", "lion (weight_decay 1)"]


def test_many_variants_without_a_number_are_a_ranking(make_run, tmp_path):
    runs = [make_run(f"optimizer-{letter}", seed, [3.0 + seed]) for letter in "abcdefgh" for seed in (1, 2)]
    runs.append(make_run("lost", 1, [9.0], state="crashed", exit_code=None))
    comparison = compare(runs)
    assert plots.study_of(comparison).key is None
    assert [file.name for file in plots.write_pictures(comparison, tmp_path)] == ["val_loss-variants.png"]


def test_a_variant_without_the_number_that_varies_is_not_left_out(make_run, tmp_path):
    runs = [make_run("lion", 1, [3.0], config={"optim": {"name": "lion", "weight_bits": bits}}) for bits in range(8)]
    runs.append(make_run("adamw", 1, [4.0]))
    comparison = compare(runs)
    assert plots.study_of(comparison).key is None
    assert [file.name for file in plots.write_pictures(comparison, tmp_path)] == ["val_loss-variants.png"]


def test_few_variants_are_curves(two):
    assert plots.study_of(compare(two)) is None


def test_a_diverged_run_does_not_flatten_the_others(two, make_run):
    assert plots.limits_of(compare(two), "val/loss") is None
    lost = make_run("signum", 1, [4.0, 1e6, float("nan")])
    low, high = plots.limits_of(compare([*two, lost]), "val/loss")
    assert low < 2.01
    assert 4.0 < high < 5.0
    scores = [make_run(name, 1, values, metric="val/top1") for name, values in (("a", [0.5, 0.9]), ("b", [0.5, -9.0]))]
    low, high = plots.limits_of(compare(scores), "val/top1")
    assert low < 0.5
    assert 0.9 < high < 1.0
    rising = make_run(
        "lion", 4, rows=[{"trainer/global_step": step, "lr/Lion/decay": float(step)} for step in range(9)]
    )
    assert plots.limits_of(compare([rising]), "lr/Lion/decay") is None, "a rate may rise"


def test_more_variants_than_colours_are_told_apart_by_dashes():
    assert len({plots.style_of(number) for number in range(28)}) == 28


def test_an_optimizer_has_one_colour_whatever_it_is_compared_with():
    few, many = ["muon", "lion"], ["sgd", "mine", "lion (lr 0.1)", "lion (lr 0.2)", "adamw", "muon", "own"]
    styles = [dict(zip(labels, plots.styles_of(labels), strict=True)) for labels in (few, many)]
    assert styles[0] == {"muon": styles[1]["muon"], "lion": styles[1]["lion (lr 0.1)"]}
    assert len(set(styles[1].values())) == len(many), "all are told apart"
