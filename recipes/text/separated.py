"""CSV and TSV as a dataset of `datasets`, whose own reader, that of pandas, drops part of a row in silence.

Here every text is as it was written, the words NA and null included, or its row is named in an error.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import BuilderConfig, DatasetBuilder, DatasetInfo, Features, GeneratorBasedBuilder, SplitGenerator, Value
from datasets.builder import Key

from lion_lightning.errors import ConfigError

from ..files import fingerprint_of, without_surrogates
from ..tables import READERS, reading, suffix_of

SEPARATORS = {".csv": ",", ".csv.gz": ",", ".tsv": "\t", ".tsv.gz": "\t"}
NO_OPTIONS = {"name", "version", "description", "data_dir", "data_files", "sep"}  # change nothing of how a row is read
FORMAT_VERSION = 1  # raise it when what is read of a file changes


@dataclass
class TablesConfig(BuilderConfig):
    """What a dataset is made of; the library keeps it in its cache by a hash of this.

    Attributes:
        column: the one that is read.
        tables: the files of each split.
        fingerprint: of their content.
    """

    column: str = "text"
    tables: Mapping[str, Sequence[str]] = field(default_factory=dict)
    fingerprint: str = ""


class Tables(GeneratorBasedBuilder):
    """A dataset with one column of text."""

    BUILDER_CONFIG_CLASS = TablesConfig

    def _info(self) -> DatasetInfo:
        return DatasetInfo(features=Features({self.config.column: Value("string")}))

    def _split_generators(self, dl_manager: Any) -> list[SplitGenerator]:
        return [SplitGenerator(name=split, gen_kwargs={"files": files}) for split, files in self.config.tables.items()]

    def _generate_examples(self, files: Sequence[str]) -> Iterator[tuple[Key, dict[str, str]]]:
        for shard, file in enumerate(files):
            for number, text in enumerate(read_column(Path(file), self.config.column)):
                yield Key(shard, number), {self.config.column: text}


def strict(builder: DatasetBuilder, column: str) -> DatasetBuilder:
    """`builder`, or in its place one that reads the same files strictly, if they are CSV or TSV without options."""
    if builder.name != "csv":
        return builder
    tables = {str(split): [str(file) for file in files] for split, files in builder.config.data_files.items()}
    paths = [Path(file) for files in tables.values() for file in files]
    default = vars(type(builder.config)())
    options = {name for name, value in vars(builder.config).items() if value != default[name]} - NO_OPTIONS
    if options or any(SEPARATORS.get(suffix_of(path)) != builder.config.sep for path in paths):
        return builder
    return Tables(column=column, tables=tables, fingerprint=f"{FORMAT_VERSION} {fingerprint_of(paths)}")


def read_column(file: Path, column: str) -> Iterator[str]:
    """The texts of `column` in a CSV or TSV file.

    Raises:
        ConfigError: the column is missing or there twice, a row has more or fewer fields than the header, or the file
            cannot be read.
    """
    with reading(file):
        header, rows = READERS[suffix_of(file)](file)
        if header.count(column) != 1:
            wrong = "there twice" if column in header else "not"
            raise ConfigError(f"data.column={column} is {wrong} in {file}, which has {', '.join(header) or 'none'}")
        place = header.index(column)
        for number, row in enumerate(rows, 1):
            if len(row) != len(header):
                hint = "; a comma inside a text needs quotes around it" if SEPARATORS[suffix_of(file)] == "," else ""
                raise ConfigError(
                    f"{file}: row {number} after the header has {len(row)} fields, the header {len(header)}{hint}"
                )
            yield without_surrogates(row[place])
