"""Streams: the same order each time, and a resume that no batch can tell."""

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from itertools import chain, count, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lion_lightning.data.sampler import SourceTurns, StepValues
from lion_lightning.errors import ConfigError
from lion_lightning.recipes.bert_mlm.streaming import StreamedBatches, StreamedText, pack_all
from lion_lightning.recipes.text.corpus import digest
from lion_lightning.recipes.text.text_chunks import FileChunks

pytestmark = pytest.mark.usefixtures("small_chunks")
LENGTH, BATCH = 16, 4


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def streamed(cache: str, rank: int = 0, world_size: int = 1, step: int = 0, steps: int = 60, **options: Any):  # type: ignore[no-untyped-def]
    accumulate = options.pop("accumulate_grad_batches", 1)
    settings = {"batch_size": BATCH, "sequence_length": LENGTH, "vocab_size": 400, "val_fraction": 0.2, **options}
    data = StreamedText(**settings, cache_dir=cache)
    data.setup("fit")
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_step=step,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        global_rank=rank,
        world_size=world_size,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return data


def plain(batches: Iterator[dict[str, Tensor]]) -> list[tuple[list[int], list[list[int]]]]:
    return [(batch["sample"].tolist(), batch["input_ids"].tolist()) for batch in batches]


def test_a_pool_has_every_token_and_reaches_back_for_its_last_block() -> None:
    blocks = pack_all(np.arange(100, 133, dtype=np.uint16), 11, start=2)
    assert blocks[:, 0].tolist() == [2, 2, 2, 2]
    assert blocks[:3, 1:].ravel().tolist() == list(range(100, 130))
    assert blocks[3, 1:].tolist() == list(range(123, 133))
    assert pack_all(np.arange(3, dtype=np.uint16), 8, start=9).tolist() == [[9, 0, 1, 2, 0, 1, 2, 0]]


def test_an_epoch_has_every_token_of_the_training_documents(library: Path, cache: str) -> None:
    data = streamed(cache, path=str(library))
    pools, held_out = data._pools(0), data.ready.held_out()
    tokenizer = data.ready.tokenizer
    expected: Counter[int] = Counter()
    for piece in range(10):
        for document in data.chunks[0].documents(piece):
            if digest(document) not in held_out:
                expected.update(tokenizer(document, add_special_tokens=False).input_ids)
    seen = Counter(chain.from_iterable(pools[pool][:, 1:].ravel().tolist() for pool in range(5)))
    seen.pop(tokenizer.sep_token_id)
    assert not expected - seen, "a token is missing"
    assert sum((seen - expected).values()) <= 5 * (LENGTH - 1), "more than the last blocks come twice"
    assert held_out
    assert [pools[pool].tolist() for pool in range(5)] != [pools[pool].tolist() for pool in range(5, 10)]


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_batches_are_the_pools_of_the_rank_one_after_the_other(
    library: Path, cache: str, rank: int, world_size: int
) -> None:
    data = streamed(cache, path=str(library), rank=rank, world_size=world_size, batch_size=40, steps=12)
    rows = [row for _, batch in plain(iter(data.train_dataloader())) for row in batch]
    pools = data._pools(0)
    expected = chain.from_iterable(pools[pool].tolist() for pool in count(rank, world_size))
    assert rows == list(islice(expected, len(rows)))
    assert len(rows) == 480


def test_blocks_are_shuffled_within_a_pool(library: Path, cache: str) -> None:
    data = streamed(cache, path=str(library))
    pools = data._pools(0)
    pool = next(pool for pool in range(5) if len(pools[pool]))  # the documents of one may all be held out
    text = pools[pool][:, 1:]
    running = np.concatenate(list(pools_text(data, pool)))
    in_order = [running[at : at + LENGTH - 1].tolist() for at in range(0, len(running) - LENGTH, LENGTH - 1)]
    assert {tuple(row) for row in in_order} <= {tuple(row) for row in text.tolist()}
    assert text.tolist()[: len(in_order)] != in_order


def pools_text(data: StreamedText, pool: int) -> Iterator[np.ndarray]:
    pools = data._pools(0)
    for document in pools._documents(pool):
        tokens = data.ready.tokenizer(document, add_special_tokens=False).input_ids
        yield np.array([*tokens, data.ready.tokenizer.sep_token_id])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resume_in_mid_stream_gives_the_batches_of_the_uninterrupted_run(
    library: Path, cache: str, world_size: int, workers: int
) -> None:
    options = {"path": str(library), "num_workers": workers, "world_size": world_size, "batch_size": 40}
    whole, states = [], []
    for rank in range(world_size):
        loader = streamed(cache, rank=rank, **options).train_dataloader()
        whole.append([])
        states.append([])
        loader.world_size = 1  # each of these simulated ranks answers for itself
        for batch in plain_one_by_one(loader, loader, world_size):
            whole[-1].append(batch)
            states[-1].append(loader.state_dict()["places"][0])
    epochs = states[0][-1][0][0] * world_size * 2 / 10
    assert epochs > 2, "the run does not go beyond the end of the source"
    for step in (1, 7, 23, 59):
        state = {"places": [states[rank][step - 1] for rank in range(world_size)]}
        for rank in range(world_size):
            resumed = streamed(cache, rank=rank, step=step, **options).train_dataloader()
            resumed.load_state_dict(state)
            assert len(resumed) == 60
            assert plain(iter(resumed)) == whole[rank][step:]
    assert len({str(batches) for batches in whole}) == world_size


def plain_one_by_one(loader, real, world_size):  # type: ignore[no-untyped-def]
    loader.world_size = world_size
    for batch in loader:
        loader.world_size = 1
        yield batch["sample"].tolist(), batch["input_ids"].tolist()
        loader.world_size = world_size


@pytest.mark.parametrize("workers", [1, 2])
def test_the_order_does_not_depend_on_the_number_of_loading_processes(library: Path, cache: str, workers: int) -> None:
    alone = plain(iter(streamed(cache, path=str(library)).train_dataloader()))
    assert plain(iter(streamed(cache, path=str(library), num_workers=workers).train_dataloader())) == alone
    assert plain(iter(streamed(cache, path=str(library), seed=2).train_dataloader())) != alone


def test_who_stops_reading_ends_the_loading_processes_and_may_go_on(library: Path, cache: str) -> None:
    """Else they wait for the end of the interpreter, which waits for them."""
    loader = streamed(cache, path=str(library), num_workers=2, batch_size=40).train_dataloader()
    whole = plain(iter(streamed(cache, path=str(library), batch_size=40).train_dataloader()))
    before = set(multiprocessing.active_children())
    batches = iter(loader)
    found = plain(islice(batches, 7))
    assert len(set(multiprocessing.active_children()) - before) == 2
    batches.close()
    assert set(multiprocessing.active_children()) <= before
    loader.start = 7 * 40
    loader.batch_sizes = StepValues(((0, 40),))
    assert found + plain(iter(loader)) == whole


def test_validation_reads_in_the_main_process(library: Path, cache: str) -> None:
    data = streamed(cache, path=str(library), num_workers=2)
    assert data.val_dataloader().num_workers == 0
    streams = data.train_dataloader().sources
    assert [stream.options["num_workers"] for stream in streams] == [2]


def test_ranks_share_the_samples_and_read_different_pools(library: Path, cache: str) -> None:
    ranks = [
        plain(iter(streamed(cache, path=str(library), rank=rank, world_size=2, steps=6).train_dataloader()))
        for rank in range(2)
    ]
    together = [sample for pair in zip(*ranks, strict=True) for samples, _ in pair for sample in samples]
    assert together == list(range(6 * 2 * BATCH))
    first, second = ({tuple(block) for _, blocks in rank for block in blocks} for rank in ranks)
    assert len(first & second) <= 1


class Recorder(pl.LightningModule):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[list[int], list[list[int]]]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append((batch["sample"].tolist(), batch["input_ids"].tolist()))
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_trainer_goes_on_in_mid_stream(library: Path, cache: str, tmp_path: Path, accumulate: int) -> None:
    def fit(max_steps: int, ckpt_path: str | None = None) -> tuple[Recorder, pl.Trainer]:
        data = StreamedText(
            path=str(library), batch_size=BATCH, sequence_length=LENGTH, vocab_size=400, val_fraction=0.2,
            cache_dir=cache, length_schedule=[[0, 8], [7, 16]], batch_schedule=[[0, 1], [3, 2], [8, 4]],
        )  # fmt: skip
        data.setup("fit")
        module = Recorder()
        trainer = pl.Trainer(
            max_steps=max_steps, accumulate_grad_batches=accumulate, accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, barebones=False,
            limit_val_batches=0, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=False)
        return module, trainer

    whole, _ = fit(12)
    before, trainer = fit(5)
    trainer.save_checkpoint(tmp_path / "5.ckpt")
    after, _ = fit(12, str(tmp_path / "5.ckpt"))
    assert len(whole.seen) == 12 * accumulate
    assert before.seen + after.seen == whole.seen
    sizes = [len(blocks) for _, blocks in whole.seen[::accumulate]]
    assert sizes == [2] * 3 + [4] * 4 + [2] + [4] * 4  # twice as many blocks of half the length in the first 7 steps
    assert [len(blocks[0]) for _, blocks in whole.seen[::accumulate]] == [8] * 7 + [16] * 5


def ask_places(rank: int, file: str, answers) -> None:  # type: ignore[no-untyped-def]
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    sources = [SimpleNamespace(pool=rank, block=7 + rank), SimpleNamespace(pool=5, block=rank)]
    once = StepValues(((0, 1),))
    loader = StreamedBatches(sources, SourceTurns([1, 1]), once, None, 9, 0, rank, 2)  # type: ignore[arg-type]
    state = loader.state_dict()
    for source in sources:
        source.pool = source.block = -1
    loader.load_state_dict(state)
    answers.put((rank, state, [(source.pool, source.block) for source in sources]))
    dist.destroy_process_group()


def test_the_places_of_all_ranks_are_in_the_state_of_each_and_each_finds_its_own(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    processes = [fork.Process(target=ask_places, args=(rank, str(tmp_path / "store"), answers)) for rank in range(2)]
    for process in processes:
        process.start()
    found = sorted(answers.get(timeout=100) for _ in processes)
    for process in processes:
        process.join(60)
    places = {"places": [[[0, 7], [5, 0]], [[1, 8], [5, 1]]]}
    assert found == [(0, places, [(0, 7), (5, 0)]), (1, places, [(1, 8), (5, 1)])]


def test_another_number_of_processes_cannot_go_on(library: Path, cache: str) -> None:
    loader = streamed(cache, path=str(library)).train_dataloader()
    with pytest.raises(ConfigError, match="read by 2 processes and is now read by 1"):
        loader.load_state_dict({"places": [[[0, 3]], [[1, 2]]]})


def test_what_is_validated_on_is_fixed_and_trained_on_nowhere(library: Path, cache: str, tmp_path: Path) -> None:
    data = streamed(cache, path=str(library), steps=200)
    again = streamed(str(tmp_path), path=str(library), seed=7)
    assert np.array_equal(data.ready.val, again.ready.val)
    held_out = data.ready.held_out()
    documents = [d for piece in range(10) for d in data.chunks[0].documents(piece) if digest(d) in held_out]
    assert documents
    pools = data._pools(0)
    trained = {digest(document) for pool in range(10) for document in pools._documents(pool)}
    assert not trained & held_out


def test_sources_have_the_shares_of_their_weights(tmp_path: Path, library: Path, cache: str) -> None:
    (tmp_path / "numbers.txt").write_text("\n\n".join(f"{n} times {n} is {n * n}." for n in range(3000)))
    sources = [{"path": str(library), "weight": 3}, {"path": str(tmp_path / "numbers.txt"), "weight": 1}]
    data = streamed(cache, sources=sources, steps=50)
    times = data.ready.tokenizer.convert_tokens_to_ids("times")
    rows = [block for _, blocks in plain(iter(data.train_dataloader())) for block in blocks]
    share = sum(block.count(times) >= 1 for block in rows) / len(rows)
    assert share == pytest.approx(0.25, abs=0.03)  # a block of numbers has two sentences, and prose hardly the word
    assert "75.0% of the tokens from" in data.describe()["sources (blocks)"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_from_a_dataset_resumes_too(hub_folder: Path, cache: str, workers: int) -> None:
    options = {"hub": str(hub_folder), "num_workers": workers, "steps": 30}
    loader = streamed(cache, **options).train_dataloader()
    batches, state = [], {}
    for number, batch in enumerate(loader, 1):
        batches.append((batch["sample"].tolist(), batch["input_ids"].tolist()))
        if number == 13:
            state = loader.state_dict()
    resumed = streamed(cache, step=13, **options).train_dataloader()
    resumed.load_state_dict(state)
    assert plain(iter(resumed)) == batches[13:]


def test_every_loading_process_reads_its_rows_of_a_dataset(hub_folder: Path, cache: str) -> None:
    alone, shared = (streamed(cache, hub=str(hub_folder), num_workers=workers) for workers in (0, 2))
    assert plain(iter(shared.train_dataloader())) == plain(iter(alone.train_dataloader()))


@pytest.mark.parametrize("workers", [0, 1])
def test_bytes_that_are_no_text_are_told_in_one_line(library: Path, cache: str, tmp_path: Path, workers: int) -> None:
    file = tmp_path / "bad.txt"
    file.write_bytes((library / "0.txt").read_bytes())
    loader = streamed(cache, path=str(file), num_workers=workers, batch_size=40).train_dataloader()
    stat = file.stat()
    content = bytearray(file.read_bytes())
    content[9000] = 0xFF
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ConfigError, match=r"bad\.txt is not UTF-8 \(byte 9000 is 0xff\)") as error:
        list(islice(loader, 60))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({}, r"needs one of data\.path=, data\.hub= and data\.sources="),
        ({"path": "/a", "hub": "b"}, r"needs one of data\.path="),
        ({"path": "/nowhere"}, r"data\.path=/nowhere: there is no such file"),
        ({"hub": "/nowhere"}, r"data\.path=/nowhere: there is no such file"),
        ({"sources": [{"weight": 2}]}, "each source needs one of path, hub, corpus"),
        ({"sources": ["books"]}, "each source needs one of path, hub, corpus, got 'books'"),
        ({"sources": [{"path": "LIBRARY", "weight": -1}]}, "weight must be above 0, got -1"),
        ({"sources": [{"path": "LIBRARY", "wieght": 1}]}, "data.sources: .*wieght"),
        ({"sources": [{"corpus": "LIBRARY"}]}, "made of path and hub"),
        ({"path": "LIBRARY", "limit_train_samples": 5}, "limit_train_samples means nothing for a stream"),
    ],
)
def test_bad_settings_of_a_stream_are_named(library: Path, wrong: dict[str, Any], named: str) -> None:
    for source in wrong.get("sources", []):
        if isinstance(source, dict):
            source.update({key: str(library) for key, value in source.items() if value == "LIBRARY"})
    given = {key: str(library) if value == "LIBRARY" else value for key, value in wrong.items()}
    with pytest.raises(ConfigError, match=named):
        StreamedText(batch_size=4, **given)


def test_empty_files_are_no_stream(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ConfigError, match="every file is empty"):
        FileChunks(str(tmp_path))


def test_a_stream_has_no_epochs(library: Path) -> None:
    data = StreamedText(path=str(library), batch_size=4)
    data.check_samples(10**6)
    with pytest.raises(ConfigError, match=r"trainer\.max_steps"):
        _ = data.num_train_samples
