"""Image sources: the embedded digits, pictures on disk, and data sets of the Hugging Face hub.

Adding a source is a class with `fingerprint()` and `open()`, and a file in conf/data/.
"""

import glob
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, Protocol

import numpy as np
from datasets import Features, load_dataset
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from pyarrow import ArrowException
from pyarrow.parquet import read_metadata, read_schema

from lion_lightning.errors import ConfigError, check_flag, check_number

from ..files import (
    account,
    check_fraction,
    existing,
    fingerprint_of,
    folders_without,
    is_hidden,
    list_files,
    without_surrogates,
)
from ..tables import Columns, columns_of, label_name, read_table
from .images import Images, ImageSplits, held_out
from .labels import LABEL_NAMES, Part, Parts, PictureSplits, listed, pictures_of

IMAGE_SUFFIXES = frozenset(ImageFolder.EXTENSIONS) | {".avif"}
SPLITS = {
    "train": "train", "training": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val",
    "testing": "test", "test": "test",
}  # fmt: skip
SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLITS)})(?![a-z])")
HUB_VALIDATION = ("validation", "val", "test")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # labels by file_name
METADATA_HINT = "file_name is the path of a picture below the folder of the table; data.source.label chooses its label"


class ImageSource(Protocol):
    """The interface of an image source."""

    def fingerprint(self) -> str:
        """A string that changes whenever the images would."""
        ...

    def open(self) -> ImageSplits | PictureSplits:
        """The images, decoded or not; the same in the same order each time."""
        ...


class Digits:
    """The 1,797 handwritten 8x8 digits of the UCI repository (Alpaydin and Kaynak, 1998, CC BY 4.0), embedded.

    Args:
        val_fraction: share held out, the same images whatever the seed.
    """

    def __init__(self, val_fraction: float = 0.2) -> None:
        self.val_fraction = check_fraction(val_fraction)

    def fingerprint(self) -> str:
        return f"digits {self.val_fraction}"

    def open(self) -> ImageSplits:
        with np.load(Path(__file__).with_name("digits.npz")) as stored:
            # As RGB, since that is what the models' image processors make of any picture.
            pixels, labels = np.repeat(stored["pixels"][:, None], 3, axis=1), stored["labels"].astype(np.int64)
        kept, held = held_out(len(labels), self.val_fraction)
        classes = tuple(str(digit) for digit in range(10))
        return ImageSplits(Images(pixels[kept], labels[kept]), Images(pixels[held], labels[held]), classes)


class ImageFiles:
    """Pictures on disk: a folder with one folder per class, or parquet files as the Hugging Face hub writes them.

    Folders directly in `path` are splits by their names in `SPLITS` (train, val, test, ...), or by names that differ in
    such a word alone (`seg_train` and `seg_test`): if all that hold images are, or a training one with folders in it
    and another. Otherwise they are classes. The same holds one folder deeper where `path` has but that one. A class is
    the path of its folder. A `metadata.csv`, `.jsonl` or `.parquet` in `path` or a split folder may give the labels
    instead, by `file_name`. The split of a parquet file is a word in its name or that of a folder. Without a validation
    set a fixed share of the training set is held out. Every file is used or reported.

    Args:
        path: the folder, or one parquet file.
        image_size: pictures are resized to this many pixels on the shorter side, and the middle square is taken.
        val_fraction: share held out where there is no validation set.
        max_broken: pictures that cannot be decoded and are left out; more are an error.
        label: the label column; None finds it.
        val_share: of the shorter side that validation sees, where pictures are decoded on access.
        split_folders: whether the folders in `path` are splits (true) or classes (false); None decides by their names.

    Raises:
        ConfigError: nothing usable is there.
    """

    def __init__(
        self,
        path: str | None,
        image_size: int = 32,
        val_fraction: float = 0.1,
        max_broken: int = 100,
        label: str | None = None,
        val_share: float = 1.0,
        split_folders: bool | None = None,
    ) -> None:
        if not path:
            raise ConfigError("data.path=null: it must be an image folder, or parquet files in the hub's schema")
        check_number("data.image_size", image_size, "[1, inf)", whole=True)
        check_number("data.source.val_share", val_share, "(0, 1]")
        check_number("data.source.max_broken", max_broken, "[0, inf)", whole=True)
        check_fraction(val_fraction)
        if split_folders is not None:
            check_flag("data.source.split_folders", split_folders)
        self.path = Path(path).expanduser()
        self.image_size, self.val_fraction, self.max_broken = image_size, val_fraction, max_broken
        self.label = None if label is None else str(label)  # Hydra reads 0 as a number
        self.val_share, self.split_folders = val_share, split_folders
        self._find_files()

    def _find_files(self) -> None:
        existing(self.path, "data.path")
        is_file = self.path.is_file()  # which was named: it is read whatever its name means in a folder
        if is_file and self.path.suffix.lower() != ".parquet":
            raise ConfigError(
                f"data.path={self.path} is no .parquet file; give that, or a folder with one folder of images per class"
            )
        self.folder = self.path.parent if is_file else self.path
        self.found = [self.path] if is_file else list_files(self.path)
        hidden = {file for file in self.found if not is_file and is_hidden(file, self.folder)}
        lost = {file for file in self.found if file not in hidden and not file.exists()}
        there = [file for file in self.found if file not in hidden and file not in lost]
        self.labels_from: set[Path] = set()
        self.unlabelled: dict[Path, Sequence[str]] = {}  # columns of metadata without one of LABEL_NAMES
        self.metadata = [file for file in there if not is_file and file.name in METADATA]
        images = [file for file in there if file.suffix.lower() in IMAGE_SUFFIXES]
        parquet = [file for file in there if file.suffix.lower() == ".parquet" and file.name not in METADATA]
        self.is_parquet = bool(parquet) or is_file
        self.files = parquet or (self.found if is_file else images)
        if not self.files:
            unused = {"hidden": sorted(hidden), "a link without a target": sorted(lost), "neither": there}
            found = account(len(self.found), {}, unused, self.folder)
            raise ConfigError(f"data.path={self.path}: no parquet file and no image in it; {found}")
        self.root = self.folder if self.is_parquet else self._top(images)
        self.empty = [] if self.is_parquet else folders_without(images, self.root)
        if bad := next(
            (file for file in (*self.found, *self.empty) if without_surrogates(str(file)) != str(file)), None
        ):
            name = next(part for part in bad.parts if without_surrogates(part) != part)
            raise ConfigError(f"data.path={self.path}: the name {os.fsencode(name)!r} is not UTF-8; rename it")
        known = {*self.files, *images, *self.metadata}
        self.unused = {
            "hidden": sorted(hidden),
            "a link without a target": sorted(lost),
            "images beside parquet files": images if self.is_parquet else [],
            "no images": [file for file in there if file not in known],
        }

    def _top(self, images: Sequence[Path]) -> Path:
        """The folder of the splits or classes: `folder`, or one below it that alone has images, as in an archive."""
        direct, labelled = ({file.parent for file in files} for files in (images, self.metadata))
        top = self.folder
        while top not in direct | labelled:
            below = {top / folder.relative_to(top).parts[0] for folder in direct}
            if len(below) > 1 or below & (direct - labelled) or min(below).name.lower() in SPLITS:
                break
            top = below.pop()
        return top

    def fingerprint(self) -> str:
        settings = f"{self.image_size} {self.val_fraction} {self.max_broken} {self.label} {self.split_folders}"
        unused = sum(map(len, self.unused.values()))
        empty = [str(folder) for folder in self.empty]
        return f"image_files {settings} {unused} {empty} {fingerprint_of([*self.files, *self.metadata])}"

    def open(self) -> PictureSplits:
        try:
            unused = {reason: list(files) for reason, files in self.unused.items()}
            notes: dict[str, str] = {}
            parts = self._parquet_parts(unused, notes) if self.is_parquet else self._folder_parts(unused, notes)
            kind = "files" if self.is_parquet else "images"
            used = {f"{name} {kind}": sum(part.files for part in found) for name, found in parts.items()}
            if self.labels_from:
                used["files with labels"] = len(self.labels_from)
            for file in self.metadata:
                if file not in self.labels_from:
                    names = listed(self.unlabelled.get(file, ()))
                    columns = f" (its columns: {names}; data.source.label chooses)" if names else ""
                    unused.setdefault(f"metadata without labels of images here{columns}", []).append(file)
            if self.empty:
                notes["folders without images"] = listed([str(place.relative_to(self.folder)) for place in self.empty])
            notes["files"] = account(len(self.found), used, unused, self.folder)
            if not parts.get("train"):
                raise ConfigError(f"there is no training image in it: {notes['files']}")
            return self._pictures(parts, notes)
        except ConfigError as error:
            raise ConfigError(f"data.path={self.path}: {error}") from error

    def _parquet_parts(self, unused: dict[str, list[Path]], notes: dict[str, str]) -> Parts:
        """The datasets of each split, one for each run of files that declare the same columns and class names."""
        names = {file: file.relative_to(self.folder) for file in self.files}
        splits = {file: "train" if self.path.is_file() else split_of(name) for file, name in names.items()}
        if not any(splits.values()) and len(splits) > 1:
            notes["splits"] = f"no file has a name that says a split: all {len(splits)} are for training"
        elif None in splits.values() and any(splits.values()):
            stray = next(file for file, split in splits.items() if split is None)
            raise ConfigError(f"the name of {names[stray]} says no split, while other files' names do")
        elif not {"train", None} & {*splits.values()}:
            taken = listed([f"{names[file]} ({split})" for file, split in splits.items()])
            raise ConfigError(f"no file is for training; by their names there are {taken}")
        parts: Parts = {}
        for split in ("train", "val", "test"):
            files = [file for file, found in splits.items() if (found or "train") == split]
            if split == "test" and "val" in parts:
                unused["files of the test split, since there is a validation split"] = files
            elif files:
                parts["val" if split == "test" else split] = self._read_parquet(files, unused)
        if not self.path.is_file() and (missing := _missing_shards(map(str, names.values()))):
            notes["missing files"] = listed(missing)
        return parts

    def _read_parquet(self, files: Sequence[Path], unused: dict[str, list[Path]]) -> list[Part]:
        runs: list[tuple[Any, list[str]]] = []
        for file in files:
            try:
                features, is_empty = Features.from_arrow_schema(read_schema(file)), not read_metadata(file).num_rows
            except (ArrowException, OSError, ValueError) as error:  # the last of a column of unknown type
                raise ConfigError(f"{file} cannot be read: {_root_cause(error)}") from error
            if is_empty:
                unused.setdefault("tables without rows", []).append(file)
                continue
            if not runs or runs[-1][0] != features:
                runs.append((features, []))
            runs[-1][1].append(str(file))
        if not runs:
            raise ConfigError(f"{listed([file.name for file in files])} has no rows")
        try:
            # Escaped, since `datasets` takes brackets in a path for a pattern.
            names = [[glob.escape(file) for file in run] for _, run in runs]
            return [Part(load_dataset("parquet", data_files=run, split="train"), len(run)) for run in names]
        except Exception as error:  # of pyarrow, fsspec and datasets, none with a common base
            raise ConfigError(f"cannot be read: {_root_cause(error)}") from error

    def _folder_parts(self, unused: dict[str, list[Path]], notes: dict[str, str]) -> Parts:
        """The pictures of each split with the names of their classes, from their folders or from metadata."""
        tops: dict[str, list[Path]] = {}
        for file in self.files:
            inside = file.relative_to(self.root).parts
            tops.setdefault(inside[0] if len(inside) > 1 else "", []).append(file)
        splits = _splits_of_folders([top for top in tops if top])
        if self._are_splits(splits, tops) if self.split_folders is None else self.split_folders:
            sides = {split: [top for top in splits if splits[top] == split] for split in ("train", "val", "test")}
            if sides["val"] and sides["test"]:
                unused["images of the test split, since there is a validation split"] = _files_of(
                    tops, sides.pop("test")
                )
            sides = {"train": sides["train"], "val": sides["val"] or sides.get("test", [])}
            unused["images in no split folder"] = _files_of(tops, [top for top in tops if not splits.get(top)])
            roots = {split: {top: tops[top] for top in found} for split, found in sides.items()}
        else:
            if named := sorted(top for top, split in splits.items() if split):
                notes["folders"] = (
                    f"{', '.join(named)}: taken for classes; data.source.split_folders=true reads them as splits"
                )
            roots = {"train": {"": self.files}}
        labels = {
            split: [pair for top, files in found.items() for pair in self._labelled(self.root / top, files, unused)]
            for split, found in roots.items()
        }
        shortened = _short_names({name for _, name in found if isinstance(name, tuple)} for found in labels.values())
        return {
            split: [Part.of_files([file for file, _ in pairs], [shortened.get(name) or str(name) for _, name in pairs])]
            for split, pairs in labels.items()
            if pairs
        }

    def _are_splits(self, splits: Mapping[str, str | None], tops: Mapping[str, list[Path]]) -> bool:
        """Whether folders with these names are splits: all of them, or a training and another one with classes."""
        found = {*splits.values()}
        has_classes = any(
            len(file.relative_to(self.root).parts) > 2
            for top, split in splits.items()
            for file in (tops[top] if split == "train" else ())
        )
        return "train" in found and (None not in found or (has_classes and len(found - {None}) > 1))

    def _labelled(
        self, root: Path, files: Sequence[Path], unused: dict[str, list[Path]]
    ) -> list[tuple[Path, str | tuple[str, ...]]]:
        """The images below `root`, each with the folders of its class, or with its label in the metadata."""
        base, known = self._read_metadata(root)
        if known is None:
            loose = [file for file in files if file.parent == root]
            if loose:
                unused.setdefault("images in no class folder", []).extend(loose)
            return [(file, file.relative_to(root).parts[:-1]) for file in files if file.parent != root]
        named = {file.relative_to(base).as_posix(): file for file in files}
        unnamed = [file for name, file in named.items() if name not in known]
        if unnamed:
            unused.setdefault("images that the metadata does not name", []).extend(unnamed)
        missing = known.keys() - named.keys()
        if missing:
            raise ConfigError(
                f"{len(missing):,} of the {len(known):,} images that the metadata names are not there, "
                f"such as {min(missing)}"
            )
        return [(file, known[name]) for name, file in named.items() if name in known]

    def _read_metadata(self, root: Path) -> tuple[Path, dict[str, str] | None]:
        """The folder whose metadata labels the images below `root`, and label by path below that folder, None without.

        It is `root`, or the one above if the metadata there names images in the folders of splits.
        """
        for folder in dict.fromkeys((root, self.root)):
            mine = [file for file in self.metadata if file.parent == folder]
            columns = {file: column for file in mine if (column := self._label_column(file))}
            if not columns:
                continue
            labels = self._labels_in(columns)
            if folder != root:
                here = {file.relative_to(folder).as_posix() for file in self.files}
                below = f"{root.relative_to(folder).as_posix()}/"
                if here.isdisjoint(labels):
                    continue
                labels = {name: label for name, label in labels.items() if name.startswith(below) or name not in here}
            self.labels_from.update(columns)
            return folder, labels
        return root, None

    def _labels_in(self, columns: Mapping[Path, str]) -> dict[str, str]:
        """Label by name in the metadata files of one folder, each with its label column."""
        labels: dict[str, str] = {}
        for file, column in columns.items():
            for row in read_table(file, Columns("file_name", column), hint=METADATA_HINT):
                label = label_name(row.label, f"{file.name}, row {row.number}")
                if label is None:
                    raise ConfigError(f"{file.name}, row {row.number}: {row.text} has no {column}")
                name = PureWindowsPath(str(row.text)).as_posix()  # also of ./a.png and a\b.png
                if labels.setdefault(name, label) != label:
                    raise ConfigError(f"{file.name} gives {row.text} the labels {labels[name]!r} and {label!r}")
        return labels

    def _label_column(self, file: Path) -> str | None:
        if self.label:
            return self.label
        names = columns_of(file)
        found = next((name for name in LABEL_NAMES if name in names), None)
        if found is None:
            self.unlabelled[file] = names
        return found

    def _pictures(self, parts: Parts, notes: Mapping[str, str]) -> PictureSplits:
        return pictures_of(
            parts, self.image_size, self.val_fraction, self.max_broken, self.label, self.val_share, notes
        )


def _files_of(tops: Mapping[str, list[Path]], names: Iterable[str]) -> list[Path]:
    return [file for name in names for file in tops[name]]


def _splits_of_folders(names: Sequence[str]) -> dict[str, str | None]:
    """`train`, `val` or `test` for folders with such a name, or with names that differ in such a word alone."""
    by_rest: dict[str, dict[str, str]] = {}
    for name in names:
        if len(words := SPLIT_WORD.findall(name.lower())) == 1:
            by_rest.setdefault(SPLIT_WORD.sub("", name.lower()), {})[name] = SPLITS[words[0]]
    known: dict[str, str] = {}
    for rest, found in by_rest.items():
        if not rest or ("train" in found.values() and len({*found.values()}) > 1):
            known.update(found)
    return {name: known.get(name) for name in names}


def _short_names(splits: Iterable[set[tuple[str, ...]]]) -> dict[str | tuple[str, ...], str]:
    """The name of a class by the folders of its images: their path, without a first or last part shared in a split."""
    each = [folders for folders in splits if folders]
    short = {folder: folder for folders in each for folder in folders}
    for end, rest in ((-1, slice(None, -1)), (0, slice(1, None))):
        while (
            len(short) > 1
            and all(len(parts) > 1 for parts in short.values())
            and all(len({short[folder][end] for folder in folders}) == 1 for folders in each)
        ):
            short = {folder: parts[rest] for folder, parts in short.items()}
    return {folder: "/".join(s) for folder, s in short.items()}


class HubImages(ImageFiles):
    """A data set of the Hugging Face hub, or its parquet files in a folder.

    Args:
        dataset: its name, such as `uoft-cs/cifar10`.
        path: a folder with its parquet files; None fetches them, once.
        gated: whether its terms must be accepted first, by a person who is logged in.
        revision: a commit, tag or branch of it.
        image_size, max_broken, label, val_share: see `ImageFiles`.
    """

    def __init__(
        self,
        dataset: str,
        path: str | None = None,
        image_size: int = 32,
        max_broken: int = 100,
        label: str | None = None,
        val_share: float = 1.0,
        gated: bool = False,
        revision: str = "main",
    ) -> None:
        self.dataset, self.gated, self.revision, self.fetched = dataset, gated, revision, path is None
        super().__init__(path or dataset, image_size, max_broken=max_broken, label=label, val_share=val_share)

    def _find_files(self) -> None:
        if not self.fetched:
            super()._find_files()

    def fingerprint(self) -> str:
        if not self.fetched:
            return super().fingerprint()
        return f"hub {self.dataset} {self.revision} {self.image_size} {self.max_broken} {self.label}"

    def open(self) -> PictureSplits:
        if not self.fetched:
            return super().open()
        try:
            splits = load_dataset(self.dataset, revision=self.revision)
        except Exception as error:  # of the network, the hub and the cache, none with a common base
            raise ConfigError(self._advice(error)) from error
        train = "train" if "train" in splits else next(iter(splits))
        val = next((name for name in HUB_VALIDATION if name in splits and name != train), None)
        found = {"train": train} if val is None else {"train": train, "val": val}
        return self._pictures({split: [Part(splits[name], 0)] for split, name in found.items()}, {})

    def _advice(self, error: Exception) -> str:
        login = f"accept its terms at huggingface.co/datasets/{self.dataset} and run `hf auth login`, or "
        return (
            f"data: {self.dataset} cannot be had from the Hugging Face hub ({_root_cause(error)}); "
            f"{login if self.gated else ''}set data.path= to a folder with its parquet files"
        )


def split_of(file: Path) -> str | None:
    """`train`, `val` or `test` by a word in the name of a file, else of a folder: `birds-test-0.parquet`.

    Raises:
        ConfigError: one name has words of two splits.
    """
    for name in (file.name, *(folder.name for folder in file.parents)):
        found = {SPLITS[word] for word in SPLIT_WORD.findall(name.lower())}
        if len(found) > 1:
            raise ConfigError(
                f"the name {name} says {' and '.join(sorted(found))}; rename it, so that it says one split"
            )
        if found:
            return found.pop()
    return None


def _missing_shards(names: Iterable[str]) -> list[str]:
    """Names that are not among `names` though another says that there are so many: `train-00001-of-00003.parquet`.

    The hub once wrote a hash before the ending, which nobody can tell of a missing file.
    """
    sets: dict[tuple[str, int, str], set[int]] = {}
    for name in names:
        if found := re.fullmatch(r"(.*-)(\d{1,6})-of-(\d{1,6})(-[0-9a-f]+)?\.parquet", name):
            sets.setdefault((found[1], len(found[2]), found[3]), set()).add(int(found[2]))
    return [
        f"{before}{number:0{width}}-of-{count}.parquet"
        for (before, width, count), there in sets.items()
        for number in range(int(count) + 1)
        if number != (0 if int(count) in there else int(count))  # counted from 1 or from 0
        if number not in there
    ]


def _root_cause(error: BaseException) -> str:
    """The first line of the innermost cause, which the libraries wrap in general messages."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".splitlines()[0]
