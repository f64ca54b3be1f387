"""The same search for every optimizer: `lion-tune recipe=image_classification --optim lion,adamw`.

Each optimizer gets the same number of trials, over its own ranges of learning rate, decay, warm-up and betas
(`SPACES`), chosen by Optuna's TPE, after settings that were published where there are some; the ends of a range move
outwards while the best trial lies near them, and the last trials look beyond a winner that is the largest or smallest
value tried, and at betas that no trial had. A trial is a run of full length on each seed. It ends early if, after 60 %
of the run, a validation is worse than the median of the whole trials before it, or if its first seed ends worse than
that median. Validation is on a part of the training data (`SearchSplit`), and not on the data that a comparison
uses. Trials are stored in an SQLite file, so an interrupted search continues, with a CSV file of them beside it. The
winner goes to conf/tuned/<recipe>_<optim>.yaml with the evidence. `--heat-map` trains a grid of learning rate and decay
with the winner's other settings instead, and draws it.
"""

import argparse
import contextlib
import copy
import datetime
import functools
import io
import math
import shlex
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import optuna
import yaml
from filelock import FileLock
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from optuna.trial import TrialState

from lion_lightning.__main__ import CONFIG_FOLDER, composed, report_error
from lion_lightning.command_line import add_config_dir, command_name, search_path, take_trusted, trusted
from lion_lightning.commands.tune_report import draw_heat_map, flatness, tuned_file, write_trials
from lion_lightning.commands.tune_spaces import SPACES, Space, settings_of, short, space_around, untried
from lion_lightning.errors import ConfigError
from lion_lightning.tracking.compare import Mode
from lion_lightning.tracking.report import relative

EXIT_FAILED = 1
EXIT_USAGE = 2
# The winners of an installed package go to the user's own conf/, under names that its conf/tuned does not have.
IS_INSTALLED = CONFIG_FOLDER.parent == Path(__file__).resolve().parents[1]
SQLITE = "sqlite:///"
RANDOM_TRIALS = 8  # before TPE starts to choose
WHOLE_TRIALS = 4  # before a trial can be ended early
EDGE_SHARE = 0.25  # of the trials, the last ones, which try what was missed around the winner
FIRST_RUNG = 0.6  # share of the run; at 0.4 a warm-up of 28 % still looked worse than it ended (docs/experiments.md)
SEEDS = (101, 102)  # comparisons take 1, 2, 3, ...
Run = Callable[[DictConfig, Sequence[pl.Callback]], float]


@dataclass(frozen=True)
class Search:
    """A search of one optimizer: its settings and budget."""

    optim: str
    recipe: str
    overrides: tuple[str, ...]
    trials: int
    seeds: tuple[int, ...]
    storage: str
    heat_map: bool = False

    @property
    def space(self) -> Space:
        """Of `SPACES`, or around the settings in the file of an optimizer that is not there."""
        return SPACES[self.optim] if self.optim in SPACES else space_around(compose(self, {}, self.seeds[0]).optim)

    @property
    def name(self) -> str:
        """The name of the study: it contains everything that makes results differ."""
        kind = "heat_map" if self.heat_map else "search"
        return " ".join((kind, self.recipe, self.optim, *sorted(self.overrides), f"seeds={list(self.seeds)}"))

    @property
    def table(self) -> Path:
        """The CSV file with a row for each trial, beside the storage."""
        name = f"{self.recipe}_{self.optim}_{zlib.crc32(self.name.encode()):08x}.csv"  # other studies, other tables
        return Path(self.storage.removeprefix(SQLITE)).with_name(name)

    @property
    def wanted(self) -> int:
        """Trials of the whole search."""
        return len(self.space.grid()) if self.heat_map else self.trials


class Rungs(pl.Callback):
    """Reports each validation of a trial, and ends it if the pruner says so.

    Args:
        trial: Of the study.
        monitor: The metric that is reported.
    """

    def __init__(self, trial: optuna.Trial, monitor: str) -> None:
        self.trial, self.monitor = trial, monitor

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        value = trainer.callback_metrics.get(self.monitor)
        if value is not None:
            self.trial.report(float(value), trainer.global_step)
            if self.trial.should_prune():
                raise optuna.TrialPruned


def main(arguments: Sequence[str] | None = None, run: Run | None = None) -> int:
    """Run the command line; returns 0, 1 if all trials of an optimizer diverged, or 2 for a mistake.

    Args:
        arguments: None: those of the process.
        run: Trains one configuration, with callbacks, and returns its best metric; None: a real training.
    """
    try:
        options = _options(arguments)
        Path(options.output).mkdir(parents=True, exist_ok=True)  # found out now, not after hours of search
        searches = [_search(optim, options) for optim in options.optim]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except (HydraException, OmegaConfBaseException, OSError) as error:
        report_error(error)
    try:
        studies = [(search, explore(search, run or train)) for search in searches]
    except (HydraException, OmegaConfBaseException, ConfigError, OSError) as error:
        report_error(error)
    diverged = [search.optim for search, study in studies if not any(map(math.isfinite, whole_values(study)))]
    for optim in diverged:
        print(f"{optim}: all of its trials diverged", file=sys.stderr)
    studies = [(search, study) for search, study in studies if search.optim not in diverged]
    if options.heat_map and studies:
        _report_heat_maps(studies, Path(options.picture or f"docs/results/{options.recipe}-lr-decay.png"))
    else:
        for search, study in studies:
            _write_winner(search, study, Path(options.output))
    return EXIT_FAILED if diverged else 0


def explore(search: Search, run: Run) -> optuna.Study:
    """Run the missing trials of a study.

    Args:
        search: The search. A killed trial is repeated; a diverged one counts as the worst.
        run: Trains one configuration, with callbacks, and returns its best metric.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # its warning of an exception is the whole traceback
    mode = compose(search, {}, search.seeds[0]).recipe.mode
    study = study_of(search, mode)
    step = _walk(search, run, mode) if search.heat_map else _search_on(search, run, mode)
    write_trials(finished(study), search.table)
    while (done := len(finished(study))) < search.wanted:
        step(study, done)
        last = finished(study)[-1]
        value = "diverged" if last.value is None else f"{last.value:.4f}"  # ended early at a value that is NaN
        result = f"{value}{' when it was ended early' if last.state == TrialState.PRUNED else ''}"
        print(f"{search.optim} {done + 1}/{search.wanted}: {result} with {_words(last.params)}", flush=True)
        write_trials(finished(study), search.table)
    return study


def study_of(search: Search, mode: Mode) -> optuna.Study:
    """The study of `search`, created if missing.

    A lock lets one process create it: Optuna creates the tables of a new database one by one and fails on a table that
    another process has created in the meantime.

    Args:
        search: The search.
        mode: Whether less (`min`) or more (`max`) of the metric is better.
    """
    with FileLock(f"{search.storage.removeprefix(SQLITE)}.lock"):
        return optuna.create_study(
            study_name=search.name,
            storage=search.storage,
            direction="maximize" if mode == "max" else "minimize",
            load_if_exists=True,
        )


def _search_on(search: Search, run: Run, mode: Mode) -> Callable[[optuna.Study, int], None]:
    """A function that runs one trial, with settings chosen by the sampler."""
    cfg = compose(search, {}, search.seeds[0])
    first_rung = round(FIRST_RUNG * cfg.trainer.max_steps)

    def step(study: optuna.Study, done: int) -> None:
        # The seed depends on the number of finished trials, so that a continued study does not repeat its first draws.
        study.sampler = optuna.samplers.TPESampler(seed=1000 + done, n_startup_trials=RANDOM_TRIALS)
        study.pruner = optuna.pruners.MedianPruner(WHOLE_TRIALS, n_warmup_steps=first_rung - 1)
        space, missed = current_space(search, study)
        published = space.published_trial(cfg.trainer.max_steps)
        if published and published not in [trial.params for trial in finished(study)]:
            study.enqueue_trial(published)
        elif missed and done >= max(RANDOM_TRIALS, (1 - EDGE_SHARE) * search.wanted):
            key, value = next(iter(missed.items()))
            study.enqueue_trial({**study.best_params, key: value})
        study.optimize(lambda trial: _value_of_trial(run, search, space, trial, mode, cfg), n_trials=1)

    return step


def current_space(search: Search, study: optuna.Study) -> tuple[Space, dict[str, Any]]:
    """The space around the best trial so far, and by key a value that was missed; see `untried`."""
    if not any(map(math.isfinite, whole_values(study))):
        return search.space, {}
    space = search.space.around(study.best_params)
    return space, untried(study.best_params, [trial.params for trial in finished(study)], space)


def _value_of_trial(run: Run, search: Search, space: Space, trial: optuna.Trial, mode: Mode, cfg: DictConfig) -> float:
    """The mean of the metric over the seeds; the trial ends after the first if that is worse than the median."""
    params = space.suggest(trial)
    first = _value(run, search, params, search.seeds[0], mode, [Rungs(trial, cfg.recipe.monitor)])
    if not math.isfinite(first):
        return first
    trial.report(first, cfg.trainer.max_steps + 1)
    if len(search.seeds) > 1 and trial.should_prune():
        raise optuna.TrialPruned
    return sum([first, *(_value(run, search, params, seed, mode) for seed in search.seeds[1:])]) / len(search.seeds)


def _walk(search: Search, run: Run, mode: Mode) -> Callable[[optuna.Study, int], None]:
    """A function that runs the next cell of the heat map."""
    fixed = _rest_of_winner(search)
    spans = {key: search.space.ranges[key] for key in search.space.plane}
    distributions: dict[str, optuna.distributions.BaseDistribution] = {
        key: optuna.distributions.FloatDistribution(span.low, span.high, log=True) for key, span in spans.items()
    }

    def step(study: optuna.Study, done: int) -> None:
        cell = search.space.grid()[done]
        values = [_value(run, search, {**fixed, **cell}, seed, mode) for seed in search.seeds]
        value = sum(values) / len(values)
        study.add_trial(optuna.trial.create_trial(params=cell, distributions=distributions, value=value))

    return step


def _value(
    run: Run, search: Search, params: dict[str, Any], seed: int, mode: Mode, callbacks: Sequence[pl.Callback] = ()
) -> float:
    """The best metric of one run; an infinite value of the bad sign for a run that diverged."""
    from lion_lightning.guard.callback import TrainingStopped

    with tempfile.TemporaryDirectory(prefix="lion_lightning-trial-") as folder:
        try:
            value = float(run(compose(search, params, seed, folder), callbacks))
        except TrainingStopped:
            value = math.nan
    return value if math.isfinite(value) else (-math.inf if mode == "max" else math.inf)


def train(cfg: DictConfig, callbacks: Sequence[pl.Callback]) -> float:
    """One real run without output."""
    from lion_lightning.training.run import run
    from lion_lightning.training.search_split import SearchSplit

    with contextlib.redirect_stdout(io.StringIO()):
        return run(cfg, [SearchSplit(), *callbacks])


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The trials that have a value or were ended early, in order."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def whole_values(study: optuna.Study) -> list[float]:
    """The values of the trials that were not ended early, sorted; Optuna gives the others their last report."""
    return sorted(trial.values[0] for trial in finished(study) if trial.state == TrialState.COMPLETE)


def _rest_of_winner(search: Search) -> dict[str, Any]:
    """The best settings of the optimizer's search, without the two of the heat map; empty without a search."""
    try:
        study = optuna.load_study(study_name=replace(search, heat_map=False).name, storage=search.storage)
        best = study.best_params
    except (KeyError, ValueError):
        print(f"{search.optim}: no search yet; all settings except learning rate and decay are those of conf/optim")
        return {}
    return {key: value for key, value in best.items() if key not in search.space.plane}


def compose(search: Search, params: dict[str, Any], seed: int, folder: str = "outputs/tuning") -> DictConfig:
    """The configuration of a trial: nothing of conf/tuned, no logger, no export."""
    cfg = copy.deepcopy(_composed(search))
    cfg.seed, cfg.run_dir = seed, folder
    for key, value in settings_of(params, cfg.trainer.max_steps).items():
        OmegaConf.update(cfg, key, yaml.safe_load(value) if isinstance(value, str) else value, force_add=True)
    return cfg


@functools.cache
def _composed(search: Search) -> DictConfig:
    """What the trials of a search share; Hydra takes a quarter of a second for it."""
    fixed = [f"recipe={search.recipe}", f"optim={search.optim}", "~tuned", "logger=none", "export=false"]
    return composed([*fixed, *search.overrides])


def _write_winner(search: Search, study: optuna.Study, folder: Path) -> None:
    best = study.best_trial
    cfg = compose(search, best.params, search.seeds[0])
    is_own = IS_INSTALLED or any(word.startswith("hydra.searchpath") for word in search.overrides)
    name = f"{search.recipe}_{search.optim}.yaml"
    file = folder / ("own_" * (is_own and (CONFIG_FOLDER / "tuned" / name).is_file()) + name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(tuned_file(best.params, cfg.trainer.max_steps, _evidence(search, study, cfg)), encoding="utf-8")
    print(f"{search.optim}: {cfg.recipe.monitor} {best.value:.4f} with {_words(best.params)} -> {relative(str(file))}")
    if is_own:
        trust = [f"'trust=[{','.join(trusted())}]'"] if trusted() else []
        chosen = " ".join([*trust, f"recipe={search.recipe} optim={search.optim} tuned={file.stem}"])
        print(f"lion-train --config-dir {relative(str(folder.parent))} {chosen} trains with it")


def _evidence(search: Search, study: optuna.Study, cfg: DictConfig) -> str:
    """What was tried, on what, with what result, by which command."""
    trials = finished(study)
    values = whole_values(study)
    numbers = [value for value in values if math.isfinite(value)]
    seeds = f"seed{'s' if len(search.seeds) > 1 else ''} {', '.join(map(str, search.seeds))}"
    command = [*command_name().split(), f"recipe={search.recipe}", *search.overrides, "--optim", search.optim]
    command += ["--trials", str(search.trials), "--seeds", ",".join(map(str, search.seeds))]
    space, missed = current_space(search, study)
    at_edge = ", ".join(short(key) for key in missed if key in space.ranges)
    edges = f"at an edge of what was tried: {at_edge}" if at_edge else "no value is at an edge"
    edges += "".join(f"; not tried: {short(key)} {missed[key]}" for key in missed if key in space.choices)
    return (
        f"{search.recipe}, {cfg.data.name}, {cfg.model.name}, batch {cfg.data.batch_size}, {cfg.trainer.max_steps} "
        f"steps, {seeds}, {datetime.date.today()}: {cfg.recipe.monitor} {study.best_value:.4f} on held-out training "
        f"data, best of {len(trials)} trials (median {numbers[len(numbers) // 2]:.4f}, {len(values) - len(numbers)} "
        f"diverged, {len(trials) - len(values)} ended early). Ranges at the end: {space.describe()}; {edges}. "
        f"{shlex.join(command)}"
    )


def _report_heat_maps(studies: Sequence[tuple[Search, optuna.Study]], file: Path) -> None:
    recipe = compose(studies[0][0], {}, 1).recipe
    results = {
        search.optim: {
            (trial.params[search.space.plane[0]], trial.params[search.space.plane[1]]): float(trial.value or 0.0)
            for trial in finished(study)
        }
        for search, study in studies
    }
    draw_heat_map(
        results, recipe.monitor, recipe.mode, {search.optim: search.space.plane for search, _ in studies}, file
    )
    for optim, cells in results.items():
        share, reach = flatness(cells, recipe.mode)
        print(f"{optim}: {share:.0%} of {len(cells)} cells are within {reach:.4g} of its best {recipe.monitor}")
    print(relative(str(file)))


def _search(optim: str, options: argparse.Namespace) -> Search:
    storage = Path(options.storage)
    storage.parent.mkdir(parents=True, exist_ok=True)
    search = Search(
        optim=optim,
        recipe=options.recipe,
        overrides=tuple(options.overrides),
        trials=options.trials,
        seeds=tuple(options.seeds),
        storage=f"{SQLITE}{storage}",
        heat_map=options.heat_map,
    )
    try:
        search.space  # noqa: B018
    except MissingConfigException as error:
        if f"optim/{optim}" not in str(error):
            raise
        others = "or an optimizer of --config-dir"
        raise ValueError(f"--optim must be of {', '.join(SPACES)}, {others}, got {optim!r}") from error
    if (epochs := compose(search, {}, search.seeds[0]).trainer.max_epochs) is not None:
        raise ValueError(
            f"trainer.max_epochs must be null in a search, which counts in steps, got {epochs}; "
            "add trainer.max_epochs=null trainer.max_steps=STEPS"
        )
    return search


def _words(params: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in params.items()
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("overrides", nargs="*", help="recipe=NAME and Hydra overrides, such as trainer.max_steps=400")
    names = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--optim", type=names, default=list(SPACES), help="optimizers (default: all with a range)")
    parser.add_argument("--trials", type=int, default=24, help="trials for each (default: %(default)s)")
    parser.add_argument(
        "--seeds",
        type=lambda text: [int(seed) for seed in text.split(",")],
        default=list(SEEDS),
        help="seeds of a trial",
    )
    parser.add_argument("--heat-map", action="store_true", help="walk learning rate x decay, and draw it")
    parser.add_argument("--storage", default="outputs/tuning/trials.db", help="SQLite file (default: %(default)s)")
    parser.add_argument(
        "--output", help="folder for the winners (default: conf/tuned, or tuned in the folder of --config-dir)"
    )
    add_config_dir(parser)
    parser.add_argument("--picture", help="the PNG of the heat map (default: docs/results/<recipe>-lr-decay.png)")
    options = parser.parse_intermixed_args(arguments)
    ours = "conf" if IS_INSTALLED else CONFIG_FOLDER
    options.output = options.output or str(Path(*options.config_dir[:1] or [ours]) / "tuned")
    options.overrides = [*take_trusted(options.overrides), *search_path(options.config_dir)]
    recipes = [word.removeprefix("recipe=") for word in options.overrides if word.startswith("recipe=")]
    options.recipe = recipes[-1] if recipes else "bert_mlm"
    options.overrides = [word for word in options.overrides if not word.startswith("recipe=")]
    return options
