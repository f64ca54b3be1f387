"""`mode=eval` and `mode=predict`: a trained model on its validation data, and on texts or pictures of one's own.

The configuration is that of the checkpoint's run with the changes of the command line, so
`lion-train mode=eval ckpt=RUN data.batch_size=8` needs neither recipe nor data again.
"""

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import hydra
import rich
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from transformers import AutoConfig, pipeline
from yaml import YAMLError

from lion_lightning.__main__ import CONFIG_FOLDER, OF_EVALUATION
from lion_lightning.command_line import OVERRIDES_FILE, overrides_of
from lion_lightning.errors import ConfigError
from lion_lightning.recipes.files import conversion_of, is_hidden, list_files, one_line
from lion_lightning.recipes.image_classification.images import read
from lion_lightning.recipes.tables import READERS, Columns, columns_of, read_table, suffix_of
from lion_lightning.training import build
from lion_lightning.training.checkpoint import files
from lion_lightning.training.checkpoint.policy import newest_valid, restoring
from lion_lightning.training.logging_setup import quiet_libraries
from lion_lightning.training.report import near, show

BATCH = 32  # inputs that are predicted at once
CHOICES = 5  # likeliest answers that are kept of each
SHOWN = 5  # predictions on the screen
TASKS = {
    "ForMaskedLM": "fill-mask",
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "text-classification",
}
Row = dict[str, Any]
Input = tuple[Row, Any, str]
"""The row that it begins, what the model takes, and why it cannot be used: empty if it can."""


def evaluate(cfg: DictConfig) -> float:
    """Validate a checkpoint; returns the value of the recipe's metric and writes all of them to `run_dir/eval.json`.

    Args:
        cfg: with `ckpt`, the folder of a run or a checkpoint.

    Raises:
        ConfigError: there is no such checkpoint, or it does not fit.
    """
    quiet_libraries()
    place = _checkpoint(cfg.ckpt)
    if _is_export(place):
        raise ConfigError(f"ckpt={cfg.ckpt} is an export; mode=eval takes the folder of a run, or a checkpoint")
    cfg = _configuration_of(place, cfg)
    module, data = _trained(place, cfg)
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


def predict(cfg: DictConfig) -> float:
    """Predict what `input` holds, a line of `run_dir/predictions.jsonl` each; returns the share that could be used.

    A Hugging Face pipeline predicts from the export, whose answers are those of validation (`tests/recipes`). Nothing
    that comes with the model is run as code.

    Args:
        cfg: with `ckpt`, the folder of a run, a checkpoint or an export, and `input`: a `.txt` file with a text a line,
            a table (`.csv`, `.tsv`, `.jsonl`, `.parquet`) with a column `text`, for text classification perhaps
            `text_pair`, a picture, or a folder of pictures.

    Raises:
        ConfigError: there is no such checkpoint or input, or it is none of these.
    """
    if build.started_by_launcher():
        raise ConfigError("mode=predict runs in one process; start it without torchrun or srun")
    quiet_libraries()
    place, source = _checkpoint(cfg.ckpt), _existing(cfg.input)
    with tempfile.TemporaryDirectory(prefix="lion_lightning-export-") as temporary:
        folder = place if _is_export(place) else _export_of(place, cfg, Path(temporary))
        model, task = _pipeline(folder, cfg)
        inputs = _pictures(source) if task == "image-classification" else _texts(source, task)
        kept = Path(cfg.run_dir) / "predictions.jsonl"
        kept.parent.mkdir(parents=True, exist_ok=True)
        answered: list[Row] = []
        failed: list[Row] = []
        total = {True: 0, False: 0}
        with kept.open("w", encoding="utf-8") as written:
            while batch := list(islice(inputs, BATCH)):
                for row in _predicted(model, batch, task):
                    written.write(json.dumps(row, ensure_ascii=False) + "\n")
                    total["error" in row] += 1
                    (failed if "error" in row else answered).append(row)
                del answered[SHOWN:], failed[SHOWN:]
    count = sum(total.values())
    if not count:
        kept.unlink()
        raise ConfigError(f"input={cfg.input}: there is nothing in it")
    lines = {"inputs": f"{count}: {total[False]} predicted, {total[True]} could not be used"}
    for number, row in enumerate(answered, 1):
        lines[f"prediction {number}"] = f"{row['input']} -> {_words(row)}"
    for number, row in enumerate(failed, 1):
        lines[f"not used {number}"] = f"{row['input']}: {row['error']}".removeprefix(": ")
    show(rich.get_console(), f"{near(place)} on {cfg.input}", {**lines, "kept in": near(kept)})
    return total[False] / count


def _checkpoint(ckpt: str | None) -> Path:
    """The checkpoint that `ckpt` means: of a run's folder the best; or an export."""
    if ckpt is None:
        raise ConfigError("mode=eval and mode=predict need ckpt=PATH: the folder of a run, or a checkpoint")
    try:
        place = Path(files.refuse_url(ckpt))
        if (place / "checkpoints").is_dir():
            best = place / "checkpoints" / "best.ckpt"
            newest = best if best.exists() else newest_valid(place / "checkpoints")[0]
            if newest is None:
                raise ConfigError(f"ckpt={ckpt}: this run has no valid checkpoint")
            place = newest
        if files.marker_of(place).is_file():
            files.verify(place)
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"ckpt={error}") from error
    if not place.exists():
        raise ConfigError(f"ckpt={ckpt}: there is no such file or folder")
    if place.is_dir() and not (_is_export(place) or (place / ".metadata").is_file()):
        raise ConfigError(f"ckpt={ckpt} is a folder that holds no run, no checkpoint and no export")
    return place


def _is_export(place: Path) -> bool:
    return (place / "config.json").is_file()


def _run_folder(place: Path) -> Path:
    """The folder of the run that wrote the checkpoint `place`."""
    above = place.resolve().parents[:2]
    found = next((folder for folder in above if (folder / "config.yaml").is_file()), None)
    if found is None:
        raise ConfigError(f"ckpt={place}: there is no config.yaml beside it; give the folder of its run")
    return found


def _configuration_of(place: Path, cfg: DictConfig) -> DictConfig:
    """The configuration of the run that wrote `place`, with the changes that the command line makes.

    The run's command line is composed again, and `cfg` is the same with the new settings (`main` puts both together).
    Where the two differ, `config.yaml` changes: a setting reaches every key that refers to it, and files of conf/ that
    have changed since the run change nothing.
    """
    folder = _run_folder(place)
    file = folder / "config.yaml"
    try:
        own = OmegaConf.load(file)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {one_line(error)}") from error
    if not isinstance(own, DictConfig) or not {"recipe", "data", "model", "trainer", "optim"} <= own.keys():
        raise ConfigError(f"{file} is not the configuration of a run of lion_lightning")
    given = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    given = [word for word in given if word.lstrip("+~").partition("=")[0].split(".")[0] not in OF_EVALUATION]
    kept = overrides_of(str(place))
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
    more = [f"hydra.searchpath=[{','.join(f'file://{source.path}' for source in folders)}]"] if folders else []
    ours = get_gh_backup()  # Hydra has one instance in a process, and that is the one of this command line
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
            cfg = hydra.compose("train", [*overrides, *more, "run_dir=none"])
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


def _trained(place: Path, cfg: DictConfig) -> tuple[Any, Any]:
    """The recipe's module with the weights of `place`, and its data."""
    data = build.build_data(cfg)
    cfg.trainer.max_steps = build.max_steps(cfg, data)
    module = build.build_module(cfg, data)
    with restoring(place, "ckpt"):
        module.load_state_dict(files.with_names_of(files.weights_of(place), module.state_dict()))
    export = _run_folder(place) / "export"
    if _is_export(export) and hasattr(module, "export"):
        with tempfile.TemporaryDirectory(prefix="lion_lightning-export-") as temporary:
            module.export(Path(temporary), "")
            _check_same_meaning(export, Path(temporary))
    return module.eval(), data


def _check_same_meaning(trained: Path, now: Path) -> None:
    """ConfigError if the data of today gives other tokens or classes than the run had: shapes alone would not tell."""
    tokenizers = [(folder / "tokenizer.json") for folder in (trained, now)]
    if all(file.is_file() for file in tokenizers):
        vocabularies = [json.loads(file.read_text(encoding="utf-8"))["model"].get("vocab") for file in tokenizers]
        if vocabularies[0] != vocabularies[1]:
            raise ConfigError(
                f"the tokenizer that this data gives is not that of {trained}: the data has changed since the run; "
                f"data.tokenizer={trained} uses the old one"
            )
    classes = [json.loads((folder / "config.json").read_text()).get("id2label") for folder in (trained, now)]
    if classes[0] != classes[1]:
        raise ConfigError(f"the data has other classes than the run had ({trained / 'config.json'}): it has changed")


def _export_of(place: Path, cfg: DictConfig, temporary: Path) -> Path:
    """The export of the run, if it is of this checkpoint, else a new one in `temporary`, which needs the data."""
    export = _run_folder(place) / "export"
    weights = export / "model.safetensors"
    is_best = place.name == "best.ckpt" and _is_export(export) and weights.is_file()
    if is_best and weights.stat().st_mtime >= place.stat().st_mtime:
        return export
    module = _trained(place, _configuration_of(place, cfg))[0]
    if not hasattr(module, "export"):
        raise ConfigError(
            f"ckpt={place}: {type(module).__name__} has no export(folder, card), which mode=predict needs"
        )
    module.export(temporary, "")
    return temporary


def _pipeline(folder: Path, cfg: DictConfig) -> tuple[Any, str]:
    """The pipeline of an export, and its task."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        architecture = (config.architectures or ["none"])[0]
        task = next((task for ending, task in TASKS.items() if architecture.endswith(ending)), None)
        if task is None:
            raise ConfigError(f"ckpt={cfg.ckpt}: {architecture} is none of {', '.join(TASKS)}")
        device = "cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu"
        return pipeline(cast(Any, task), model=str(folder), device=device, trust_remote_code=False), task
    except (ValueError, OSError, KeyError, ImportError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"ckpt={folder} is no export that can be opened: {one_line(error)}") from error


def _texts(file: Path, task: str) -> Iterator[Input]:
    if not file.is_file() or (suffix_of(file) not in READERS and file.suffix.lower() != ".txt"):
        raise ConfigError(f"input={file}: texts are a file that ends in .txt, {', '.join(READERS)}")
    if file.suffix.lower() == ".txt":
        try:
            pairs: Iterator[tuple[Any, Any]] = ((line, None) for line in file.read_text(encoding="utf-8").splitlines())
        except UnicodeDecodeError as error:
            raise ConfigError(f"input={file} is not UTF-8; {conversion_of(file)}") from error
    else:
        try:
            header = columns_of(file)
        except (ValueError, OSError, EOFError) as error:
            raise ConfigError(f"input={file} cannot be read: {one_line(error)}") from error
        if "text" not in header:
            raise ConfigError(f"input={file}: there is no column text; there are {', '.join(map(str, header))}")
        second = "text_pair" if "text_pair" in header and task == "text-classification" else None
        pairs = ((row.text, row.second) for row in read_table(file, Columns("text", "text", second), by_name=False))
    return _usable_texts(pairs)


def _usable_texts(pairs: Iterator[tuple[Any, Any]]) -> Iterator[Input]:
    for number, (text, pair) in enumerate(pairs, 1):
        row = {"input": "" if text is None else str(text)}
        if not row["input"].strip():
            yield row, None, f"row {number} has no text"
        elif pair is None:
            yield row, row["input"], ""
        else:
            yield {**row, "pair": str(pair)}, {"text": row["input"], "text_pair": str(pair)}, ""


def _pictures(root: Path) -> Iterator[Input]:
    found = [file for file in list_files(root) if not is_hidden(file, root)] if root.is_dir() else [root]
    for file in found:
        try:
            yield {"input": str(file)}, read({"bytes": None, "path": str(file)}), ""
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            yield {"input": str(file)}, None, one_line(error)


def _existing(place: str | None) -> Path:
    if place is None:
        raise ConfigError("mode=predict needs input=PATH: a file with texts, a picture, or a folder of pictures")
    if not Path(place).exists():
        raise ConfigError(f"input={place}: there is no such file or folder")
    return Path(place)


def _predicted(model: Any, batch: Sequence[Input], task: str) -> Iterator[Row]:
    """A row for each input of a batch, in order; the usable ones go through the pipeline together."""
    if task == "fill-mask":
        batch = [(row, value, why or _masks_lost(model.tokenizer, value)) for row, value, why in batch]
    usable = [value for _, value, why in batch if not why]
    options: Row = {"top_k": CHOICES}
    if task == "fill-mask":
        options["tokenizer_kwargs"] = {"truncation": True}
    if task == "text-classification":
        options["truncation"] = True
    found = model(usable, batch_size=BATCH, **options) if usable else []
    answers = iter([found] if task == "fill-mask" and len(usable) == 1 else found)  # it unpacks a list of one
    for row, _, why in batch:
        if why:
            yield {**row, "error": why}
            continue
        answer = next(answers)
        if task == "fill-mask":
            masks = answer if isinstance(answer[0], list) else [answer]
            yield {**row, "fills": [[(one["token_str"], one["score"]) for one in mask] for mask in masks]}
        elif model.model.config.num_labels == 1:
            yield {**row, "value": answer[0]["score"]}
        else:
            top = [(one["label"], one["score"]) for one in answer]
            yield {**row, "label": top[0][0], "score": top[0][1], "top": top}


def _masks_lost(tokenizer: Any, text: str) -> str:
    """Why a text cannot be filled in: it has no mask, or one that is cut off; empty if it can."""
    mask, written = tokenizer.mask_token, text.count(tokenizer.mask_token)
    if not written:
        return f"has no {mask}"
    left = tokenizer(text, truncation=True)["input_ids"].count(tokenizer.mask_token_id)
    return f"is longer than {tokenizer.model_max_length} tokens, and a {mask} is cut off" if left < written else ""


def _words(row: Row) -> str:
    if "fills" in row:
        return "; ".join(", ".join(f"{word} {score:.0%}" for word, score in mask[:3]) for mask in row["fills"])
    return f"{row['value']:.4g}" if "value" in row else f"{row['label']} {row['score']:.0%}"
