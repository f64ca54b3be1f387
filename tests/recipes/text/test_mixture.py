"""Several sources: shares of the tokens as asked for, an order that only the position decides."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lion_lightning.data.sampler import SourceTurns, StreamOrder
from lion_lightning.errors import ConfigError
from lion_lightning.recipes.bert_mlm.data import TextBlocks
from lion_lightning.recipes.text.corpus import PythonDocs, mixture_of


@pytest.mark.parametrize("weights", [[3, 1], [0.5, 0.3, 0.2], [1, 1e-3], [0.7, 0.1, 0.1, 0.1], [1], [2 / 3, 1 / 3]])
def test_shares_are_the_weights_in_every_stretch(weights: list[float]) -> None:
    turns = SourceTurns(weights)
    sources = [turns.at(position)[0] for position in range(20_000)]
    for begin, length in ((0, 64), (0, 1000), (777, 64), (12_345, 5000)):
        counts = Counter(sources[begin : begin + length])
        for source, weight in enumerate(weights):
            assert abs(counts[source] - length * weight / sum(weights)) <= 2.5


def test_each_source_counts_its_own_turns() -> None:
    turns = SourceTurns([3, 1, 0.37])
    taken: Counter[int] = Counter()
    for position in range(20_000):
        source, ordinal = turns.at(position)
        assert ordinal == taken[source]
        taken[source] += 1


def test_every_item_of_a_source_comes_once_before_any_comes_again() -> None:
    order = StreamOrder([7, 50], seed=3, weights=[1, 1])
    indices = [order.index(position) for position in range(140)]
    small, large = ([index for index in indices if (index < 7) is low] for low in (True, False))
    assert all(sorted(small[at : at + 7]) == list(range(7)) for at in range(0, 70, 7))
    assert sorted(large[:50]) == list(range(7, 57))
    assert small[:7] != small[7:14]
    backwards = [order.index(position) for position in reversed(range(140))]
    assert backwards[::-1] == indices


@pytest.mark.parametrize("weights", [[], [0, 1], [-1], [float("nan")], [float("inf")]])
def test_bad_weights_are_named(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        SourceTurns(weights)


def test_a_mixture_trains_on_its_sources_by_weight(tmp_path: Path, prose: Path) -> None:
    text = prose.read_text(encoding="utf-8")
    (tmp_path / "prose.txt").write_text(text[:40_000], encoding="utf-8")
    (tmp_path / "numbers.txt").write_text("\n\n".join(f"{n} times {n} is {n * n}." for n in range(9000)))
    data = TextBlocks(
        batch_size=8, sequence_length=16, vocab_size=400, val_fraction=0.3, cache_dir=str(tmp_path / "cache"),
        sources=[{"path": str(tmp_path / "prose.txt"), "weight": 3}, {"path": str(tmp_path / "numbers.txt")}],
    )  # fmt: skip
    data.setup("fit")
    order = data._order()
    first = data.ready.rows[0]
    assert sum(data.ready.rows) == len(data.ready.train)
    assert sum(order.index(position) < first for position in range(400)) == 300
    line = data.describe()["sources (blocks)"]
    assert "75.0% of the tokens from" in line
    assert "25.0%" in line


@pytest.mark.parametrize(
    ("sources", "named"),
    [
        (None, r"data=mixture needs data\.sources="),
        ([], r"data=mixture needs data\.sources="),
        ([{"weight": 1}], "each source needs one of path, hub, corpus"),
        ([{"path": "a", "hub": "b"}], "each source needs one of path, hub, corpus"),
        ([{"path": "PROSE", "weight": 0}], "weight must be above 0, got 0"),
        ([{"path": "PROSE", "weight": "much"}], "weight must be above 0, got 'much'"),
        ([{"path": "PROSE", "split": "train"}], "split means nothing for a source with path"),
        ([{"hub": "a", "splitt": "train"}], "splitt"),
        ([{"path": "/nowhere"}], "no such file or folder"),
    ],
)
def test_bad_sources_are_named(prose: Path, sources: list[dict[str, Any]] | None, named: str) -> None:
    for source in sources or ():
        if source.get("path") == "PROSE":
            source["path"] = str(prose)
    with pytest.raises(ConfigError, match=named):
        mixture_of(sources)


def test_a_source_may_be_any_corpus() -> None:
    (source,) = mixture_of([{"corpus": PythonDocs(), "weight": 2}]).sources
    assert (source.label, source.weight) == ("PythonDocs", 2.0)


def test_one_limit_cannot_hold_for_several_sources(prose: Path) -> None:
    with pytest.raises(ConfigError, match="limit_train_samples is for one source"):
        TextBlocks(sources=[{"path": str(prose)}] * 2, batch_size=4, limit_train_samples=7)
