"""What training would read of some data: counts by class and split, duplicates, lengths, samples. Nothing is trained.

    lion-check-data recipe=image_classification data=image_files data.path=FOLDER
    lion-check-data data=text_files data.path=FOLDER --samples 5

The settings are those of lion-train. Files, rows and pictures that cannot be used are counted as training counts them.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lion_lightning.__main__ import composed, report_error
from lion_lightning.command_line import add_config_dir, search_path, take_trusted
from lion_lightning.errors import ConfigError
from lion_lightning.recipes.bert_mlm.data import TextBlocks
from lion_lightning.recipes.image_classification.data import ImageArrays
from lion_lightning.recipes.image_classification.plots import draw_mistakes
from lion_lightning.recipes.text_classification.data import LabeledTexts, decode
from lion_lightning.training.build import build_data
from lion_lightning.training.report import show

CLASSES_SHOWN = 40
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return 0; a mistake in the settings or the data exits with one line and code 2."""
    options, overrides = _parser().parse_known_args(arguments)
    try:
        if options.samples < 0:
            raise ConfigError(f"--samples must be at least 0, got {options.samples}")
        overrides = [*take_trusted(overrides), *search_path(options.config_dir)]
        cfg = composed([*overrides, "run_dir=none"])
        check(cfg, Console(), options.samples, options.pictures)
    except Exception as error:
        report_error(error)
    return 0


def check(cfg: DictConfig, console: Console, samples: int, pictures: Path) -> None:
    """Prints the account of the data of a run.

    Args:
        cfg: the configuration of the run.
        console: where to.
        samples: decoded texts, or pictures, that are shown of each split; at 0 there are none.
        pictures: PNG file for the pictures.
    """
    for key, value in {"batch_size": 1, "batch_schedule": None}.items():  # nothing is trained: any amount is enough
        if key in cfg.data:
            cfg.data[key] = value
    cfg.trainer.accumulate_grad_batches = 1
    data: Any = build_data(cfg)
    show(console, f"data={cfg.data.name}", data.describe())
    if isinstance(data, ImageArrays):
        _images(data, console, samples, pictures)
    elif isinstance(data, LabeledTexts):
        train, val = (split.texts for split in (data.train_set, data.val_set))
        _classes(console, data.classes, train.labels, val.labels)
        _tokens(console, data.tokenizer, [_texts(train), _texts(val)])
        for name, texts in (("training", train), ("validation", val)):
            for index, ids in enumerate(_texts(texts)[:samples]):
                said = decode(data.tokenizer, ids.tolist())
                console.print(Text(f"{name} {index}: {_label(data, texts, index)}: {said}"))
    elif isinstance(data, TextBlocks):
        train, val = data.ready.train, data.ready.val
        _tokens(console, data.ready.tokenizer, [train, val])
        for name, blocks in (("training", train), ("validation", val)):
            for block in blocks[:samples]:
                console.print(Text(f"{name}: {data.ready.tokenizer.decode(block.tolist())}"))
    else:
        console.print(f"{type(data).__name__} is read while it trains: it has no more to count")


def _images(data: ImageArrays, console: Console, samples: int, pictures: Path) -> None:
    try:
        splits = data.ready
    except RuntimeError as on_access:
        console.print(Text(f"Duplicates and samples need decoded images: {on_access}"))
        train, val = (split.pictures.labels for split in (data.train_set, data.val_set))
        _classes(console, data.classes, train, val)
        return
    _classes(console, data.classes, splits.train.labels, splits.val.labels)
    _duplicates(console, "pictures with the same pixels", [splits.train.pixels, splits.val.pixels])
    if not samples:
        return
    shown = [(split, index) for split in (splits.train, splits.val) for index in _spread(len(split), samples)]
    captions = [(data.classes[split.labels[index]], f"number {index}") for split, index in shown]
    title = f"{samples} of the training set, then of the validation set, as training decodes them"
    sheet = draw_mistakes(np.stack([split.pixels[index] for split, index in shown]), captions, title)
    Image.fromarray(sheet).save(pictures)
    console.print(Text(f"Pictures: {pictures}"))


def _classes(console: Console, classes: Sequence[str], train: np.ndarray, val: np.ndarray) -> None:
    """A table with the samples of each class in each split, rare ones first; all of them are in the sums."""
    if not classes:
        return
    counts = np.stack([np.bincount(labels, minlength=len(classes)) for labels in (train, val)])
    table = Table("class", "training", "validation", "share", title=f"{len(classes)} classes, the rarest first")
    for index in np.argsort(counts.sum(0), kind="stable")[:CLASSES_SHOWN].tolist():
        share = counts[:, index].sum() / counts.sum()
        table.add_row(Text(classes[index]), *(f"{count:,}" for count in counts[:, index]), f"{share:.2%}")
    if len(classes) > CLASSES_SHOWN:
        table.add_row(f"{len(classes) - CLASSES_SHOWN} more", "", "", "")
    table.add_row("all", f"{counts[0].sum():,}", f"{counts[1].sum():,}", "100.00%")
    console.print(table)
    for split, row in zip(("training", "validation"), counts, strict=True):
        if missing := [classes[index] for index in np.flatnonzero(row == 0).tolist()]:
            names = f" of {', '.join(missing[:10])}{' ...' * (len(missing) > 10)}"
            console.print(Text.assemble((f"No {split} samples", "bold"), names))


def _tokens(console: Console, tokenizer: Any, splits: Sequence[Iterable[np.ndarray]]) -> None:
    """Lengths, unknown tokens and duplicates of the tokens of each split."""
    for name, rows in zip(("training", "validation"), splits, strict=True):
        lengths = [int((row != tokenizer.pad_token_id).sum()) for row in rows]
        unknown = sum(int((row == tokenizer.unk_token_id).sum()) for row in rows)
        at = ", ".join(
            f"{q:.0%} {value:.0f}" for q, value in zip(QUANTILES, np.quantile(lengths, QUANTILES), strict=True)
        )
        share = unknown / max(1, sum(lengths))
        console.print(f"{name}: tokens by quantile {at}; {unknown:,} unknown ({share:.2%})", highlight=False)
    _duplicates(console, "texts with the same tokens", splits)


def _duplicates(console: Console, what: str, splits: Sequence[Iterable[np.ndarray]]) -> None:
    train, val = ([row.tobytes() for row in rows] for rows in splits)
    seen = set(train)
    shared = sum(row in seen for row in val)
    console.print(
        f"{what}: {len(train) - len(seen):,} repeated in training, {len(val) - len(set(val)):,} repeated in "
        f"validation; {shared:,} of the validation set ({shared / max(1, len(val)):.2%}) also in training",
        highlight=False,
    )


def _texts(texts: Any) -> list[np.ndarray]:
    return [texts.tokens[start:end] for start, end in zip(texts.bounds[:-1], texts.bounds[1:], strict=True)]


def _label(data: LabeledTexts, texts: Any, index: int) -> str:
    return data.classes[texts.labels[index]] if data.classes else f"{texts.labels[index]:g}"


def _spread(count: int, samples: int) -> Iterator[int]:
    yield from dict.fromkeys(np.linspace(0, count - 1, min(samples, count)).astype(int).tolist())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=3, help="texts or pictures shown of each split (default: 3)")
    parser.add_argument("--pictures", type=Path, default=Path("samples.png"), help="PNG file for pictures")
    add_config_dir(parser)
    return parser
