"""The experiments of docs/experiments.md by name: `python scripts/experiments.py optimizers recipe=bert_mlm`.

Every run is a process with a folder under outputs/experiments/, so a crash stops that run alone. A finished run is not
repeated, an interrupted one resumes. At the end the runs are compared (lion-compare). `--choose-rate` chooses the
learning rate of each variant first, with a seed and on a split of the training data that the comparison does not use.
"""

import argparse
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lion_lightning.__main__ import composed, report_error
from lion_lightning.commands import compare
from lion_lightning.commands.tune import SEEDS
from lion_lightning.errors import ConfigError
from lion_lightning.tracking.compare import Goal, relevant_settings
from lion_lightning.tracking.runs import Run, find_runs, read_file
from lion_lightning.training.logging_setup import redacted
from lion_lightning.training.search_split import SearchSplit

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_OF_THE_GUARD = 42  # a run that the guard ended is a result and is not repeated
PLAIN = re.compile(r"[\w./-]+", re.ASCII)  # what Hydra takes without quotes
PASSES = (13, 4, 1)
BATCH_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
VALIDATIONS = 8
WARM_UPS = (0.0, 0.03, 0.1, 0.3, 0.5)  # shares of the run
FACTORS, MOST_FACTORS = (1.0, 0.5, 2.0), 7  # of the learning rate, where it is chosen
RATES = {"lion": (5e-4, 1e-3, 2e-3, 4e-3), "adamw": (1.5e-3, 3e-3, 6e-3, 1.2e-2)}
Variants = dict[str, list[str]]


@dataclass(frozen=True)
class Experiment:
    """A question that a comparison answers.

    Attributes:
        question: For the help text.
        variants: Takes the overrides of the command line and returns, by folder name, the overrides of each variant.
        by, aside: The options of `lion-compare`.
        each_group: Whether the runs of each batch size or amount of data are compared for themselves too.
        own_rates: Whether the question is about the variants' learning rates, which then are not chosen.
    """

    question: str
    variants: Callable[[list[str]], Variants]
    by: tuple[str, ...] = ()
    aside: tuple[str, ...] = ()
    each_group: bool = False
    own_rates: bool = False


def optimizers(overrides: list[str]) -> Variants:
    """Each optimizer with its tuned settings."""
    return {optim: [f"optim={optim}"] for optim in ("lion", "adamw", "signum", "adafactor", "muon")}


def published(overrides: list[str]) -> Variants:
    """The two published settings for Lion on BERT, with tuned Lion and AdamW beside them."""
    return {
        "lion-paper": ["optim=lion", "tuned=paper_base_language"],
        "lion-amos": ["optim=lion", "tuned=amos_bert_base"],
        "lion-tuned": ["optim=lion"],
        "adamw": ["optim=adamw"],
    }


def batch_size(overrides: list[str]) -> Variants:
    """Batches of 8 to 1,024 over the same number of samples."""
    cfg = _composed(overrides)
    samples = _max_steps(cfg) * cfg.data.batch_size
    lengths = {size: max(VALIDATIONS, round(samples / size)) for size in BATCH_SIZES}
    return {
        f"{optim}-{size}": [
            f"optim={optim}", f"data.batch_size={size}", f"trainer.max_steps={steps}",
            f"trainer.val_check_interval={max(1, steps // VALIDATIONS)}", "guard.min_batch_size=0",
            *_translated(optim, overrides, size, steps),
        ]
        for optim in ("lion", "adamw") for size, steps in lengths.items()
    }  # fmt: skip


def passes(overrides: list[str]) -> Variants:
    """Thirteen, four and one passes over the data in the same steps: over its first samples, or all of them."""
    cfg = _composed(overrides)
    steps, size = _max_steps(cfg), cfg.data.batch_size * cfg.trainer.accumulate_grad_batches
    return {
        f"{optim}-{count}": [
            f"optim={optim}",
            f"data.limit_train_samples={steps * size // count}",
            *_translated(optim, overrides, size, steps),
        ]
        for count in PASSES
        for optim in ("lion", "adamw")
    }


def _translated(optim: str, overrides: list[str], size: int, steps: int) -> list[str]:
    """An optimizer's settings for batches of `size` and `steps` in place of the recipe's own.

    The rate scales with the root of the batch, which suits sign-like updates (Malladi et al., 2022, arXiv:2205.10287).
    Betas keep their half-lives in samples (Marek et al., 2025, arXiv:2507.07101), and the decay the share of the run
    over which a weight forgets, 1 / (lr * decay) steps (Bergsma et al., 2025, arXiv:2505.13738).
    """
    kept = [word for word in overrides if word.startswith(("recipe=", "tuned=", "~tuned", "optim.", "hydra."))]
    usual = _composed([*kept, f"optim={optim}"])
    batches, length = size / usual.data.batch_size, steps / _max_steps(usual)
    root = math.sqrt(batches)
    return [
        f"optim.lr={usual.optim.lr * root:.4g}",
        f"optim.betas=[{','.join(f'{beta**batches:.6g}' for beta in usual.optim.betas)}]",
        f"optim.weight_decay={usual.optim.weight_decay / (root * length):.4g}",
    ]


def warm_up(overrides: list[str]) -> Variants:
    """Warm-up x learning rate, without conf/tuned: betas and decay of Wen et al. (2025, arXiv:2509.02046)."""
    steps = _max_steps(_composed(overrides))
    fixed = {
        "lion": ["optim.betas=[0.9,0.95]", "optim.weight_decay=0.7"],
        "adamw": ["optim.betas=[0.9,0.98]", "optim.weight_decay=0.1"],
    }
    return {
        f"{optim}-lr{lr:g}-w{share:g}": [
            f"optim={optim}", "~tuned", *fixed[optim], f"optim.lr={lr:g}", "guard.on_divergence=warn",
            f"guard.warmup_steps={round(share * steps)}",
        ]
        for optim, rates in RATES.items() for lr in rates for share in WARM_UPS
    }  # fmt: skip


def _max_steps(cfg: DictConfig) -> int:
    """Optimizer steps of a run, whose warm-up and batches an experiment sets in steps.

    Raises:
        ConfigError: the length is given in passes over the data.
    """
    if cfg.trainer.max_epochs is not None:
        raise ConfigError(
            f"this experiment counts in steps, and trainer.max_epochs is {cfg.trainer.max_epochs}; "
            "add trainer.max_epochs=null trainer.max_steps=STEPS"
        )
    return int(cfg.trainer.max_steps)


EXPERIMENTS = {
    "optimizers": Experiment("Lion, AdamW, SIGNUM, Adafactor and Muon, each with its tuned settings", optimizers),
    "published": Experiment(
        "3e-4 with decay 0.01 and 4e-5 with 0.015, both published for BERT base", published, own_rates=True
    ),
    "batch_size": Experiment(
        "does Lion need batches of 64 and more?",
        batch_size,
        by=("data.batch_size",),
        aside=("trainer.max_steps", "trainer.val_check_interval", "optim"),
        each_group=True,
    ),
    "passes": Experiment(
        "who gains from repeated data?", passes, by=("data.limit_train_samples",), aside=("optim",), each_group=True
    ),
    "warm_up": Experiment("how long a warm-up?", warm_up, by=("optim.lr", "guard.warmup_steps"), own_rates=True),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 if a run failed other than by the guard, or 2 for a mistake."""
    options = _options(arguments)
    try:
        return _run(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except (HydraException, OmegaConfBaseException) as error:
        report_error(error)


def _run(options: argparse.Namespace) -> int:
    """Train and compare; ConfigError for what cannot be run, before anything has been trained for it."""
    experiment = EXPERIMENTS[options.name]
    cfg = _composed(options.overrides)
    folder = options.folder / f"{options.name}-{cfg.recipe.name}"
    _check_possible(options, experiment, cfg)
    variants = experiment.variants(options.overrides)
    if unknown := [name for name in options.only or () if name not in variants]:
        raise ConfigError(f"--only {unknown[0]}: no such variant; there are {', '.join(variants)}")
    variants = {name: own for name, own in variants.items() if name in (options.only or variants)}
    failed = []
    with ThreadPoolExecutor(options.jobs) as pool:
        if options.choose_rate:
            rates = folder.with_name(f"{folder.name}-rates")
            # Composed here and not by the threads: Hydra composes one configuration at a time.
            searches = [
                RateSearch(rates / name, _composed([*options.overrides, *own]), own, options)
                for name, own in variants.items()
            ]
            first = [search.run_at(factor) for search in searches for factor in FACTORS]
            if options.dry_run:
                _print(first)
                print("# then, each at the best of its rates:")
            else:
                _check_finished(first)
                chosen = dict(zip(variants, pool.map(RateSearch.best, searches), strict=True))
                failed = [f"the search for the rate of {name}" for name, more in chosen.items() if more is None]
                variants = {name: variants[name] + more for name, more in chosen.items() if more is not None}
        runs = [
            (run_dir := folder / f"{variant}-s{seed}", command_of(options, own, seed, run_dir))
            for seed in options.seeds
            for variant, own in variants.items()
        ]
        if options.dry_run:
            _print(runs)
            return 0
        _check_finished(runs)
        codes = pool.map(lambda run: train(run[0], run[1], options.threads), runs)
        failed += [run_dir.name for (run_dir, _), code in zip(runs, codes, strict=True) if code]
    keys = {"--by": experiment.by, "--aside": experiment.aside}
    settings = [word for option, names in keys.items() if names for word in (option, ",".join(names))]
    output = options.output or folder / "comparison"
    code = compare.main([str(folder), *settings, "--output", str(output)])
    if experiment.each_group:
        code = code or compare.main([str(folder), "--each-group", "--output", str(output / "each")])
    if failed:
        print(f"failed: {', '.join(failed)}; repeat the command to run them again", file=sys.stderr)
    return EXIT_FAILED if failed else code


def _check_possible(options: argparse.Namespace, experiment: Experiment, cfg: DictConfig) -> None:
    """ConfigError if the options do not go together."""
    if cfg.logger.name != "wandb":
        raise ConfigError(
            f"runs are compared by what W&B has logged, offline too; logger must be wandb, got {cfg.logger.name}"
        )
    if options.choose_rate and experiment.own_rates:
        raise ConfigError(f"--choose-rate: {options.name} is about given learning rates")


def _check_finished(runs: Sequence[tuple[Path, list[str]]]) -> None:
    """Refuses a finished run whose command would now train something else, as after new files in conf/tuned.

    Args:
        runs: Folder and command line of each.

    Raises:
        ConfigError: there is one; it names the first setting that differs.
    """
    for run_dir, command in runs:
        if is_done(run_dir) and (run_dir / "config.yaml").is_file():
            was, now = OmegaConf.load(run_dir / "config.yaml"), _composed(command[1:])
            if now.trainer.precision == "auto":  # the run's file says what it stood for
                now.trainer.precision = was.trainer.precision
            if now.trainer.max_epochs is not None:  # and how many steps that was
                now.trainer.max_steps = was.trainer.max_steps
            plain: list[Any] = [OmegaConf.to_container(cfg, resolve=True) for cfg in (was, now)]
            old, new = (relevant_settings(redacted(one)) for one in plain)  # the file has no secrets
            keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
            if keys:
                key = keys[0]
                more = f" (and {len(keys) - 1} more differ)" if keys[1:] else ""
                raise ConfigError(
                    f"{run_dir} was trained with {key}={old.get(key)}, and the command says {new.get(key)}{more}; "
                    "keep new runs in another place with --folder, or remove the old one"
                )


def _print(runs: Sequence[tuple[Path, list[str]]]) -> None:
    for _, command in runs:
        print("python", shlex.join(command))


def command_of(options: argparse.Namespace, own: Sequence[str], seed: int, run_dir: Path) -> list[str]:
    """The command line of a run, without the interpreter."""
    place = str(run_dir)
    if not PLAIN.fullmatch(place):
        place = QuotedString(place, Quote.single).with_quotes()
    return ["train.py", *options.overrides, *own, f"seed={seed}", f"run_dir={place}", "resume=auto"]


@dataclass(frozen=True)
class RateSearch:
    """The search for the learning rate of a variant.

    Attributes:
        place: The runs' folders are beside it, and begin with its name.
        cfg: The configuration of the variant.
        own: Its overrides.
        options: Of the command line.
    """

    place: Path
    cfg: DictConfig
    own: list[str]
    options: argparse.Namespace

    def settings(self, factor: float) -> list[str]:
        """The overrides for `factor` times the variant's rate, whose decay takes as much of a weight over the run."""
        optim = self.cfg.optim
        decay = [f"optim.weight_decay={optim.weight_decay / factor:.4g}"] if optim.get("weight_decay") else []
        return [f"optim.lr={optim.lr * factor:.4g}", *decay]

    def run_at(self, factor: float) -> tuple[Path, list[str]]:
        """The folder and command line of the run at `factor` times the rate."""
        settings = self.settings(factor)
        rate = settings[0].removeprefix("optim.").replace("=", "")  # Hydra takes no = in a value
        run_dir = self.place.with_name(f"{self.place.name}-{rate}")
        split = f"+callbacks.search_split._target_={SearchSplit.__module__}.SearchSplit"
        return run_dir, command_of(self.options, [*self.own, *settings, split, "export=false"], SEEDS[0], run_dir)

    def best(self) -> list[str] | None:
        """The settings with the best result on `SearchSplit`, as overrides.

        Half, once and twice the variant's rate are tried, and then further ones, seven in all at most, while the best
        is the smallest or largest tried, or all have diverged.

        Returns:
            None where a run failed or all diverged; it is printed.
        """
        goal = Goal(self.cfg.recipe.monitor, self.cfg.recipe.mode)
        found: dict[float, float] = {}
        wanted = list(FACTORS)
        while wanted and len(found) < MOST_FACTORS:
            for factor in wanted:
                run_dir, command = self.run_at(factor)
                if train(run_dir, command, self.options.threads):
                    return None
                runs = [run for run in map(read_file, find_runs(run_dir)) if isinstance(run, Run)]
                diverged = any(run.exit_code == EXIT_OF_THE_GUARD for run in runs)
                found[factor] = (
                    math.nan if diverged else goal.best(x for run in runs for x in run.curve(goal.metric)[1])
                )
                settings = " ".join(self.settings(factor))
                print(f"{self.place.name} with {settings}: {goal.metric} {found[factor]:.4f}", flush=True)
            best = next((factor for factor, value in found.items() if value == goal.best(found.values())), min(found))
            wanted = [best / 2] if best == min(found) else [best * 2] if best == max(found) else []
        if math.isnan(found[best]):
            print(f"{self.place.name}: all of {len(found)} learning rates diverged", flush=True)
            return None
        if wanted:
            print(f"{self.place.name}: the best of {len(found)} learning rates is at their edge", flush=True)
        return self.settings(best)


def train(run_dir: Path, command: list[str], threads: int | None) -> int:
    """Train a run in a process of its own unless it has finished already.

    Args:
        run_dir: The folder of the run.
        command: Its command line, without the interpreter.
        threads: Threads for torch; None for as many as there are cores.

    Returns:
        The exit code; 0 as well for a run that the guard ended.
    """
    if is_done(run_dir):
        print(f"{run_dir.name}: finished already", flush=True)
        return 0
    environment = os.environ if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    code = subprocess.run([sys.executable, *command], check=False, env=environment).returncode
    if code:
        print(f"{run_dir.name}: ended with code {code}", flush=True)
    return 0 if code == EXIT_OF_THE_GUARD else code


def is_done(run_dir: Path) -> bool:
    """Whether a run of `run_dir` has finished, or was ended by the guard."""
    if not run_dir.is_dir():
        return False
    runs = [run for run in map(read_file, find_runs(run_dir)) if isinstance(run, Run)]
    return any(run.state == "finished" or run.exit_code == EXIT_OF_THE_GUARD for run in runs)


def _composed(overrides: list[str]) -> DictConfig:
    return composed([*overrides, "run_dir=outputs"])


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    questions = "; ".join(f"{name}: {experiment.question}" for name, experiment in EXPERIMENTS.items())
    parser.add_argument("name", choices=tuple(EXPERIMENTS), help=questions)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for every run, such as recipe=bert_mlm")
    seeds: dict[str, Any] = {"type": lambda text: [int(seed) for seed in text.split(",")], "default": [1, 2, 3]}
    parser.add_argument("--seeds", **seeds, help="default: 1,2,3")
    only: dict[str, Any] = {"type": lambda text: text.split(","), "metavar": "VARIANT,..."}
    parser.add_argument("--only", **only, help="variants to run, by their names in --dry-run (default: all)")
    parser.add_argument("--folder", type=Path, default=Path("outputs/experiments"), help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="folder of the comparison (default: beside the runs)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; more than 1: one thread each (default: 1)")
    parser.add_argument("--choose-rate", action="store_true", help="choose each variant's learning rate first")
    parser.add_argument("--dry-run", action="store_true", help="print the commands of the runs and exit")
    options = parser.parse_intermixed_args(arguments)
    options.threads = 1 if options.jobs > 1 else None
    return options


if __name__ == "__main__":
    sys.exit(main())
