"""What the tests share: a cache folder of their own, no account anywhere, configurations composed in this process."""

import copy
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import hydra
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import lion_lightning.training  # noqa: F401  # registers the resolvers of conf/

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
Compose = Callable[..., DictConfig]


def pytest_configure(config: pytest.Config) -> None:
    """Point every cache to one temporary folder before a library looks; xdist's workers inherit it."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="lion_lightning-tests-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # every process would compile every library anew
    for name in [name for name in os.environ if name.startswith(("WANDB_", "HYDRA_", "HF_"))]:
        del os.environ[name]
    os.environ.update(
        XDG_CACHE_HOME=folder,
        HF_HOME=f"{folder}/huggingface",
        HF_HUB_OFFLINE="1",
        WANDB_CACHE_DIR=f"{folder}/wandb",
        WANDB_CONFIG_DIR=f"{folder}/wandb",
        WANDB_DATA_DIR=f"{folder}/wandb",
        COLUMNS="200",
        LION_LIGHTNING_PRECISION="32-true",  # the same numbers on every machine
        OMP_NUM_THREADS="1",  # for the processes that tests start; see single_thread
    )


@pytest.fixture(autouse=True, scope="session")
def single_thread() -> None:
    """One thread each: OpenMP threads of parallel test workers wait for one another by spinning."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@functools.cache
def composed_by_hydra(*overrides: str) -> DictConfig:
    """It takes a tenth to a quarter of a second, so it is kept: copy it before you change it."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("train", overrides=list(overrides))


def is_choice(override: Override) -> bool:
    """Whether an override is a setting or chooses a file, and so may stand before or after a setting."""
    return is_setting(override) or (override.type == OverrideType.CHANGE and isinstance(override.value(), str))


def is_setting(override: Override) -> bool:
    """Whether an override changes a value of the files that the others have chosen, and no more."""
    is_change = override.type == OverrideType.CHANGE and override.package is None and not override.is_sweep_override()
    return is_change and not (CONF / override.key_or_group).is_dir()


@pytest.fixture(scope="session")
def compose() -> Compose:
    """`compose("recipe=bert_mlm", ...)`: the configuration that the command line with these overrides has.

    Files are chosen by Hydra, once for each choice; settings come on top afterwards, as with Hydra. What does not work
    so is left to Hydra, for its error.
    """

    def composed(*overrides: str) -> DictConfig:
        try:
            parsed = OverridesParser.create().parse_overrides(list(overrides))
            if any(is_setting(one) and not is_choice(other) for one, other in combinations(parsed, 2)):
                return copy.deepcopy(composed_by_hydra(*overrides))  # their order matters
            chosen = [override.input_line for override in parsed if not is_setting(override)]
            cfg = copy.deepcopy(composed_by_hydra(*chosen))
            for override in filter(is_setting, parsed):
                OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True)
            return cfg
        except (HydraException, OmegaConfBaseException):
            return copy.deepcopy(composed_by_hydra(*overrides))

    return composed


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half a megabyte of real English in one file: CPython's documentation topics."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("prose") / "topics.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def short_prose(prose: Path) -> Path:
    """The first 100,000 characters of it: enough for a run, and prepared five times as fast."""
    path = prose.with_name("short.txt")
    path.write_text(prose.read_text(encoding="utf-8")[:100_000], encoding="utf-8")
    return path
