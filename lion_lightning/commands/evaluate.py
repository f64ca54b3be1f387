"""`mode=eval` and `mode=predict`: a trained model on its validation data, and on texts or pictures of one's own.

The configuration is that of the checkpoint's run with the changes of the command line, so
`lion-train mode=eval ckpt=RUN data.batch_size=8` needs neither recipe nor data again.
"""

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import rich
import torch
from datasets import Dataset
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from transformers import AutoConfig, pipeline

from lion_lightning.errors import ConfigError
from lion_lightning.recipes.files import is_hidden, list_files, one_line
from lion_lightning.recipes.image_classification.images import read
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
TABLES: dict[str, Callable[..., Any]] = {
    ".txt": Dataset.from_text, ".csv": Dataset.from_csv, ".jsonl": Dataset.from_json, ".parquet": Dataset.from_parquet
}  # fmt: skip
Input = tuple[str, Any, str]
"""Its name in the output, what the model takes, and why it cannot be used: empty if it can."""


def evaluate(cfg: DictConfig) -> float:
    """Validate a checkpoint; returns the value of the recipe's metric and writes all of them to `run_dir/eval.json`.

    Args:
        cfg: with `ckpt`, the folder of a run or a checkpoint.

    Raises:
        ConfigError: there is no such checkpoint, or it does not fit.
    """
    quiet_libraries()
    place = _checkpoint(cfg.ckpt)
    if (place / "config.json").is_file():
        raise ConfigError(f"ckpt={cfg.ckpt} is an export; mode=eval takes the folder of a run, or a checkpoint")
    cfg = _configuration_of(place, cfg)
    module, data = _trained(place, cfg)
    trainer = build.build_trainer(cfg, None, [], bar=False)
    trainer.validate(module, datamodule=data, verbose=False)
    metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
    if trainer.is_global_zero:
        kept = Path(cfg.run_dir) / "eval.json"
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"ckpt": near(place), **metrics}, indent=2) + "\n", encoding="utf-8")
        lines = {name: f"{value:.4f}" for name, value in metrics.items()}
        show(rich.get_console(), f"{near(place)} on {cfg.data.name}", {**lines, "kept in": near(kept)})
    return metrics.get(cfg.recipe.monitor, math.nan)


def predict(cfg: DictConfig) -> float:
    """Predict what `input` holds, a line of `run_dir/predictions.jsonl` each; returns the share that could be used.

    A Hugging Face pipeline predicts from the export, whose answers are those of validation (`tests/recipes`).

    Args:
        cfg: with `ckpt`, the folder of a run, a checkpoint or an export, and `input`: a `.txt` file with a text a line,
            a `.csv`, `.jsonl` or `.parquet` with a column `text` (and `text_pair`), a picture, or a folder of pictures.

    Raises:
        ConfigError: there is no such checkpoint or input, or it is none of these.
    """
    quiet_libraries()
    place = _checkpoint(cfg.ckpt)
    with tempfile.TemporaryDirectory(prefix="lion_lightning-export-") as temporary:
        folder = place
        if not (place / "config.json").is_file():
            folder, own = Path(temporary), _configuration_of(place, cfg)
            _trained(place, own)[0].export(folder, "")
        config = AutoConfig.from_pretrained(folder)
        architecture = (config.architectures or ["none"])[0]
        task = next((task for ending, task in TASKS.items() if architecture.endswith(ending)), None)
        if task is None:
            raise ConfigError(f"ckpt={cfg.ckpt}: {architecture} is none of {', '.join(TASKS)}")
        device = "cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu"
        model: Any = pipeline(cast(Any, task), model=str(folder), device=device)
        inputs = list(_pictures(cfg.input) if task == "image-classification" else _texts(cfg.input, Path(temporary)))
        if task == "fill-mask":
            mask = model.tokenizer.mask_token
            inputs = [(name, value, why or ("" if mask in name else f"has no {mask}")) for name, value, why in inputs]
        rows = list(_predicted(model, inputs, task, config.num_labels == 1))
    kept = Path(cfg.run_dir) / "predictions.jsonl"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    _tell(cfg, place, rows, kept)
    return sum("error" not in row for row in rows) / max(1, len(rows))


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
    if place.is_dir() and not any((place / name).is_file() for name in (".metadata", "config.json")):
        raise ConfigError(f"ckpt={ckpt} is a folder that holds no run, no checkpoint and no export")
    return place


def _configuration_of(place: Path, cfg: DictConfig) -> DictConfig:
    """The configuration of the run that wrote `place`, with what the command line sets; `cfg` where it is not kept."""
    saved = next((file for file in (folder / "config.yaml" for folder in place.parents[:2]) if file.is_file()), None)
    if saved is None:
        own = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    else:
        own = OmegaConf.load(saved)
        given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
        keys = [override.key_or_group for override in OverridesParser.create().parse_overrides(list(given))]
        for key in dict.fromkeys([*keys, "run_dir"]):
            if key == "recipe" and cfg.recipe.name != own.recipe.name:
                raise ConfigError(f"recipe={cfg.recipe.name}: ckpt={cfg.ckpt} is of recipe={own.recipe.name}")
            if "/" not in key and (value := OmegaConf.select(cfg, key)) is not None:
                plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
                OmegaConf.update(own, key, plain, merge=False, force_add=True)
    own = cast(DictConfig, own)
    if not build.started_by_launcher():
        own.trainer.update({"strategy": "auto", "devices": 1, "num_nodes": 1})
    build.settle_precision(own)
    build.check(own)
    return own


def _trained(place: Path, cfg: DictConfig) -> tuple[Any, Any]:
    """The recipe's module with the weights of `place`, and its data."""
    data = build.build_data(cfg)
    cfg.trainer.max_steps = build.max_steps(cfg, data)
    module = build.build_module(cfg, data)
    with restoring(place, "ckpt"):
        module.load_state_dict(files.with_names_of(files.weights_of(place), module.state_dict()))
    return module.eval(), data


def _texts(place: str | None, cache: Path) -> Iterator[Input]:
    file = _existing(place)
    reader = TABLES.get(file.suffix.lower())
    if reader is None or not file.is_file():
        raise ConfigError(f"input={place}: texts are a file that ends in {', '.join(TABLES)}")
    try:
        table = reader(str(file), cache_dir=str(cache / "tables"))
    except Exception as error:  # of pyarrow, pandas or datasets, by the format
        raise ConfigError(f"input={place} cannot be read: {one_line(error.__cause__ or error)}") from error
    if "text" not in table.column_names:
        raise ConfigError(f"input={place}: there is no column text; there are {', '.join(table.column_names)}")
    for number, row in enumerate(table, 1):
        text, pair = row["text"], row.get("text_pair")
        usable = isinstance(text, str) and bool(text.strip())
        value = {"text": text, "text_pair": pair} if isinstance(pair, str) else text
        yield str(text), value, "" if usable else f"row {number} has no text"


def _pictures(place: str | None) -> Iterator[Input]:
    root = _existing(place)
    found = [file for file in list_files(root) if not is_hidden(file, root)] if root.is_dir() else [root]
    if not found:
        raise ConfigError(f"input={place}: the folder is empty")
    for file in found:
        try:
            picture: Image.Image | None = read({"bytes": None, "path": str(file)})
            why = ""
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            picture, why = None, one_line(error)
        yield str(file), picture, why


def _existing(place: str | None) -> Path:
    if place is None:
        raise ConfigError("mode=predict needs input=PATH: a file with texts, a picture, or a folder of pictures")
    if not Path(place).exists():
        raise ConfigError(f"input={place}: there is no such file or folder")
    return Path(place)


def _predicted(model: Any, inputs: Sequence[Input], task: str, one_value: bool) -> Iterator[dict[str, Any]]:
    """A row for each input, in order; the usable ones go through the pipeline in batches."""
    options: dict[str, Any] = {"top_k": CHOICES}
    if task == "fill-mask":
        options["tokenizer_kwargs"] = {"truncation": True}
    if task == "text-classification":
        options["truncation"] = True
    usable = iter([value for _, value, why in inputs if not why])
    answers: list[Any] = []
    while batch := list(islice(usable, BATCH)):
        found = model(batch, batch_size=BATCH, **options)
        answers += [found] if task == "fill-mask" and len(batch) == 1 else found  # which unpacks a list of one
    following = iter(answers)
    for name, _, why in inputs:
        if why:
            yield {"input": name, "error": why}
            continue
        answer = next(following)
        if task == "fill-mask":
            masks = answer if isinstance(answer[0], list) else [answer]
            yield {"input": name, "fills": [[(one["token_str"], one["score"]) for one in mask] for mask in masks]}
        elif one_value:
            yield {"input": name, "value": answer[0]["score"]}
        else:
            top = [(one["label"], one["score"]) for one in answer]
            yield {"input": name, "label": top[0][0], "score": top[0][1], "top": top}


def _tell(cfg: DictConfig, place: Path, rows: Sequence[dict[str, Any]], kept: Path) -> None:
    failed = [row for row in rows if "error" in row]
    lines = {"inputs": f"{len(rows)}: {len(rows) - len(failed)} predicted, {len(failed)} could not be used"}
    for number, row in enumerate([row for row in rows if "error" not in row][:SHOWN], 1):
        if "fills" in row:
            said = "; ".join(", ".join(f"{word} {score:.0%}" for word, score in mask[:3]) for mask in row["fills"])
        else:
            said = f"{row['value']:.4g}" if "value" in row else f"{row['label']} {row['score']:.0%}"
        lines[f"prediction {number}"] = f"{row['input']} -> {said}"
    for number, row in enumerate(failed[:SHOWN], 1):
        lines[f"not used {number}"] = f"{row['input']}: {row['error']}".removeprefix(": ")
    show(rich.get_console(), f"{near(place)} on {cfg.input}", {**lines, "kept in": near(kept)})
