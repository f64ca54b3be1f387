"""`mode=eval`: a trained model on its validation data.

The configuration is that of the checkpoint's run with the changes of the command line, so
`lion-train mode=eval ckpt=RUN data.batch_size=8` needs neither recipe nor data again.
"""

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import rich
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lion_lightning.__main__ import OF_EVALUATION, composed
from lion_lightning.command_line import OVERRIDES_FILE, overrides_of, run_folder, search_path
from lion_lightning.errors import ConfigError
from lion_lightning.recipes.files import existing, one_line
from lion_lightning.training import build
from lion_lightning.training.checkpoint import files
from lion_lightning.training.checkpoint.resume import restoring
from lion_lightning.training.logging_setup import quiet_libraries
from lion_lightning.training.report import near, show


def evaluate(cfg: DictConfig) -> float:
    """Validate a checkpoint; returns the value of the recipe's metric and writes all of them to `run_dir/eval.json`.

    Args:
        cfg: with `ckpt`, the folder of a run or a checkpoint.

    Raises:
        ConfigError: there is no such checkpoint, or it does not fit.
    """
    quiet_libraries()
    place = checkpoint_at(cfg.ckpt)
    if is_export(place):
        raise ConfigError(f"ckpt={cfg.ckpt} is an export; mode=eval takes the folder of a run, or a checkpoint")
    cfg = configuration_of(place, cfg)
    module, data = trained(place, cfg)
    if hasattr(module, "export") and is_export(folder_of(place) / "export"):
        with tempfile.TemporaryDirectory(prefix="lion_lightning-export-") as temporary:
            export(module, Path(temporary), place)
    trainer = build.build_trainer(cfg, None, [], bar=False)
    trainer.validate(module, datamodule=data, verbose=False)
    metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
    if trainer.is_global_zero:
        kept = Path(cfg.run_dir) / "eval.json"
        kept.parent.mkdir(parents=True, exist_ok=True)
        numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        kept.write_text(json.dumps({"ckpt": near(place), **numbers}, indent=2) + "\n", encoding="utf-8")
        lines = {name: f"{value:.4f}" for name, value in metrics.items()}
        show(rich.get_console(), f"{near(place)} on {cfg.data.name}", {**lines, "kept in": near(kept)})
    return metrics.get(cfg.recipe.monitor, math.nan)


def checkpoint_at(ckpt: str | None) -> Path:
    """The checkpoint that `ckpt` means: of a run's folder the best; or an export."""
    if ckpt is None:
        raise ConfigError("mode=eval and mode=predict need ckpt=PATH: the folder of a run, or a checkpoint")
    try:
        place = Path(files.refuse_url(ckpt)).expanduser()
        if (place / "checkpoints").is_dir():
            best = place / "checkpoints" / "best.ckpt"
            newest = best if best.exists() else files.newest_valid(place / "checkpoints")[0]
            if newest is None:
                raise ConfigError(f"ckpt={ckpt}: this run has no valid checkpoint")
            place = newest
        if files.marker_of(place).is_file():
            files.verify(place)
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"ckpt={error}") from error
    existing(place, "ckpt")
    if place.is_dir() and not (is_export(place) or (place / ".metadata").is_file()):
        raise ConfigError(f"ckpt={ckpt} is a folder that holds no run, no checkpoint and no export")
    return place


def is_export(place: Path) -> bool:
    return (place / "config.json").is_file()


def folder_of(place: Path) -> Path:
    """The folder of the run that wrote the checkpoint `place`; ConfigError where there is none."""
    folder = run_folder(place)
    if folder is None:
        raise ConfigError(f"ckpt={place}: there is no config.yaml beside it; give the folder of its run")
    return folder


def configuration_of(place: Path, cfg: DictConfig) -> DictConfig:
    """The configuration of the run that wrote `place`, with the changes that the command line makes.

    The run's command line is composed again, and `cfg` is the same with the new settings (`main` puts both together).
    Where the two differ, `config.yaml` changes: a setting reaches every key that refers to it, and files of conf/ that
    have changed since the run change nothing.
    """
    folder = folder_of(place)
    file = folder / "config.yaml"
    try:
        own = OmegaConf.load(file)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {one_line(error)}") from error
    if not isinstance(own, DictConfig) or not {"recipe", "data", "model", "trainer", "optim"} <= own.keys():
        raise ConfigError(f"{file} is not the configuration of a run of lion_lightning")
    given = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    given = [word for word in given if word.lstrip("+~").partition("=")[0].split(".")[0] not in OF_EVALUATION]
    kept = overrides_of(folder)
    if given and given != kept:
        if kept is None:
            raise ConfigError(f"{', '.join(given)}: {folder} lacks {OVERRIDES_FILE}, so its settings cannot change")
        before = _composed(kept)
        after = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
        if before["recipe"]["name"] != after["recipe"]["name"]:
            raise ConfigError(f"recipe={after['recipe']['name']}: ckpt={place} is of {before['recipe']['name']}")
        plain = cast(dict[str, Any], OmegaConf.to_container(own, resolve=True))
        _apply(plain, before, after)
        own = OmegaConf.create(plain)
    own.run_dir = cfg.run_dir
    if not build.started_by_launcher():
        own.trainer.update({"strategy": "auto", "devices": 1, "num_nodes": 1})
    build.settle_precision(own)
    build.check(own)
    return own


def _composed(overrides: list[str]) -> dict[str, Any]:
    """What a command line means, in plain types and without what Hydra knows of its own process."""
    folders = [source for source in HydraConfig.get().runtime.config_sources if source.provider == "command-line"]
    more = search_path([source.path for source in folders])
    ours = get_gh_backup()  # Hydra has one instance in a process, and that is the one of this command line
    GlobalHydra.instance().clear()
    try:
        cfg = composed([*overrides, *more, "run_dir=none"])
    finally:
        restore_gh_from_backup(ours)
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))


def _apply(own: dict[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Make in `own` the changes that lead from `before` to `after`, at any depth."""
    for key in before.keys() - after.keys():
        own.pop(key, None)
    for key, value in after.items():
        if key in before and before[key] == value:
            continue
        if isinstance(value, dict) and isinstance(before.get(key), dict) and isinstance(own.get(key), dict):
            _apply(own[key], before[key], value)
        else:
            own[key] = value


def trained(place: Path, cfg: DictConfig) -> tuple[Any, Any]:
    """The recipe's module with the weights of `place`, and its data."""
    data = build.build_data(cfg)
    cfg.trainer.max_steps = build.max_steps(cfg, data)
    module = build.build_module(cfg, data)
    with restoring(place, "ckpt"):
        module.load_state_dict(files.with_names_of(files.weights_of(place), module.state_dict()))
    return module.eval(), data


def export(module: Any, folder: Path, place: Path) -> None:
    """Export the `module` of the checkpoint `place`; ConfigError if the export of its run means something else."""
    module.export(folder, "")
    if is_export(then := folder_of(place) / "export"):
        _check_same_meaning(then, folder)


def _check_same_meaning(then: Path, now: Path) -> None:
    """ConfigError if the data now gives other tokens or classes than in the run, which shapes would not show."""
    tokenizers = [(folder / "tokenizer.json") for folder in (then, now)]
    if all(file.is_file() for file in tokenizers):
        vocabularies = [json.loads(file.read_text(encoding="utf-8"))["model"].get("vocab") for file in tokenizers]
        if vocabularies[0] != vocabularies[1]:
            raise ConfigError(
                f"the tokenizer that this data gives is not that of {then}: the data has changed since the run; "
                f"data.tokenizer={then} uses the old one"
            )
    classes = [json.loads((folder / "config.json").read_text()).get("id2label") for folder in (then, now)]
    if classes[0] != classes[1]:
        raise ConfigError(f"the data has other classes than the run had ({then / 'config.json'}): it has changed")
