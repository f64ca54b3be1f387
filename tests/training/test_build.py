"""The allowlist of `_target_`: what may be built from a configuration, and what a mistake says."""

import functools
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import lion_lightning.recipes.bert_mlm.masking as masking_module
from lion_lightning.command_line import TRUST, take_trusted, trusted
from lion_lightning.errors import ConfigError
from lion_lightning.optim import Lion
from lion_lightning.recipes.bert_mlm.masking import Masking
from lion_lightning.training.build import instantiate

MASKING = "lion_lightning.recipes.bert_mlm.masking.Masking"


@pytest.fixture(autouse=True)
def no_memory_of_trust() -> Iterator[None]:
    trusted.cache_clear()
    yield
    trusted.cache_clear()


@pytest.fixture
def aliases() -> Iterator[None]:
    """Dangerous functions under a name inside an allowed module, as an import there would leave them."""
    planted = {"run_command": os.system, "read_pickle": torch.load, "evaluate": eval}
    for name, function in planted.items():
        setattr(masking_module, name, function)
    yield
    for name in planted:
        delattr(masking_module, name)


@pytest.mark.parametrize(
    "target",
    [
        "torch.load",
        "torch.serialization.load",
        "torch.hub.load",
        "os.system",
        "posix.system",
        "subprocess.run",
        "subprocess.Popen",
        "builtins.eval",
        "builtins.exec",
        "pickle.loads",
        "importlib.import_module",
        "hydra.utils.instantiate",
        "functools.partial",
        "shutil.rmtree",
        "pathlib.Path",
        "lion_lightning.recipes.bert_mlm.masking",
        "lion_lightning.recipes.bert_mlm.masking.IGNORED",
        "lion_lightning.recipes.text.corpus.hashlib.blake2b",
        "lion_lightning.recipes.text.corpus.glob.glob",
        "lion_lightning.data.cache.shutil.rmtree",
        "transformers.AutoModel.from_pretrained",
    ],
)
def test_what_is_not_ours_is_refused(target: str) -> None:
    with pytest.raises(ConfigError, match="not allowed") as error:
        instantiate({"_target_": target})
    assert target in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("aliases")
@pytest.mark.parametrize("name", ["run_command", "read_pickle", "evaluate"])
def test_an_alias_in_an_allowed_module_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="not allowed"):
        instantiate({"_target_": f"lion_lightning.recipes.bert_mlm.masking.{name}"})


@pytest.mark.parametrize("nesting", [lambda bad: {"rate": bad}, lambda bad: {"rate": [0.1, {"deeper": bad}]}])
@pytest.mark.parametrize("partial", [False, True])
def test_a_nested_target_is_refused_before_it_is_called(tmp_path, nesting, partial: bool) -> None:
    bad = {"_target_": "os.mkdir", "path": str(tmp_path / "made")}
    with pytest.raises(ConfigError, match=r"os\.mkdir"):
        instantiate({"_target_": MASKING, "_partial_": partial, **nesting(bad)})
    assert not (tmp_path / "made").exists()


def test_an_override_is_passed_as_it_is() -> None:
    """Objects that were built already are never searched for targets."""
    value = {"_target_": "os.system", "command": "false"}
    assert instantiate({"_target_": "torch.nn.ParameterDict"}, parameters=None) is not None
    made = instantiate({"_target_": MASKING, "_partial_": True}, rate=value)
    assert made.keywords["rate"] is value


@pytest.mark.parametrize(
    "target", ["nowhere.Thing", "lion_lightning.recipes.bert_mlm.masking.Masknig", "torch", "", 5, None]
)
def test_a_target_that_does_not_exist_is_one_line(target: object) -> None:
    with pytest.raises(ConfigError) as error:
        instantiate({"_target_": target})
    assert "\n" not in str(error.value)
    assert repr(target) in str(error.value)


@pytest.mark.parametrize("partial", [False, True])
def test_an_unknown_argument_names_itself_and_what_is_taken(partial: bool) -> None:
    with pytest.raises(ConfigError, match="rte") as error:
        instantiate({"_target_": MASKING, "_partial_": partial, "rte": 0.1})
    assert "mask_share" in str(error.value)


def test_a_missing_argument_is_named() -> None:
    with pytest.raises(ConfigError, match="embedding_dim"):
        instantiate({"_target_": "torch.nn.Embedding", "num_embeddings": 3})


def test_a_node_becomes_the_object() -> None:
    assert instantiate(OmegaConf.create({"_target_": MASKING, "rate": 0.3})) == Masking(rate=0.3)
    assert instantiate({"_target_": MASKING, "rate": 0.3}, rate=0.4) == Masking(rate=0.4)


def test_nested_nodes_are_built_first_and_interpolations_resolved() -> None:
    cfg = OmegaConf.create(
        {"share": 0.2, "node": {"_target_": MASKING, "_partial_": True, "rate": {"_target_": MASKING}}}
    )
    cfg.node.mask_share = "${share}"
    made = instantiate(cfg.node)
    assert made.keywords == {"rate": Masking(), "mask_share": 0.2}


def test_a_label_is_no_argument() -> None:
    assert instantiate({"_target_": MASKING, "name": "fifteen"}) == Masking()


def test_partial_keeps_the_arguments_for_later() -> None:
    factory = instantiate({"_target_": "lion_lightning.optim.Lion", "_partial_": True, "lr": 0.5})
    assert isinstance(factory, functools.partial)
    assert factory.func is Lion
    assert factory([torch.nn.Parameter(torch.ones(1))]).param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    "alias", ["transformers.BertConfig", "torch.optim.AdamW", "lightning.pytorch.loggers.CSVLogger"]
)
def test_a_public_name_of_an_allowed_class_is_fine(alias: str) -> None:
    """The class is defined elsewhere than the name says; what counts is where it is defined."""
    assert instantiate({"_target_": alias, "_partial_": True}).func.__name__ == alias.rsplit(".", 1)[1]


def package_in(folder: Path, name: str) -> None:
    (folder / name).mkdir()
    code = "from shutil import rmtree\n\n\nclass Thing:\n    def __init__(self, size=1):\n        self.size = size\n"
    (folder / name / "__init__.py").write_text(code)


def test_a_trusted_package_is_built_and_the_refusal_names_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package_in(tmp_path, "own_things")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"if own_things is yours, trust=\[own_things\]"):
        instantiate({"_target_": "own_things.Thing"})
    assert "own_things" not in sys.modules, "imported before it was trusted"
    monkeypatch.setenv(TRUST, "own_things")
    with pytest.raises(ConfigError, match="not allowed"):
        instantiate({"_target_": "own_things.Thing"})  # a configuration that sets the variable comes too late
    trusted.cache_clear()
    assert instantiate({"_target_": "own_things.Thing", "size": 3}).size == 3
    with pytest.raises(ConfigError, match="not allowed"):
        instantiate({"_target_": "own_things.rmtree", "path": str(tmp_path)})
    assert tmp_path.is_dir()


@pytest.mark.parametrize("target", ["os.system", "subprocess.run", "torch.load", "transformers.AutoModel.from_config"])
def test_trust_is_not_offered_for_a_package_that_is_not_the_users(target: str) -> None:
    with pytest.raises(ConfigError) as error:
        instantiate({"_target_": target})
    assert "trust=" not in str(error.value)


def test_trust_comes_from_the_command_line_and_never_from_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TRUST, "")
    monkeypatch.setattr(sys, "path", list(sys.path))
    package_in(tmp_path, "own_parts")
    monkeypatch.chdir(tmp_path)
    cfg = OmegaConf.create({"trust": ["own_parts"], "part": {"_target_": "own_parts.Thing"}})
    with pytest.raises(ConfigError, match="not allowed"):
        instantiate(cfg.part)
    assert take_trusted(["seed=2", "++trust=[own_parts, other]", "optim=lion"]) == ["seed=2", "optim=lion"]
    assert trusted() == ("own_parts", "other")
    assert instantiate(cfg.part).size == 1
    with pytest.raises(ConfigError, match=r"trust=/tmp/x: not the name of a Python package"):
        take_trusted(["trust=/tmp/x"])


@pytest.mark.parametrize(
    "target",
    [
        "lion_lightning.command_line.take_trusted",
        "lion_lightning.commands.predict._pipeline",
        "lion_lightning.training.checkpoint.files._remove",
        "lion_lightning.training.checkpoint.files.remove_marked",
        "lion_lightning.optim.kernels.compile_cpu.compile_library",
        "lion_lightning.recipes.image_classification.images.save",
        "lion_lightning.examples.own_project.sines.optimizer.SignMomentum",
        "lion_lightning.scripts.make_environment.main",
        "lion_lightning.lion_lightning.optim.Lion",
        "lion_lightning.outputs.run.file.Thing",
    ],
)
def test_our_own_functions_and_folders_are_no_targets(target: str) -> None:
    with pytest.raises(ConfigError, match=r"is not allowed|cannot be imported"):
        instantiate({"_target_": target})


def test_a_configuration_cannot_grant_itself_trust(tmp_path: Path) -> None:
    """Arguments are built before the call, so a nested node could have prepared the next one."""
    grant = {"_target_": "lion_lightning.command_line.take_trusted", "arguments": ["trust=[subprocess]"]}
    run = {"_target_": "subprocess.run", "args": ["touch", str(tmp_path / "made")]}
    with pytest.raises(ConfigError, match="not allowed"):
        instantiate({"_target_": "torch.nn.Sequential", "a": grant, "b": run})
    assert not (tmp_path / "made").exists()
    assert trusted() == ()


def test_only_the_recipes_and_the_configuration_are_found_beside_the_package() -> None:
    for name in ("scripts", "examples", "tests", "train"):
        with pytest.raises(ImportError):
            importlib.import_module(f"lion_lightning.{name}")


def test_targets_of_saved_configurations_still_resolve() -> None:
    assert instantiate({"_target_": "recipes.bert_mlm.masking.Masking", "rate": 0.3}) == Masking(rate=0.3)


def test_the_folder_of_the_recipes_is_no_package_of_its_own() -> None:
    """Each class would exist twice."""
    with pytest.raises(ImportError, match=r"lion_lightning\.recipes"):
        importlib.import_module("recipes")
