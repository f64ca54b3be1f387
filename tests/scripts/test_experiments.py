"""The experiments by name: each run's command composes, what is done is not run again, a crash stops one run alone."""

import math
import shlex
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lion_lightning.__main__ import composed
from lion_lightning.tracking.runs import read_run
from lion_lightning.tracking.wandb import RunLogger
from scripts import experiments
from scripts.experiments import EXPERIMENTS, main

ROOT = Path(__file__).parents[2]
RECIPES = ("bert_mlm", "image_classification")
SPLIT = "+callbacks.search_split._target_"
BEST_RATE = 1e-3  # of the runs that `log_run` leaves


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_run_composes(compose: Any, name: str, recipe: str) -> None:
    variants = EXPERIMENTS[name].variants([f"recipe={recipe}"])
    assert len(variants) >= 3
    configurations = [compose(f"recipe={recipe}", *own, "run_dir=x") for own in variants.values()]
    assert len({str(cfg) for cfg in configurations}) == len(configurations), "the same run twice"
    assert {cfg.recipe.name for cfg in configurations} == {recipe}


def test_the_published_settings_are_those_of_the_source(compose: Any) -> None:
    variants = EXPERIMENTS["published"].variants([])
    paper, amos = (compose(*variants[name], "run_dir=x").optim for name in ("lion-paper", "lion-amos"))
    assert (paper.lr, paper.weight_decay) == (3e-4, 0.01)
    assert (amos.lr, amos.weight_decay) == (4e-5, 0.015)


@pytest.mark.parametrize("optim", ["lion", "adamw"])
def test_every_batch_size_sees_the_same_samples_with_its_settings_translated(compose: Any, optim: str) -> None:
    given = ["recipe=bert_mlm", "trainer.max_steps=512"]
    variants = EXPERIMENTS["batch_size"].variants(given)
    assert len(variants) == 16
    base = compose("recipe=bert_mlm", f"optim={optim}", "run_dir=x")
    for size in experiments.BATCH_SIZES:
        cfg = compose(*given, *variants[f"{optim}-{size}"], "run_dir=x")
        assert cfg.trainer.max_steps * cfg.data.batch_size == 512 * 64
        assert cfg.optim.lr == pytest.approx(base.optim.lr * (size / 64) ** 0.5, rel=1e-3)
        for beta, usual in zip(cfg.optim.betas, base.optim.betas, strict=True):
            assert math.log(beta) / size == pytest.approx(math.log(usual) / 64, rel=1e-3), "the half-life in samples"
        share, usual_share = (one.optim.lr * one.optim.weight_decay * one.trainer.max_steps for one in (cfg, base))
        assert share == pytest.approx(usual_share, rel=1e-3), "what a weight forgets over the run"
        assert cfg.guard.warmup_steps == base.guard.warmup_steps < 1, "a share of the run"
        assert cfg.trainer.val_check_interval <= cfg.trainer.max_steps


def test_passes_are_over_parts_of_the_data_in_the_same_steps(compose: Any) -> None:
    given = ["recipe=bert_mlm", "trainer.max_steps=2600", "data.batch_size=32"]
    usual = compose("recipe=bert_mlm", "optim=lion", "run_dir=x")
    for name, own in EXPERIMENTS["passes"].variants(given).items():
        cfg = compose(*given, *own, "run_dir=x")
        optim, count = name.split("-")
        assert cfg.optim.name == optim
        assert cfg.data.limit_train_samples * int(count) == 2600 * 32
        assert (cfg.trainer.max_steps, cfg.data.batch_size) == (2600, 32)
        if optim == "lion":
            assert cfg.optim.lr == pytest.approx(usual.optim.lr * 0.5**0.5, rel=1e-3)
            forgotten = (one.optim.lr * one.optim.weight_decay * one.trainer.max_steps for one in (cfg, usual))
            assert next(forgotten) == pytest.approx(next(forgotten), rel=1e-3)


def test_a_dry_run_prints_what_would_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["published", "recipe=bert_mlm", "--seeds", "7,8", "--dry-run", "--folder", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert all(line.startswith("python train.py recipe=bert_mlm optim=") for line in lines)
    assert sum("seed=7" in line for line in lines) == 4


def test_some_variants_of_an_experiment_can_be_run_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["optimizers", "recipe=bert_mlm", "--seeds", "7", "--dry-run", "--folder", str(tmp_path)]
    assert main([*command, "--only", "lion,adamw"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("optim=")[1].split()[0] for line in lines] == ["lion", "adamw"]
    assert main([*command, "--only", "lion,lino"]) == 2
    assert "--only lino: no such variant; there are lion, adamw" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["batch_size", "passes", "warm_up"])
def test_an_experiment_in_steps_refuses_a_length_in_passes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "recipe=cifar10", "--dry-run"]) == 2
    assert "trainer.max_epochs is 30; add trainer.max_epochs=null" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["outputs/runs", "my runs (1)", "é", "a,b=[c]", "it's", "{x}"])
def test_any_folder_can_hold_the_runs(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["optimizers", "recipe=image_classification", "--only", "lion", "--seeds", "1", "--folder", folder]
    assert main([*command, "--dry-run"]) == 0
    (words,) = map(shlex.split, capsys.readouterr().out.splitlines())
    assert composed(words[2:]).run_dir == f"{folder}/optimizers-image_classification/lion-s1"


def test_a_mistyped_recipe_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["optimizers", "recipe=image_clasification", "--dry-run"])
    assert capsys.readouterr().err.count("\n") == 1


LOGGING = threading.Lock()  # W&B has one run at a time in a process; real runs have a process each


def log_run(command: list[str], code: int = 0) -> None:
    """What a training process leaves, without the training."""
    settings = dict(word.split("=", 1) for word in command if "=" in word)
    optim = settings["optim"]
    with LOGGING:
        logger = RunLogger(
            project="p",
            run_name=f"{optim}-s{settings['seed']}",
            group="g",
            save_dir=settings["run_dir"],
            mode="offline",
        )
        config = {"name": optim, "tuned": settings.get("tuned")}
        recipe = {"monitor": "val/top1", "mode": "max"}
        logger.log_hyperparams({"optim": config, "seed": int(settings["seed"]), "recipe": recipe})
        logger.log_metrics({"val/top1": 1 - abs(math.log2(float(settings.get("optim.lr", 1)) / BEST_RATE))}, step=0)
        logger.finish(code)


@pytest.mark.slow
def test_what_is_done_is_not_run_again_and_a_crash_stops_one_run_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ran: list[str] = []
    codes = {"lion-amos-s1": 1, "adamw-s1": 42}

    def process(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        name = Path(next(word for word in command if word.startswith("run_dir="))).name
        ran.append(name)
        code = codes.get(name, 0)
        log_run(command, code)
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(experiments, "subprocess", SimpleNamespace(run=process))
    arguments = ["published", "recipe=image_classification", "--seeds", "1", "--folder", str(tmp_path)]
    assert main(arguments) == 1
    output = capsys.readouterr()
    assert ran == ["lion-paper-s1", "lion-amos-s1", "lion-tuned-s1", "adamw-s1"], "a crash stopped the others"
    assert "failed: lion-amos-s1" in output.err
    assert "is failed with code 42" in " ".join(output.out.split())
    assert (tmp_path / "published-image_classification" / "comparison" / "compare.md").exists()
    codes.clear()
    assert main(arguments) == 0
    assert ran[4:] == ["lion-amos-s1"], "a finished run, and one that the guard ended, are results"


@pytest.mark.parametrize("away", [1, 8, 0.5])
def test_a_rate_is_chosen_on_another_seed_and_split_and_never_at_an_end(
    away: float, monkeypatch: pytest.MonkeyPatch, compose: Any, tmp_path: Path
) -> None:
    commands: list[list[str]] = []

    def process(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        code = 42 if "optim.lr=0.016" in command else 0
        log_run(command, code)
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(experiments, "subprocess", SimpleNamespace(run=process))
    given = ["recipe=image_classification", f"optim.lr={BEST_RATE * away:g}"]
    arguments = ["optimizers", *given, "--only", "lion", "--seeds", "7", "--folder", str(tmp_path), "--choose-rate"]
    arguments += ["--jobs", "2"]
    assert main(arguments) == 0
    *search, final = [dict(word.split("=", 1) for word in command if "=" in word) for command in commands]
    decay = float(compose("recipe=image_classification", "optim=lion", "run_dir=x").optim.weight_decay)
    rates = [float(one["optim.lr"]) for one in search]
    assert min(rates) < BEST_RATE < max(rates), "the best is at an end of what was tried"
    assert {(one["seed"], SPLIT in one) for one in search} == {("101", True)}
    assert all(rate * float(one["optim.weight_decay"]) == pytest.approx(rates[0] * decay, rel=1e-3)
               for rate, one in zip(rates, search, strict=True))  # fmt: skip
    assert float(final["optim.lr"]) == BEST_RATE
    assert (final["seed"], SPLIT in final) == ("7", False)
    assert main(arguments) == 0
    assert len(commands) == len(search) + 1, "a finished run was repeated"


def test_a_variant_without_a_rate_is_left_out_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code = 42

    def process(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        now = code if "optim=lion" in command else 0
        log_run(command, now)
        return subprocess.CompletedProcess(command, now)

    monkeypatch.setattr(experiments, "subprocess", SimpleNamespace(run=process))
    arguments = ["optimizers", "recipe=image_classification", "--only", "lion,adamw", "--seeds", "1", "--choose-rate"]
    arguments += ["--jobs", "2", "--folder"]
    assert main([*arguments, str(tmp_path / "a")]) == 1
    told = capsys.readouterr()
    assert "lion: all of 7 learning rates diverged" in told.out
    assert "failed: the search for the rate of lion;" in told.err
    assert (tmp_path / "a" / "optimizers-image_classification" / "adamw-s1").is_dir()
    assert not (tmp_path / "a" / "optimizers-image_classification" / "lion-s1").exists()
    code = 1
    assert main([*arguments, str(tmp_path / "b")]) == 1
    told = capsys.readouterr()
    assert "ended with code 1" in told.out
    assert "failed: the search for the rate of lion;" in told.err


def test_a_dry_run_of_a_search_prints_its_runs_first_and_each_can_be_typed(
    compose: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["optimizers", "recipe=bert_mlm", "--only", "lion", "--seeds", "7", "--choose-rate", "--dry-run"]
    assert main([*command, "--folder", str(tmp_path)]) == 0
    *search, then, run = capsys.readouterr().out.splitlines()
    assert [SPLIT in line for line in search] == [True] * 3
    assert then == "# then, each at the best of its rates:"
    assert "seed=7" in run
    folders = [compose(*shlex.split(line)[2:]).run_dir for line in (*search, run)]
    assert len(set(folders)) == 4


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["published", "--choose-rate"], "--choose-rate: published is about given learning rates"),
        (["optimizers", "logger=csv"], "logger must be wandb, got csv"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*arguments, "--folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1


@pytest.mark.slow
def test_a_rate_is_chosen_by_real_runs_on_training_data_alone(tmp_path: Path) -> None:
    small = [
        "trainer.max_steps=4",
        "trainer.val_check_interval=2",
        "data.limit_train_samples=256",
        "logger.mode=offline",
    ]
    arguments = ["optimizers", "recipe=image_classification", *small, "--only", "lion", "--seeds", "7"]
    assert main([*arguments, "--folder", str(tmp_path), "--choose-rate"]) == 0
    runs = [read_run(folder) for folder in sorted((tmp_path / "optimizers-image_classification-rates").iterdir())]
    assert len(runs) >= 3
    assert {run.setting("seed") for run in runs} == {101}
    assert all(run.setting("callbacks.search_split._target_").endswith("SearchSplit") for run in runs)


@pytest.mark.slow
@pytest.mark.parametrize("length", ["trainer.max_steps=2", "trainer.max_epochs=1"])
def test_a_finished_run_of_other_settings_is_not_taken_for_the_one_asked_for(
    length: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = [
        "optimizers", "recipe=image_classification", "--only", "lion", "--seeds", "7", "--folder", str(tmp_path),
        length, "trainer.val_check_interval=2", "data.limit_train_samples=128", "logger.mode=offline", "export=false",
    ]  # fmt: skip
    assert main(arguments) == 0
    assert main(arguments) == 0, "the same command was refused"
    monkeypatch.setattr(experiments, "train", lambda *_: pytest.fail("something was trained"))
    capsys.readouterr()
    assert main([*arguments, "optim.lr=0.5"]) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert "lion-s7 was trained with optim.lr=" in told
    assert "the command says 0.5; keep new runs in another place with --folder" in told
    assert main([*arguments, "optim.lr=0.5", "optim.weight_decay=3"]) == 2
    assert "(and 1 more differ)" in capsys.readouterr().err


def test_the_page_names_every_experiment() -> None:
    page = (ROOT / "docs" / "experiments.md").read_text()
    for name in EXPERIMENTS:
        assert f"python scripts/experiments.py {name}" in page
    for command in ("python scripts/weight_noise.py", "python scripts/sign_cosine.py", "lion-tune", "lion-compare"):
        assert command in page
