"""`mode=predict`: a trained model's predictions for texts or pictures of your own."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import rich
import torch
from omegaconf import DictConfig
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, pipeline

from lion_lightning.commands.evaluate import checkpoint_at, configuration_of, export, folder_of, is_export, trained
from lion_lightning.errors import ConfigError
from lion_lightning.recipes.files import existing, is_hidden, list_files, one_line
from lion_lightning.recipes.image_classification import airbench, cifar_resnet  # noqa: F401 (tells transformers of them)
from lion_lightning.recipes.image_classification.images import read
from lion_lightning.recipes.tables import READERS, Columns, columns_of, read_table, reading, suffix_of
from lion_lightning.training import build
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
"""The start of its output row, the model's input, and why it cannot be used (empty if it can)."""


def predict(cfg: DictConfig) -> float:
    """Predict what `input` holds, a line of `run_dir/predictions.jsonl` each; returns the share that could be used.

    A Hugging Face pipeline predicts from the export, whose answers are those of validation (`tests/recipes`) without
    `test_time_flip`. Nothing that comes with the model is run as code.

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
    place = checkpoint_at(cfg.ckpt)
    if cfg.input is None:
        raise ConfigError("mode=predict needs input=PATH: a file with texts, a picture, or a folder of pictures")
    source = existing(cfg.input, "input")
    with tempfile.TemporaryDirectory(prefix="lion_lightning-export-") as temporary:
        folder = place if is_export(place) else _export_of(place, cfg, Path(temporary))
        model, task = _pipeline(folder, cfg)
        inputs = _pictures(source) if task == "image-classification" else _texts(source, task)
        kept = Path(cfg.run_dir) / "predictions.jsonl"
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.unlink(missing_ok=True)  # an earlier one would seem to be the answer where this one fails
        unfinished = kept.with_suffix(".unfinished")  # what an input that turns out unreadable leaves
        answered: list[Row] = []
        failed: list[Row] = []
        total = {True: 0, False: 0}
        with unfinished.open("w", encoding="utf-8") as written:
            while batch := list(islice(inputs, BATCH)):
                for row in _predicted(model, batch, task):
                    written.write(json.dumps(row, ensure_ascii=False) + "\n")
                    total["error" in row] += 1
                    (failed if "error" in row else answered).append(row)
                del answered[SHOWN:], failed[SHOWN:]
    count = sum(total.values())
    if not count:
        unfinished.unlink()
        raise ConfigError(f"input={cfg.input}: there is nothing in it")
    unfinished.replace(kept)
    lines = {"inputs": f"{count}: {total[False]} predicted, {total[True]} could not be used"}
    for number, row in enumerate(answered, 1):
        lines[f"prediction {number}"] = f"{row['input']} -> {_words(row)}"
    for number, row in enumerate(failed, 1):
        lines[f"not used {number}"] = f"{row['input']}: {row['error']}".removeprefix(": ")
    show(rich.get_console(), f"{near(place)} on {cfg.input}", {**lines, "kept in": near(kept)})
    return total[False] / count


def _export_of(place: Path, cfg: DictConfig, temporary: Path) -> Path:
    """The export of the run, if it is of this checkpoint, else a new one in `temporary`, which needs the data."""
    kept = folder_of(place) / "export"
    weights = kept / "model.safetensors"
    is_best = place.name == "best.ckpt" and is_export(kept) and weights.is_file()
    if is_best and weights.stat().st_mtime >= place.stat().st_mtime:
        return kept
    module = trained(place, configuration_of(place, cfg))[0]
    if not hasattr(module, "export"):
        raise ConfigError(
            f"ckpt={place}: {type(module).__name__} has no export(folder, card), which mode=predict needs"
        )
    export(module, temporary, place)
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
        options: Row = {"model": str(folder), "device": device}
        if task == "image-classification":  # torchvision, if it is installed, resizes otherwise than training did
            options["image_processor"] = AutoImageProcessor.from_pretrained(folder, backend="pil")
        return pipeline(cast(Any, task), trust_remote_code=False, **options), task
    except (ValueError, OSError, KeyError, ImportError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"ckpt={folder} is no export that can be opened: {one_line(error)}") from error


def _texts(file: Path, task: str) -> Iterator[Input]:
    if not file.is_file() or (suffix_of(file) not in READERS and file.suffix.lower() != ".txt"):
        raise ConfigError(f"input={file}: texts are a file that ends in .txt, {', '.join(READERS)}")
    if file.suffix.lower() == ".txt":
        return _usable_texts(_lines(file))
    header = columns_of(file)
    second = "text_pair" if "text_pair" in header and task == "text-classification" else None
    for name in ("text", second):
        if name and header.count(name) != 1:
            wrong = "are several columns" if name in header else "is no column"
            raise ConfigError(f"input={file}: there {wrong} {name}; there are {', '.join(map(str, header))}")
    rows = read_table(file, Columns("text", "text", second), by_name=False)
    return _usable_texts((row.text, row.second) for row in rows)


def _lines(file: Path) -> Iterator[tuple[str, None]]:
    with reading(file), file.open(encoding="utf-8-sig") as lines:
        yield from ((line.rstrip("\n"), None) for line in lines)


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
        name = str(file).encode("utf-8", "backslashreplace").decode()  # of bytes that are not UTF-8
        try:
            yield {"input": name}, read({"bytes": None, "path": str(file)}), ""
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            yield {"input": name}, None, one_line(error)


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
