"""conf/: every combination composes, every `_target_` is allowed and takes its arguments, every key is explained."""

from __future__ import annotations

import functools
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import pytest
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from conftest import Compose

CONF = Path(__file__).resolve().parent.parent / "conf"
RECIPES, OPTIMIZERS, SCHEDULES, MODELS, LOGGERS, DATA, TUNED = (
    sorted(file.stem for file in (CONF / group).glob("*.yaml"))
    for group in ("recipe", "optim", "schedule", "model", "logger", "data", "tuned")
)
# hydra/help is a page of text, not settings.
FILES = sorted(file for file in CONF.rglob("*.yaml") if "hydra" not in file.relative_to(CONF).parts)
# Labels for people and for Hydra; whatever else a file sets is explained beside it or in the line above.
NEEDS_NO_COMMENT = {"name", "_target_", "_partial_", "defaults"}
# Sizes of a model are named by the line at the top, which cites the paper.
MODEL_SIZES = {
    "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "embedding_size", "hidden_sizes",
    "depths", "layer_type", "hidden_dropout_prob", "attention_probs_dropout_prob", "embedding_dropout",
    "attention_dropout", "mlp_dropout",
}  # fmt: skip


def targets(node: Any) -> Iterator[dict[str, Any]]:
    """Every node with a `_target_` in a plain config."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        for value in node.values():
            yield from targets(value)


def yaml_of(file: Path) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(file))


def plain(cfg: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


def test_the_groups_are_filled() -> None:
    assert {"bert_mlm", "image_classification"} <= set(RECIPES)
    assert {"lion", "adamw", "signum", "adafactor", "sgd", "muon", "stable_adamw"} <= set(OPTIMIZERS)
    assert {"cosine", "linear", "constant", "amos"} <= set(SCHEDULES)
    assert {"wandb", "csv", "tensorboard", "none"} <= set(LOGGERS)
    assert {"python_docs", "text_files", "digits", "image_files"} <= set(DATA)
    assert {"bert_mlm_lion", "image_classification_adamw"} <= set(TUNED)


@pytest.mark.parametrize("overrides", [
    ["recipe=image_classification", "optim=adamw", "run_dir=/tmp/a b", "optim.betas=[0.9,0.95]", "trainer.max_steps=7"],
    ["recipe=bert_mlm", "~tuned", "optim={lr: 3}", "+optim.new=1", "input='a [b].txt'", "data.seed=5", "seed=7"],
    ["data=mixture", "data.sources=[{path: a, weight: 3},{path: b}]"],
    ["optim.lr=5", "optim={lr: 3}"],
    ["optim.lr=5", "optim=sgd"],
    ["~tuned", "seed=3", "+optim.new=1", "optim.new=2"],
])  # fmt: skip
def test_the_fixture_composes_as_hydra_does(compose: Compose, overrides: list[str]) -> None:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        expected = hydra.compose("train", overrides)
    assert str(compose(*overrides)) == str(expected)
    assert OmegaConf.is_struct(compose(*overrides)) == OmegaConf.is_struct(expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_with_every_optimizer_and_schedule(compose: Compose, recipe: str) -> None:
    """An optimizer is what its file says and then what was tuned for the recipe, and the command line wins."""
    import torch

    from lion_lightning.hyperparams import parameter_groups
    from lion_lightning.training.build import instantiate

    for number, optim in enumerate(OPTIMIZERS, RECIPES.index(recipe)):  # so that each optimizer meets each schedule
        schedule = SCHEDULES[number % len(SCHEDULES)]
        chosen = [f"recipe={recipe}", f"optim={optim}", f"schedule={schedule}", "run_dir=out"]
        cfg = compose(*chosen)
        composed = plain(cfg)
        assert (cfg.recipe.name, cfg.optim.name, cfg.schedule.name) == (recipe, optim, schedule)
        assert composed["run_name"] == f"{recipe}-{optim}-s1"
        assert optim not in composed["group"], "a group is what optimizers are compared in"
        written, pair = yaml_of(CONF / "optim" / f"{optim}.yaml"), f"{recipe}_{optim}"
        written.pop("defaults", None)
        tuned = yaml_of(CONF / "tuned" / f"{pair}.yaml")["optim"] if pair in TUNED else {}
        assert composed["optim"] == {**written, **tuned}
        assert not tuned or compose(*chosen, "optim.lr=7").optim.lr == 7
        if optim == "stable_adamw":
            continue  # see below
        optimizer = instantiate(cfg.optim)(parameter_groups(torch.nn.Linear(4, 3), weight_decay=0.1))
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert optimizer.param_groups[0]["lr"] == cfg.optim.get("lr", optimizer.param_groups[0]["lr"])
        factor = instantiate(cfg.schedule)(100)
        assert factor(0) == pytest.approx(1.0)
        assert factor(100) == pytest.approx(cfg.schedule.get("final", 1.0), abs=1e-6)


def test_stable_adamw_is_built(compose: Compose) -> None:
    pytest.importorskip("optimi")
    import torch

    from lion_lightning.training.build import instantiate

    optimizer = instantiate(compose("optim=stable_adamw", "run_dir=out").optim)(torch.nn.Linear(4, 3).parameters())
    assert isinstance(optimizer, torch.optim.Optimizer)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_the_group_is_the_same_for_every_optimizer_and_seed(compose: Compose, optim: str) -> None:
    assert compose(f"optim={optim}", "seed=7", "run_dir=out").group == compose("run_dir=out").group


def test_the_group_changes_with_what_is_compared(compose: Compose) -> None:
    changes = [
        "model=bert_mini", "data=text_files", "trainer.max_steps=7", "data.batch_size=7",
        "trainer.accumulate_grad_batches=2",
    ]  # fmt: skip
    groups = [compose("run_dir=out", *change).group for change in ([], *([change] for change in changes))]
    assert len(set(groups)) == len(groups)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_never_touches_the_optimizer(recipe: str) -> None:
    written = yaml_of(CONF / "recipe" / f"{recipe}.yaml")
    assert "optim" not in written
    assert not [entry for entry in written["defaults"] if "optim" in str(entry)]


@pytest.mark.parametrize(
    "choice",
    [
        f"{group}={name}"
        for group, names in (("recipe", RECIPES), ("optim", OPTIMIZERS), ("schedule", SCHEDULES), ("model", MODELS))
        for name in names
    ]
    + [f"{group}={name}" for group, names in (("data", DATA), ("logger", LOGGERS)) for name in names],
)
def test_every_target_is_allowed_and_takes_its_arguments(compose: Compose, choice: str) -> None:
    from lion_lightning.training.build import LABEL, resolve

    if choice == "optim=stable_adamw":
        pytest.importorskip("optimi")
    found = list(targets(plain(compose(choice, "run_dir=out"))))
    assert len(found) >= 8
    for node in found:
        signature = inspect.signature(resolve(node["_target_"]))
        arguments = node.keys() - {"_target_", "_partial_", LABEL}
        signature.bind_partial(**dict.fromkeys(arguments))  # TypeError: a key that is no argument


@pytest.mark.parametrize("model", MODELS)
def test_every_model_key_is_an_attribute_of_its_configuration(compose: Compose, model: str) -> None:
    """`transformers` configurations take any keyword, so a misspelt size would pass unseen."""
    from lion_lightning.training.build import resolve

    node = plain(compose(f"model={model}", "run_dir=out"))["model"]["config"]
    default = resolve(node["_target_"])()
    assert not [key for key in node if key != "_target_" and not hasattr(default, key)]


@pytest.mark.parametrize("tuned", TUNED)
def test_tuned_settings_touch_only_the_optimizer_and_say_where_they_come_from(tuned: str) -> None:
    file = CONF / "tuned" / f"{tuned}.yaml"
    assert set(yaml_of(file)) <= {"optim", "schedule", "guard"}
    about = " ".join(line for line in file.read_text().splitlines() if line.startswith("#"))
    assert re.search(r"arXiv|archives|\d{4}-\d{2}-\d{2}", about), "neither a publication nor the date of a measurement"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONF)))
def test_every_key_carries_a_comment(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    first = next(line for line in lines if not line.startswith("# @package"))
    assert first.startswith("#"), "no line says what it is"
    assert not unexplained(lines), f"{file.name}: no comment on {unexplained(lines)}"


def test_an_unexplained_key_is_found() -> None:
    assert unexplained(["# What it is.", "name: x", "lr: 0.1", "eps: 1  # why"]) == ["lr"]
    assert unexplained(["# What it is.", "# For the next line.", "lr: 0.1"]) == []
    assert unexplained(["outer:", "  inner: 1"]) == ["inner"]


def unexplained(lines: list[str]) -> list[str]:
    """Leaf keys with a comment neither on their line nor on the line above.

    A value that only repeats another key is explained there; what is below `hydra:` is Hydra's and explained by Hydra.
    """
    found, outer = [], ""
    for number, line in enumerate(lines):
        key = re.match(r"^( *)([\w./]+):(.*)$", line)
        if not key:
            continue
        outer = key[2] if key[1] == "" else outer
        value = key[3].split(" #")[0].strip()
        exempt = outer in ("defaults", "hydra") or key[2] in NEEDS_NO_COMMENT | MODEL_SIZES
        repeats = re.fullmatch(r"\$\{[\w.]+\}", value)
        commented = " #" in line or (number > 1 and lines[number - 1].lstrip().startswith("#"))
        if value and not (exempt or repeats or commented):
            found.append(key[2])
    return found


@functools.cache
def answered(root: Path, *flags: str) -> str:
    """What train.py prints, and then which heavy libraries it has loaded."""
    script = (
        "import runpy, sys; sys.argv = ['train.py', *sys.argv[1:]]\n"
        "try: runpy.run_path('train.py', run_name='__main__')\n"
        "finally:\n"
        "    heavy = {'torch', 'lightning', 'transformers', 'wandb', 'datasets', 'numpy'}\n"
        "    print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script, *flags], cwd=root, capture_output=True, text=True, timeout=120, check=False
    )
    assert (answer.returncode, answer.stderr) == (0, "")
    return answer.stdout


@pytest.mark.parametrize("flags", [["--help"], ["--cfg", "job"], ["--hydra-help"]], ids=" ".join)
def test_the_manual_loads_no_heavy_library(root: Path, flags: list[str]) -> None:
    assert "HEAVY []" in answered(root, *flags)


def test_help_reads_like_a_manual(root: Path) -> None:
    page = answered(root, "--help")
    for name in (*RECIPES, *OPTIMIZERS, *SCHEDULES, *MODELS, *DATA, "python train.py optim=adamw", "--cfg job"):
        assert name in page


def test_an_override_of_the_guards_document_does_what_it_says(compose: Compose, root: Path) -> None:
    given = re.findall(r"`(\+?guard\.thresholds\.\w+=[\w.]+)`", (root / "docs/guard.md").read_text())
    assert given == ["+guard.thresholds.outlier_z=10"]
    cfg = compose(*given)
    assert hydra.utils.instantiate(cfg.guard.thresholds).outlier_z == 10
