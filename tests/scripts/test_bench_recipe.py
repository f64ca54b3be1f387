"""bench_recipe.py trains all of them on a few small batches; no timing is asserted."""

import operator
import re
from types import SimpleNamespace

import pytest

from lion_lightning.training.performance import WARMUP_BATCHES
from scripts.bench import bench_recipe, bench_usual

SMALL = {
    "bert_mlm": ["data.batch_size=4", "data.sequence_length=16"],
    "image_classification": ["data.batch_size=4"],
}
ROUND = ["--rounds", "1", "--steps", "2"]
PEERS = {"bert_mlm": "Hugging Face Trainer", "image_classification": "torch loop with image processor"}


@pytest.mark.parametrize("recipe", [pytest.param("bert_mlm", marks=pytest.mark.slow), "image_classification"])
def test_all_are_timed_and_compared(recipe, tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(bench_recipe, "alone", lambda turn, *a: counted.append(turn(*a)) or counted[-1])
    table = tmp_path / "deep" / "table.md"
    overrides = [f"recipe={recipe}", "optim=adamw", "logger=none", *SMALL[recipe]]
    bench_recipe.main([*overrides, *ROUND, "--output", str(table)])
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([\d.,]+) \|", table.read_text(), re.MULTILINE))
    assert set(rows) == {"recipe", "raw loop", PEERS[recipe]}
    assert all(float(value) > 0 for value in rows.values())
    assert " ".join(overrides) in table.read_text()
    assert [len(seconds) for seconds in counted] == [2] * 3, "the first batches are left out, no other"


@pytest.mark.slow
def test_a_turn_has_a_process_of_its_own():
    assert bench_recipe.alone(operator.add, [0.1], [0.2]) == [0.1, 0.2]


def test_rates_and_ratios_are_worked_out_from_medians():
    options = SimpleNamespace(overrides=[], rounds=1, steps=3)
    times = {"recipe": [0.1, 0.2, 9.0], "raw loop": [0.1, 0.1, 0.1]}
    text = bench_recipe.report(options, times, (512, "tokens/s"))
    assert "| recipe | 200.0 | 2,560 |  |" in text
    assert "| raw loop | 100.0 | 5,120 | 0.50x |" in text


def test_a_clock_leaves_the_first_steps_out(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(bench_usual, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks)) ** 2))
    clock = bench_usual.Clock()
    for _ in range(WARMUP_BATCHES + 3):
        clock.tick()
    first = WARMUP_BATCHES
    assert clock.durations == [2 * tick - 1 for tick in range(first, first + 3)]


@pytest.mark.parametrize("override", ["recipe=text_classification", "optim=lion"])
def test_what_has_no_peer_is_said_before_anything_is_trained(override):
    with pytest.raises(SystemExit, match=override):
        bench_recipe.main(["optim=adamw", override])
