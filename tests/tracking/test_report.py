"""What a reader is told: sentence, tables, files."""

import csv
import io
import math

import pytest
from rich.console import Console

from lion_lightning.tracking import page, report
from lion_lightning.tracking.compare import compare


@pytest.fixture
def comparison(make_run):
    runs = [make_run("lion", seed, [4.0, 3.0 + seed / 100]) for seed in (1, 2, 3)]
    runs += [make_run("adamw", seed, [3.0, 2.0 + seed / 100]) for seed in (1, 2, 3)]
    events = [{"trainer/global_step": 12, "guard/events": 1.0}]
    runs.append(make_run("lion", 4, [9.0], state="failed", exit_code=42, rows=events))
    return compare(runs)


def shown(comparison, width):
    stream = io.StringIO()
    report.show(comparison, Console(file=stream, width=width))
    return stream.getvalue()


def test_the_verdict_says_who_by_how_much_and_how_surely(comparison, make_run):
    sentence = report.verdict(comparison)
    assert sentence.startswith(
        "val/loss (less is better): adamw is best with 2.0200 ± 0.0100 over 3 seeds, 1.0000 ahead"
    )
    assert "the next, lion; Welch's p < 0.001" in sentence
    one = report.verdict(compare([make_run("lion", 1), make_run("adamw", 1, [5.0])]))
    assert "lion is best" in one
    assert "fewer than two seeds" in one
    assert "nothing to compare it with" in report.verdict(compare([make_run("lion", 1)]))
    running = compare([make_run("lion", 1, state="running", exit_code=None)])
    assert "there is no result yet" in report.verdict(running)


def test_a_difference_that_may_be_chance_is_called_so(make_run):
    runs = [
        make_run(name, seed, [value])
        for name, values in (("lion", (1.0, 3.0)), ("adamw", (1.5, 3.1)))
        for seed, value in enumerate(values)
    ]
    assert "that may be chance (Welch's p = 0." in report.verdict(compare(runs))


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_fit_the_terminal(comparison, width):
    lines = shown(comparison, width).splitlines()
    assert max(map(len, lines)) <= width
    rows = [line.split() for line in lines if line.strip().startswith(("lion", "adamw"))]
    assert rows[1][:1] == ["lion"]
    assert "3.0200" in rows[1]
    assert "+1.0000" in rows[1]
    assert "…" not in shown(comparison, width), "a number is cut off"


@pytest.mark.parametrize("width", [80, 120])
def test_no_cell_is_cut_off(make_run, width):
    """Two rates, an interval and states of runs are more than 80 columns hold in one line."""
    rates = [{"config": {"optim": {"name": "lion", "lr": lr}}} for lr in (1e-3, 3e-3)]
    runs = [make_run("lion", seed, [3.0, 1 + seed / 10], **rate) for rate in rates for seed in (1, 2, 3)]
    runs += [make_run("adamw", seed, [3.0, 1.6 + seed**2 / 100]) for seed in (1, 2, 3)]
    runs += [make_run("lion", 4, state="crashed", exit_code=None, **rates[0])]
    runs += [make_run("lion", 5, state="failed", exit_code=1, **rates[0])]
    several = compare(runs)
    words = shown(several, width).split()
    for _, (header, rows) in report.tables(several):
        assert not {word for row in (header, *rows) for cell in row for word in cell.split()} - set(words)


def test_a_finished_run_without_a_finite_value_is_named(make_run):
    runs = [make_run("lion", seed, [math.nan] if seed == 3 else [3.0, 1.0 + seed]) for seed in (1, 2, 3)]
    comparison = compare([*runs, make_run("adamw", 1, [4.0])])
    assert report.notes(comparison) == ["r-lion-s3 has finished without a finite val/loss: not in any mean"]
    assert report.tables(comparison)[1][1][1][0][:2] == ["lion", "2/3"]


def test_what_does_not_count_is_named_with_its_state(comparison):
    (line,) = report.notes(comparison)
    assert line == "r-lion-s4 is failed with code 42 at step 13 of 40, val/loss 9.0000: not counted (outputs/lion-4)"
    assert " ".join(shown(comparison, 200).split()).count("failed") == 2, "in the table and in words"


def test_markdown_holds_all_of_it(comparison):
    comparison.remarks.append("not read: y")
    text = report.markdown(comparison, "python scripts/compare.py x", "2026-01-02", ["a.png"])
    assert "| **adamw** |" in text
    assert "| lion | 3 + 1 failed | 3.0200 ± 0.0100 |" in text
    assert "![a](a.png)" in text
    assert "- not read: y" in text
    assert "7 runs, 2026-01-02, on Abacus, 2 cores" in text
    assert "python scripts/compare.py x" in text


def test_numbers_come_as_csv(comparison, tmp_path):
    report.write_runs_csv(comparison, tmp_path / "runs.csv")
    rows = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert len(rows) == 7
    assert {(row["optimizer"], row["state"], row["counted"]) for row in rows} >= {("lion", "failed", "False")}
    adamw = next(row for row in rows if row["optimizer"] == "adamw" and row["seed"] == "2")
    assert (float(adamw["best"]), float(adamw["seconds"]), float(adamw["lr"])) == (2.02, 10.0, 1e-3)


def test_the_page_asks_the_network_for_nothing(comparison, tmp_path):
    page.write_page(comparison, tmp_path / "compare.html", "python x <y>", "2026-01-02")
    text = (tmp_path / "compare.html").read_text(encoding="utf-8")
    ours = text.split("<script>", 1)[0] + text.rsplit("</script>", 2)[-2]
    for loading in ("src=", "href=", "@import", "url(", "fetch(", "http"):
        assert loading not in ours
    assert "prefers-color-scheme: dark" in ours
    assert "python x &lt;y&gt;" in text


def test_the_page_survives_not_a_number_and_hostile_names(make_run, tmp_path):
    hostile = "</script><script>alert(1)</script>"
    run = make_run("lion", 1, [3.0, 2.0], rows=[{"trainer/global_step": 25, "val/loss": "NaN"}])
    page.write_page(compare([run, make_run(hostile, 1)]), tmp_path / "compare.html", "x", "y")
    text = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert hostile not in text
    assert "[3.0, 2.0, null]" in text.replace("3.0,2.0,null", "3.0, 2.0, null")


def test_brackets_in_a_name_are_shown_as_they_are(make_run):
    runs = [
        make_run("lion[/x]", 1),
        make_run("lion [v1]", 1),
        make_run("lion [v1]", 2, state="crashed", exit_code=None),
    ]
    text = shown(compare(runs), 120)
    assert "lion[/x]" in text
    assert "r-lion [v1]-s2" in text
