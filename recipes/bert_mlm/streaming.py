"""Text that is tokenised while it is trained on: never whole on disk, never whole in memory.

A source is cut into chunks. The chunks come in an order that (seed, position) alone decides, epoch after epoch. A fixed
number of them make a pool, whose blocks are shuffled; pools go to the ranks in turn, and to the loading processes of a
rank. So the order of a rank's blocks is a function of (seed, rank, number of ranks), and the rank's place in it is two
whole numbers for each source: the pool, and the block in it. Those are what a checkpoint keeps.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from lion_lightning.data.sampler import SourceTurns, StepValues, StreamOrder
from lion_lightning.errors import ConfigError

from ..text.blocks import encode
from ..text.corpus import Mixture, Source, check_weight, digest, place_of
from ..text.text_chunks import ChunkSample, FileChunks, HubChunks, TextChunks
from .data import TextBlocks, as_batch


class Pools(Dataset):
    """The blocks of the pools of one source: item `n` is the `n`-th pool of the whole run.

    Args:
        chunks: the text.
        tokenizer: its [CLS] begins a block, its [SEP] ends a document.
        length: tokens in a block.
        held_out: digests of documents that are not trained on.
        key: of the order of chunks and blocks.
    """

    def __init__(
        self, chunks: TextChunks, tokenizer: PreTrainedTokenizerBase, length: int, held_out: frozenset[int], key: int
    ) -> None:
        self.chunks, self.tokenizer, self.length = chunks, tokenizer, length
        self.held_out, self.key = held_out, key
        self.order = StreamOrder([len(chunks)], key)

    def __getitem__(self, pool: int) -> np.ndarray | ConfigError:
        """Integers (blocks, length) in the order of training; or what is wrong with the text.

        A ConfigError is returned, since one that is raised in a loading process arrives wrapped in a traceback.
        """
        if get_worker_info() is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
        try:
            texts = list(encode(self._documents(pool), self.tokenizer))
        except ConfigError as error:
            return error
        if not texts:
            return np.empty((0, self.length), np.uint16)
        blocks = pack_all(np.concatenate(texts), self.length, self.tokenizer.cls_token_id)
        generator = torch.Generator().manual_seed((self.key << 20) + pool & 2**63 - 1)
        return blocks[torch.randperm(len(blocks), generator=generator).numpy()]

    def _documents(self, pool: int) -> Iterator[str]:
        first = pool * self.chunks.chunks_per_pool
        for position in range(first, first + self.chunks.chunks_per_pool):
            for document in self.chunks.documents(self.order.index(position)):
                if document.strip() and digest(document) not in self.held_out:
                    yield document


def pack_all(text: np.ndarray, length: int, start: int) -> np.ndarray:
    """Every token of `text` in blocks (blocks, length): the last one reaches back into the one before it."""
    width = length - 1
    if len(text) < width:
        text = np.resize(text, width)  # repeated: a pool of less than a block
    whole = text[: len(text) // width * width].reshape(-1, width)
    if len(text) % width:
        whole = np.concatenate([whole, text[None, -width:]])
    return np.concatenate([np.full((len(whole), 1), start, text.dtype), whole], axis=1)


class SourceStream:
    """The blocks of one source that go to one rank, one after the other, from any place on.

    Attributes:
        pool: pools of this rank that are consumed.
        block: blocks consumed of the current one.
    """

    def __init__(self, pools: Pools, rank: int, world_size: int, options: Mapping[str, Any]) -> None:
        self.pools, self.rank, self.world_size, self.options = pools, rank, world_size, options
        self.pool = self.block = 0
        self._current = np.empty((0, pools.length), np.uint16)
        self._rest: Iterator[Any] | None = None

    def take(self) -> np.ndarray:
        """The next block: integers (length,)."""
        while self._rest is None or self.block >= len(self._current):
            self._next_pool()
        self.block += 1
        return self._current[self.block - 1]

    def close(self) -> None:
        """End the loading processes; `take` begins new ones at the same place."""
        self._rest = None

    def _next_pool(self) -> None:
        if self._rest is None:
            mine = count(self.pool * self.world_size + self.rank, self.world_size)
            loader: DataLoader = DataLoader(self.pools, batch_size=None, sampler=mine, **self.options)
            self._rest = iter(loader)
        else:
            self.pool, self.block = self.pool + 1, 0
        found = next(self._rest)
        if isinstance(found, ConfigError):
            raise found
        self._current = found


class StreamedBatches:
    """The batches of one rank, a loader whose state is the place of each rank in each source.

    Args:
        sources: of this rank.
        turns: whose block comes when.
        batch_sizes: blocks of each batch of this rank.
        lengths: tokens per block at each position of the run.
        num_batches: from the beginning of the run to its end.
        start: samples of the whole run, over all ranks, that are already consumed.
        rank, world_size: of this process.
    """

    def __init__(
        self,
        sources: Sequence[SourceStream],
        turns: SourceTurns,
        batch_sizes: StepValues,
        lengths: StepValues | None,
        num_batches: int,
        start: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.sources, self.turns, self.batch_sizes, self.lengths = sources, turns, batch_sizes, lengths
        self.num_batches, self.start, self.rank, self.world_size = num_batches, start, rank, world_size

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        position = self.start
        try:
            for batch in range(self.batch_sizes.steps_in(self.start // self.world_size), self.num_batches):
                size = self.batch_sizes.at(batch)
                first = self.batch_sizes.before(batch)  # of this rank's own samples
                blocks = [self.sources[self.turns.at(number)[0]].take() for number in range(first, first + size)]
                mine = position + self.rank * size
                yield as_batch(np.stack(blocks), range(mine, mine + size), self.lengths)
                position += size * self.world_size
        finally:  # also when iteration stops early: Lightning ends only the loading processes of a DataLoader
            for source in self.sources:
                source.close()

    def state_dict(self) -> dict[str, Any]:
        """The positions of all ranks; a collective call."""
        mine = [[source.pool, source.block] for source in self.sources]
        if self.world_size == 1:
            return {"places": [mine]}
        places: list[Any] = [None] * self.world_size
        dist.all_gather_object(places, mine)
        return {"places": places}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        places = state_dict.get("places", [])
        if len(places) != self.world_size:
            raise ConfigError(
                f"resume: the stream was read by {len(places)} processes and is now read by {self.world_size}; "
                "a resumed stream keeps their number"
            )
        for source, (pool, block) in zip(self.sources, places[self.rank], strict=True):
            source.pool, source.block = pool, block


class StreamedText(TextBlocks):
    """Text that is tokenised while it is trained on.

    The tokenizer (unless one is named), the validation set and the word frequencies come from a bounded sample of the
    chunks, evenly spread, kept in the cache. The documents held out of it are trained on nowhere.

    Args:
        path: UTF-8 text: a file, a folder of .txt and .md files, or a glob.
        hub: a dataset on the hub, or a folder in its format, in place of `path`; with `config`, `split`, `column`,
            `revision` and `document_start` as for `HubText`.
        sources: several, in place of both: `path` or `hub` of each with its arguments, and `weight`, its share of the
            training tokens.
        others: see `TextBlocks`.
    """

    def __init__(
        self,
        path: str | None = None,
        hub: str | None = None,
        config: str | None = None,
        split: str = "train",
        column: str = "text",
        revision: str | None = None,
        document_start: str | None = None,
        sources: Sequence[Mapping[str, Any]] | None = None,
        **others: Any,
    ) -> None:
        if sum(map(bool, (path, hub, sources))) != 1:
            raise ConfigError("data=streaming needs one of data.path=, data.hub= and data.sources=")
        if others.get("limit_train_samples") is not None:
            raise ConfigError("data.limit_train_samples means nothing for a stream; set trainer.max_steps")
        options = {
            "config": config, "split": split, "column": column, "revision": revision, "document_start": document_start
        }  # fmt: skip
        single = {"path": path} if path else {"hub": hub, **options}
        given = list(sources or [single])
        self.chunks = [_chunks(source) for source in given]
        labels = [str(source[place_of(source)]) for source in given]
        samples = [ChunkSample(chunks) for chunks in self.chunks]
        weights = [check_weight(source) for source in given]
        mixture = Mixture(tuple(map(Source, labels, samples, weights)))
        super().__init__(mixture, **others)

    @property
    def num_train_samples(self) -> int:
        """A stream has no end: ConfigError."""
        raise ConfigError("trainer.max_epochs means nothing for a stream; set trainer.max_steps")

    def check_samples(self, effective_batch_size: int) -> None:
        """A stream has samples for every batch size."""

    def describe(self) -> dict[str, str]:
        """Lines for the summary at the start of a run."""
        lines = super().describe()
        chunks = sum(map(len, self.chunks))
        lines["tokens"] = lines["tokens"].replace("for training", f"in the sample of a stream of {chunks:,} chunks")
        return lines

    def train_dataloader(self) -> StreamedBatches:
        trainer = self._trainer()
        options = {key: value for key, value in super()._options().items() if key != "pin_memory"}
        streams = [
            SourceStream(self._pools(number), trainer.global_rank, trainer.world_size, options)
            for number in range(len(self.chunks))
        ]
        return StreamedBatches(
            streams,
            SourceTurns([source.weight for source in self.sources]),
            self._batch_sizes(),
            self._lengths(),
            num_batches=trainer.max_steps * trainer.accumulate_grad_batches,
            start=self.samples_before(trainer.global_step),
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )

    def _options(self) -> dict[str, Any]:
        """Those of validation, whose blocks are memory-mapped: a process for them would only take memory."""
        return {**super()._options(), "num_workers": 0, "persistent_workers": False}

    def _pools(self, number: int) -> Pools:
        return Pools(
            self.chunks[number],
            self.ready.tokenizer,
            self.settings.sequence_length,
            self.ready.held_out(),
            key=self.seed + (number << 32),
        )


def _chunks(source: Mapping[str, Any]) -> TextChunks:
    place = place_of(source)
    options = {key: value for key, value in source.items() if key not in (place, "weight")}
    if place == "corpus":
        raise ConfigError("data.sources: a stream is made of path and hub, not of corpus")
    try:
        return FileChunks(source[place], **options) if place == "path" else HubChunks(source[place], **options)
    except TypeError as error:
        raise ConfigError(f"data.sources: {error}") from error
