"""lion-tune on a made-up loss: equal budgets, searches that go on, winners that compose, an honest map."""

import csv
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import hydra
import optuna
import pytest
from omegaconf import DictConfig, OmegaConf

from lion_lightning.commands import tune
from lion_lightning.commands.tune_report import draw_heat_map, flatness, tuned_file
from lion_lightning.commands.tune_spaces import SPACES, Range, settings_of, untried
from lion_lightning.guard.callback import TrainingStopped
from lion_lightning.training.build import build_data
from lion_lightning.training.search_split import SearchSplit
from tests.processes import run_together

CONF = Path(__file__).parents[2] / "conf"
RECIPE = "recipe=image_classification"
SHORT = ("trainer.max_steps=3", "trainer.val_check_interval=1", "data.batch_size=16")
Runs = list[DictConfig]


def bowl(seen: Runs) -> Callable[..., float]:
    """A metric with its best, 1, at lr 1e-3 and decay 0.1; it notes what it was asked."""

    def run(cfg: DictConfig, callbacks: object = ()) -> float:
        seen.append(cfg)
        return 1 - 0.1 * (math.log10(cfg.optim.lr / 1e-3) ** 2 + math.log10(cfg.optim.weight_decay / 0.1) ** 2)

    return run


def call(tmp_path: Path, run: Callable[..., float], *arguments: str) -> int:
    folders = [
        "--storage",
        str(tmp_path / "trials.db"),
        "--output",
        str(tmp_path),
        "--picture",
        str(tmp_path / "a.png"),
    ]
    seeds = [] if "--seeds" in arguments else ["--seeds", "1"]
    return tune.main([RECIPE, *arguments, *seeds, *folders], run)


@pytest.mark.slow
def test_every_optimizer_gets_the_same_number_of_trials_on_its_own_range(tmp_path: Path) -> None:
    seen: Runs = []
    assert call(tmp_path, bowl(seen), "--optim", "lion,adamw", "--trials", "9") == 0
    for optim in ("lion", "adamw"):
        own = [cfg for cfg in seen if cfg.optim.name == optim]
        assert len(own) == 9
        assert len({cfg.optim.lr for cfg in own}) >= 8, "the last may keep the rate of the best"
        assert len({(tuple(cfg.optim.betas), cfg.guard.warmup_steps) for cfg in own}) > 2
    assert {cfg.logger.name for cfg in seen} == {"none"}


def test_a_search_goes_on_where_it_was(tmp_path: Path) -> None:
    seen: Runs = []
    call(tmp_path, bowl(seen), "--optim", "adamw", "--trials", "3")
    call(tmp_path, bowl(seen), "--optim", "adamw", "--trials", "5")
    assert len(seen) == 5
    assert len({cfg.optim.lr for cfg in seen}) == 5, "the random numbers began again"
    call(tmp_path, bowl(seen), "--optim", "adamw", "--trials", "5")
    assert len(seen) == 5
    call(tmp_path, bowl(seen), "--optim", "adamw", "--trials", "1", "trainer.max_steps=7")
    assert len(seen) == 6, "runs of another length are another search"


@pytest.mark.parametrize(("optim", "lr", "decay"), [("lion", 2e-3, 0.7), ("adamw", 8e-3, 0.1)])
def test_published_settings_are_tried_once(tmp_path: Path, optim: str, lr: float, decay: float) -> None:
    seen: Runs = []
    call(tmp_path, bowl(seen), "--optim", optim, "--trials", "2")
    call(tmp_path, bowl(seen), "--optim", optim, "--trials", "3")
    assert (seen[0].optim.lr, seen[0].optim.weight_decay) == (lr, pytest.approx(decay))
    assert seen[0].guard.warmup_steps == 0.2 * seen[0].trainer.max_steps
    assert [cfg.optim.lr for cfg in seen].count(lr) == 1


def test_a_trial_that_was_killed_is_made_up_for(tmp_path: Path) -> None:
    seen: Runs = []

    def killed(cfg: DictConfig, callbacks: object) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(tmp_path, killed, "--optim", "adamw", "--trials", "4")
    call(tmp_path, bowl(seen), "--optim", "adamw", "--trials", "4")
    assert len(seen) == 4


def test_a_diverged_trial_counts_as_the_worst(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: Runs = []

    def run(cfg: DictConfig, callbacks: object = ()) -> float:
        value = bowl(seen)(cfg)
        if len(seen) == 1:
            raise TrainingStopped("not a number")
        return math.nan if len(seen) == 2 else value

    call(tmp_path, run, "--optim", "lion", "--trials", "4")
    assert len(seen) == 4
    text = (tmp_path / "image_classification_lion.yaml").read_text()
    assert "inf" not in text, "a diverged trial won"
    assert "best of 4 trials" in " ".join(text.replace("#", "").split())
    assert "2 diverged" in " ".join(text.replace("#", "").split())


@pytest.mark.parametrize("kind", [(), ("--heat-map",)])
def test_where_every_trial_diverges_nothing_is_written(
    kind: tuple[str, ...], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call(tmp_path, lambda *_: math.nan, "--optim", "lion", "--trials", "2", *kind) == 1
    assert capsys.readouterr().err == "lion: all of its trials diverged\n"
    assert not [*tmp_path.glob("*.yaml"), *tmp_path.glob("*.png")]


def test_a_trial_that_is_ended_at_a_value_that_is_not_a_number_is_one_of_the_search(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seen: Runs = []

    def run(cfg: DictConfig, callbacks: Sequence[tune.Rungs] = ()) -> float:
        value = bowl(seen)(cfg)
        if len(seen) > 5:
            for step, reading in ((1600, -9.0), (1800, math.nan)):
                callbacks[0].trial.report(reading, step)
            raise optuna.TrialPruned
        return value

    assert call(tmp_path, run, "--optim", "lion", "--trials", "7") == 0
    assert "lion 7/7: diverged when it was ended early with optim.lr" in capsys.readouterr().out


def test_a_mistake_in_the_data_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    storage = ["--storage", str(tmp_path / "trials.db"), "--output", str(tmp_path)]
    wrong = ["data=image_files", f"data.path={tmp_path / 'nowhere'}"]
    with pytest.raises(SystemExit) as ended:
        tune.main([RECIPE, *wrong, "--optim", "lion", "--trials", "1", *storage])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error == f"error: data.path={tmp_path / 'nowhere'}: there is no such file or folder\n"


def test_each_seed_of_a_trial_is_run_and_the_mean_counts(tmp_path: Path) -> None:
    seen: Runs = []

    def run(cfg: DictConfig, callbacks: object = ()) -> float:
        seen.append(cfg)
        return float(cfg.seed)

    call(tmp_path, run, "--optim", "lion", "--trials", "1", "--seeds", "2,5")
    assert [cfg.seed for cfg in seen] == [2, 5]
    (study,) = optuna.get_all_study_summaries(f"sqlite:///{tmp_path / 'trials.db'}")
    assert study.best_trial is not None
    assert study.best_trial.value == 3.5


@pytest.mark.parametrize("optim", list(SPACES))
def test_the_winner_composes_and_says_where_it_comes_from(
    optim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/lion-tune"])
    seen: Runs = []

    def run(cfg: DictConfig, callbacks: object = ()) -> float:
        seen.append(cfg)
        return 1.0 / len(seen)

    assert call(tmp_path, run, "--optim", optim, "--trials", "2", "trainer.max_steps=100") == 0
    written = OmegaConf.load(tmp_path / f"image_classification_{optim}.yaml")
    first = seen[0]
    for key, value in written.optim.items():
        assert OmegaConf.select(first, f"optim.{key}") == pytest.approx(value, rel=6e-3)
    assert first.guard.warmup_steps == pytest.approx(100 * written.guard.warmup_steps, abs=0.6)
    text = (tmp_path / f"image_classification_{optim}.yaml").read_text()
    assert text.startswith(
        "# @package _global_\n# image_classification, digits, vit_micro, batch 64, 100 steps, seed 1"
    )
    command = f"lion-tune recipe=image_classification trainer.max_steps=100 --optim {optim}"
    assert command in " ".join(text.replace("\n#", "").split())
    assert max(map(len, text.splitlines())) <= 120
    assert all(" # " in line for line in text.splitlines() if line.startswith("  "))


def test_the_winner_of_ones_own_folder_does_not_hide_behind_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two files of one name Hydra takes the package's."""
    own = tmp_path / "jürgen's (own), #1" / "conf"
    own.mkdir(parents=True)
    storage = ["--storage", str(tmp_path / "trials.db"), "--seeds", "1", "--trials", "1"]
    assert tune.main([RECIPE, "--optim", "lion", "--config-dir", str(own), *storage], bowl([])) == 0
    assert (own / "tuned" / "own_image_classification_lion.yaml").is_file()
    assert "tuned=own_image_classification_lion trains with it" in capsys.readouterr().out


def test_an_optimizer_of_ones_own_is_searched_around_the_rate_of_its_file(tmp_path: Path) -> None:
    own = Path(__file__).parents[2] / "examples" / "own_project" / "conf"
    seen: Runs = []

    def run(cfg: DictConfig, callbacks: object = ()) -> float:
        seen.append(cfg)
        return 0.5

    assert call(tmp_path, run, "--optim", "sign_momentum", "--trials", "8", "--config-dir", str(own)) == 0
    rates = [cfg.optim.lr for cfg in seen]
    assert 1e-4 <= min(rates) < 5e-4
    assert 2e-3 < max(rates) <= 1e-2
    assert "weight_decay" not in seen[0].optim
    written = OmegaConf.load(tmp_path / "image_classification_sign_momentum.yaml")
    assert set(written.optim) == {"lr"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optim", "lyon"], "--optim must be of lion, adamw"),
        (["--optim", "lion", "--config-dir", "nowhere"], "--config-dir nowhere: no such folder"),
        (["--optim", "stable_adamw", "recipe=cifar"], "Could not find 'recipe/cifar'"),
        (["--optim", "stable_adamw", "optim.foo=1"], "Could not override 'optim.foo'"),
    ],
)
def test_an_unknown_optimizer_or_folder_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = call(tmp_path, bowl([]), *words)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


DATABASES = 5
BESIDE_ANOTHER = f"""
import sys
from pathlib import Path
from lion_lightning.commands.tune import SQLITE, Search, study_of
own, other, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
flags = [folder / f"{{own}}-{{number}}" for number in range({DATABASES})]
try:
    for number, flag in enumerate(flags):
        flag.touch()
        while not (folder / f"{{other}}-{{number}}").exists():
            pass
        study_of(Search(own, "bert_mlm", (), 1, (1,), f"{{SQLITE}}{{folder / str(number)}}.db"), "min")
finally:  # the other one does not wait for a process that failed
    for flag in flags:
        flag.touch()
"""


@pytest.mark.slow
def test_two_searches_that_start_together_share_a_new_database(root: Path, tmp_path: Path) -> None:
    names = ("lion", "adamw")
    pairs = [names, names[::-1]]
    run_together(
        [[sys.executable, "-c", BESIDE_ANOTHER, *pair, str(tmp_path)] for pair in pairs], root, [None] * 2, 120
    )
    for number in range(DATABASES):
        studies = optuna.get_all_study_names(f"{tune.SQLITE}{tmp_path / str(number)}.db")
        assert {study.split()[2] for study in studies} == set(names)


def test_nothing_tuned_before_leaks_into_a_search() -> None:
    search = tune.Search("signum", "bert_mlm", (), 1, (1,), "sqlite://")
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        plain = hydra.compose("train", ["optim=signum", "~tuned", "run_dir=x"])
    assert tune.compose(search, {}, 1).optim == plain.optim


def test_decay_and_warm_up_are_shares_of_the_run() -> None:
    params = {"optim.lr": 0.5, "decay_time": 0.2, "warm_up": 0.25}
    assert settings_of(params, 50) == {
        "optim.lr": 0.5, "optim.weight_decay": pytest.approx(0.2), "guard.warmup_steps": 12
    }  # fmt: skip
    text = tuned_file(params, 50, "why")
    assert "weight_decay: 0.2 " in text, "a weight forgets over 1 / (0.5 * 0.2) steps, a fifth of the run"
    assert "warmup_steps: 0.25 " in text


def test_a_range_moves_outwards_until_the_best_is_not_near_its_end() -> None:
    span = Range(1.0, 100.0)
    assert span.around(10.0) == span
    assert span.around(1.1).low < 0.5
    assert span.around(1.1).high == 100.0
    far = span.around(1e5)
    assert far.high > 1e5
    assert 0.1 <= far.position(1e5) <= 0.9
    assert Range(0.03, 0.3, most=0.4).around(0.39).high == 0.4


def test_a_winner_at_an_edge_is_looked_beyond(tmp_path: Path) -> None:
    seen: Runs = []

    def slope(cfg: DictConfig, callbacks: object = ()) -> float:
        seen.append(cfg)
        return -1 - 0.1 * math.log10(cfg.optim.lr)  # the smaller the rate, the better: no end

    call(tmp_path, slope, "--optim", "lion", "--trials", "20")
    rates = [cfg.optim.lr for cfg in seen]
    assert min(rates) < SPACES["lion"].ranges["optim.lr"].low / 3, "the range did not move"
    text = " ".join((tmp_path / "image_classification_lion.yaml").read_text().replace("\n#", "").split())
    assert "at an edge of what was tried: lr" in text


def test_a_choice_that_no_trial_had_is_tried_with_the_rest_of_the_winner() -> None:
    space = SPACES["lion"]
    best = {"optim.lr": 1e-3, "decay_time": 1.0, "warm_up": 0.1, "optim.betas": "[0.9,0.95]"}
    around = [{**best, **change} for change in (
        {key: span.low for key, span in space.ranges.items()}, {key: span.high for key, span in space.ranges.items()},
    )]  # fmt: skip
    assert untried(best, [best, *around], space) == {"optim.betas": "[0.9,0.9]"}
    every = [{**best, "optim.betas": betas} for betas in space.choices["optim.betas"]]
    assert untried(best, [*every, *around], space) == {}


def test_a_winner_inside_is_said_to_be_inside(tmp_path: Path) -> None:
    call(tmp_path, bowl([]), "--optim", "lion", "--trials", "30")
    text = " ".join((tmp_path / "image_classification_lion.yaml").read_text().replace("\n#", "").split())
    assert "no value is at an edge" in text


def test_the_second_seed_is_for_the_better_half(tmp_path: Path) -> None:
    asked: list[tuple[float, int]] = []

    def run(cfg: DictConfig, callbacks: object = ()) -> float:
        asked.append((cfg.optim.lr, cfg.seed))
        return -abs(math.log10(cfg.optim.lr / 1e-3))

    call(tmp_path, run, "--optim", "lion", "--trials", "24", "--seeds", "101,102")
    first, second = ({lr for lr, seed in asked if seed == number} for number in (101, 102))
    assert len(first) == 24
    assert 8 <= len(second) < 24, "none was ended early"
    best = min(first, key=lambda lr: abs(math.log10(lr / 1e-3)))
    assert best in second
    whole = len(second)  # each has run the second seed
    told = " ".join((tmp_path / "image_classification_lion.yaml").read_text().replace("#", "").split())
    assert f" {24 - whole} ended early" in told
    with next(tmp_path.glob("image_classification_lion_*.csv")).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["trial"]) for row in rows] == list(range(24))
    assert {float(row["optim.lr"]) for row in rows} == first
    assert sum(row["ended_early"] == "True" for row in rows) == 24 - whole
    assert max(float(row["value"]) for row in rows) == -abs(math.log10(best / 1e-3))


class Trial:
    """What `Rungs` asks of a trial; it is pruned from the second report on."""

    def __init__(self) -> None:
        self.reports: list[tuple[float, int]] = []

    def report(self, value: float, step: int) -> None:
        self.reports.append((value, step))

    def should_prune(self) -> bool:
        return len(self.reports) > 1


@pytest.mark.parametrize("recipe", ["bert_mlm", "image_classification", "text_classification"])
def test_every_recipe_trains_and_shows_its_mistakes_on_the_split_of_a_search(recipe: str, tmp_path: Path) -> None:
    options = ("trainer.val_check_interval=2", "trainer.max_steps=2", "logger=csv", "export=true")
    search = tune.Search("lion", recipe, options, 1, (1,), "sqlite://")
    assert math.isfinite(tune.train(tune.compose(search, {}, 1, str(tmp_path)), []))


def test_a_run_ends_at_the_rung_where_it_is_pruned(tmp_path: Path) -> None:
    search = tune.Search("lion", "image_classification", SHORT, 1, (1,), "sqlite://")
    trial = Trial()
    with pytest.raises(optuna.TrialPruned):
        tune.train(tune.compose(search, {}, 1, str(tmp_path)), [tune.Rungs(trial, "val/top1")])  # type: ignore[arg-type]
    assert [step for _, step in trial.reports] == [1, 2], "of three steps"


@pytest.mark.parametrize(("recipe", "share"), [("image_classification", 1 / 5), ("bert_mlm", 1 / 20)])
def test_a_search_validates_on_training_data_alone(recipe: str, share: float, tmp_path: Path) -> None:
    cfg = tune.compose(tune.Search("lion", recipe, (), 1, (1,), "sqlite://"), {}, 1, str(tmp_path))
    data = build_data(cfg)
    whole = data.train_set
    pairs = [(index, index) for index in range(len(whole))]  # type: ignore[arg-type]
    key = "pixels" if recipe == "image_classification" else "input_ids"
    before = whole.__getitems__(pairs)[key]  # type: ignore[attr-defined]
    SearchSplit().setup(SimpleNamespace(datamodule=data), None, "fit")  # type: ignore[arg-type]
    parts = [
        part.__getitems__(pairs[: len(part)])[key]  # type: ignore[arg-type, attr-defined]
        for part in (data.train_set, data.val_set)
    ]
    assert len(parts[0]) + len(parts[1]) == len(before)
    assert len(parts[1]) == pytest.approx(len(before) * share, rel=0.1), "1,438 digits, 7,362 blocks"
    rows = lambda values: sorted(map(tuple, values.flatten(1).tolist()))  # noqa: E731
    assert rows(parts[0]) + rows(parts[1]) != rows(before), "sorted apart"
    assert sorted(rows(parts[0]) + rows(parts[1])) == rows(before), "a sample was lost or is on both sides"


@pytest.mark.slow
def test_the_heat_map_walks_the_grid_with_the_rest_of_the_winner(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: Runs = []
    call(tmp_path, bowl(seen), "--optim", "lion", "--trials", "2")
    betas = max(seen, key=bowl([])).optim.betas
    seen.clear()
    cells = SPACES["lion"].grid()

    def run(cfg: DictConfig, callbacks: object = ()) -> float:
        if len(seen) == 5 and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        return bowl(seen)(cfg)

    interrupted: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        call(tmp_path, run, "--optim", "lion", "--heat-map")
    call(tmp_path, run, "--optim", "lion", "--heat-map")
    steps = seen[0].trainer.max_steps
    assert [cfg.optim.lr for cfg in seen] == [cell["optim.lr"] for cell in cells]
    times = [1 / (cfg.optim.lr * cfg.optim.weight_decay * steps) for cfg in seen]
    assert times == pytest.approx([cell["decay_time"] for cell in cells])
    assert {tuple(cfg.optim.betas) for cfg in seen} == {tuple(betas)}
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "24 cells are within" in capsys.readouterr().out


def test_flatness_is_the_share_of_cells_near_the_best() -> None:
    losses: dict[tuple[float, float], float] = {(i, i): value for i, value in enumerate((2.0, 2.05, 3.0, math.inf))}
    assert flatness(losses, "min") == (0.5, pytest.approx(0.1))
    shares: dict[tuple[float, float], float] = {(0, 0): 0.9, (1, 0): 0.896, (2, 0): 0.89}
    assert flatness(shares, "max") == (pytest.approx(2 / 3), pytest.approx(0.005)), "5 % of the error"


def test_a_map_with_diverged_cells_is_drawn(tmp_path: Path) -> None:
    cells = {(lr, decay): math.inf if lr > 0.5 else lr for lr in (0.1, 1.0) for decay in (0.1, 1.0)}
    draw_heat_map(
        {"lion": cells}, "val/loss", "min", {"lion": ("optim.lr", "optim.weight_decay")}, tmp_path / "map.png"
    )
    assert (tmp_path / "map.png").exists()


def test_the_ranges_are_equally_wide() -> None:
    def width(optim: str, place: int) -> float:
        span = list(SPACES[optim].ranges.values())[place]
        return math.log10(span.high / span.low)

    assert {round(width(optim, 0), 2) for optim in SPACES} == {2.0}
    assert {round(width(optim, 1), 2) for optim in SPACES} == {3.0}
    assert len({len(space.ranges) + len(space.choices) for space in SPACES.values()}) == 1
    assert {len(values) for space in SPACES.values() for values in space.choices.values()} == {4}


def test_a_length_in_passes_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["recipe=cifar10", "--optim", "lion", "--trials", "1"]) == 2
    assert "trainer.max_epochs must be null in a search, which counts in steps, got 30" in capsys.readouterr().err


def test_the_real_thing_trains(tmp_path: Path) -> None:
    storage = ["--storage", str(tmp_path / "trials.db"), "--output", str(tmp_path)]
    assert tune.main([RECIPE, *SHORT, "--optim", "lion", "--trials", "1", "--seeds", "1", *storage]) == 0
    assert "best of 1" in (tmp_path / "image_classification_lion.yaml").read_text().replace("\n# ", " ")
