"""Pictures that are decoded each time they are asked for, in processes; and data sets of the hub."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

import lion_lightning.recipes.image_classification.images as decoding
from lion_lightning.errors import ConfigError
from lion_lightning.recipes.image_classification.data import ImageArrays
from lion_lightning.recipes.image_classification.images import (
    UNREADABLE,
    DecodedOnAccess,
    decode,
    random_resized_crop,
    square,
)
from lion_lightning.recipes.image_classification.sources import HubImages, ImageFiles
from tests.recipes.written_images import encoded, hub_dataset, load, write_parquet


def photographs(count: int, seed: int = 0) -> list[bytes]:
    """Pictures that differ everywhere, so that any two parts of them do."""
    draw = np.random.default_rng(seed)
    return [encoded(Image.fromarray(draw.integers(0, 256, (48, 64, 3), dtype=np.uint8))) for _ in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_parquet(tmp_path / "train.parquet", photographs(16), pa.array([0, 1] * 8))
    write_parquet(tmp_path / "test.parquet", photographs(6, seed=1), pa.array([0, 1] * 3))
    return tmp_path


def undecoded(folder: Path, workers: int = 0, seed: int = 1, max_broken: int = 100) -> ImageArrays:
    source = ImageFiles(str(folder), image_size=16, max_broken=max_broken, val_share=0.5)
    data = ImageArrays(source, batch_size=4, num_workers=workers, seed=seed, path=str(folder), decoded_gib=0.0)
    data.setup("fit")
    return data


def test_what_does_not_fit_is_decoded_when_asked_for(folder: Path) -> None:
    data = undecoded(folder)
    assert isinstance(data.train_set, DecodedOnAccess)
    assert "decoded on access: over 0 GiB" in data.describe()["images"]
    assert data.image_shape == (3, 16, 16)
    assert data.num_train_samples == 16
    with pytest.raises(RuntimeError, match="decoded on access"):
        _ = data.ready
    fits = ImageArrays(ImageFiles(str(folder), image_size=16), batch_size=4, decoded_gib=1e-4)
    fits.setup("fit")
    assert len(fits.ready.train) == 16


def test_a_training_picture_is_a_function_of_seed_and_position(folder: Path) -> None:
    data, other = undecoded(folder), undecoded(folder, seed=2)
    pairs = [(100, 3), (101, 7)]
    pixels = data.train_set.__getitems__(pairs)["pixels"]
    assert torch.equal(undecoded(folder).train_set.__getitems__(pairs)["pixels"], pixels)
    assert torch.equal(data.train_set.__getitems__(pairs[1:])["pixels"][0], pixels[1]), "the rest of the batch matters"
    assert not torch.equal(data.train_set.__getitems__([(200, 3)])["pixels"][0], pixels[0])
    assert not torch.equal(other.train_set.__getitems__(pairs)["pixels"], pixels)


def test_processes_give_the_batches_that_one_process_gives(folder: Path) -> None:
    batches = []
    for workers in (0, 2):
        data = undecoded(folder, workers)
        on_cpu = SimpleNamespace(root_device=torch.device("cpu"))
        data.trainer = SimpleNamespace(
            max_steps=6, accumulate_grad_batches=1, global_step=2, global_rank=0, world_size=1, strategy=on_cpu
        )
        batches.append([batch["pixels"] for batch in data.train_dataloader()])
    assert len(batches[0]) == 4
    assert all(torch.equal(one, two) for one, two in zip(*batches, strict=True))


def test_validation_sees_the_middle(folder: Path) -> None:
    stored = {"bytes": photographs(6, seed=1)[2], "path": None}
    pixels = undecoded(folder).validation_pixels([2, 4])
    np.testing.assert_array_equal(pixels[0], square(stored, 16, 0.5))
    assert pixels.shape == (2, 3, 16, 16)
    middle = Image.open(io.BytesIO(stored["bytes"])).resize((42, 32), Image.Resampling.BICUBIC).crop((13, 8, 29, 24))
    np.testing.assert_array_equal(pixels[0], np.asarray(middle).transpose(2, 0, 1))


def test_random_parts_have_the_published_areas_and_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes: list[tuple[int, int, int, int]] = []

    def noted(
        self: Image.Image, size: tuple[int, int], method: int, box: tuple[int, int, int, int], **_: float
    ) -> Image.Image:
        boxes.append(box)
        return Image.new("RGB", size)

    monkeypatch.setattr(Image.Image, "resize", noted)
    stored = {"bytes": encoded(Image.new("RGB", (300, 200))), "path": None}
    for number in range(400):
        random_resized_crop(stored, 16, np.random.default_rng((1, number)))
    left, top, right, bottom = np.array(boxes).T
    areas, sides = (right - left) * (bottom - top) / 60_000, (right - left) / (bottom - top)
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= 300 and bottom.max() <= 200  # noqa: PT018
    assert 0.07 < areas.min() < 0.12
    assert areas.max() > 0.8
    assert sides.min() == pytest.approx(0.75, abs=0.03)
    assert sides.max() == pytest.approx(4 / 3, abs=0.03)
    assert len({*map(tuple, boxes)}) > 390


def test_an_unreadable_picture_is_replaced_in_training_and_not_counted_in_validation(folder: Path) -> None:
    blobs: list[bytes | None] = [*photographs(16)]
    blobs[3] = b"broken"
    write_parquet(folder / "train.parquet", blobs, pa.array([0, 1] * 8))
    write_parquet(folder / "test.parquet", [*photographs(5), None], pa.array([0, 1] * 3))
    data = undecoded(folder, max_broken=2)
    batch = data.train_set.__getitems__([(0, 2), (1, 3)])
    assert batch["unreadable"].tolist() == [False, True]
    assert batch["labels"].tolist() == [0, 0], "the label is that of the picture that is seen"
    seen = data.val_set.__getitems__([(4, 4), (5, 5)])
    assert seen["labels"].tolist() == [0, UNREADABLE]
    for _ in range(2):
        moved = data.transfer_batch_to_device(dict(batch), torch.device("cpu"), 0)
        assert moved.keys() == batch.keys()
    with pytest.raises(ConfigError, match="over 2 images cannot be read"):
        data.transfer_batch_to_device(batch, torch.device("cpu"), 0)


def test_what_the_host_asks_for_stays_on_the_host(folder: Path) -> None:
    batch = undecoded(folder).train_set.__getitems__([(0, 2), (1, 3)])
    moved = undecoded(folder).transfer_batch_to_device(batch, torch.device("meta"), 0)
    kinds = {name: value.device.type for name, value in moved.items()}
    assert kinds == {"pixels": "meta", "labels": "meta", "sample": "cpu", "unreadable": "cpu"}


def test_several_processes_decode_into_one_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = load(folder, image_size=16)
    splits = ImageFiles(str(folder), image_size=16).open()
    monkeypatch.setattr(decoding, "PICTURES_PER_PROCESS", 4)
    monkeypatch.setattr(decoding, "CHUNK", 3)
    labels, broken = decode(splits.train, folder / "pixels.npy", 16, max_broken=0)
    assert not broken
    np.testing.assert_array_equal(np.load(folder / "pixels.npy"), alone.train.pixels)
    assert labels.tolist() == alone.train.labels.tolist()


def test_pixel_statistics_of_pictures_are_those_of_the_pictures(folder: Path) -> None:
    data = undecoded(folder)
    mean, std = data.pixel_statistics()
    stored = [square({"bytes": blob, "path": None}, 16, 0.5) / 255 for blob in photographs(16)]
    assert mean == pytest.approx(np.mean(stored, axis=(0, 2, 3)).tolist(), rel=1e-4)
    assert std == pytest.approx(np.std(stored, axis=(0, 2, 3)).tolist(), rel=1e-4)


def test_a_data_set_of_the_hub_is_read_from_its_parquet_files(tmp_path: Path) -> None:
    hub_dataset(["cat", "dog"] * 4, column="fine_label").to_parquet(tmp_path / "train-00000-of-00001.parquet")
    hub_dataset(["dog", "owl"], column="fine_label").to_parquet(tmp_path / "test-00000-of-00001.parquet")
    source = HubImages("uoft-cs/cifar100", path=str(tmp_path), image_size=8, label="fine_label")
    opened = source.open()
    assert (len(opened.train), opened.val.labels.tolist()) == (8, [1, 2])


@pytest.mark.parametrize(
    ("gated", "advice"), [(True, "run `hf auth login`, or set data.path="), (False, "set data.path=")]
)
def test_a_hub_that_cannot_be_reached_is_one_line(gated: bool, advice: str) -> None:
    with pytest.raises(ConfigError, match="cannot be had from the Hugging Face hub") as raised:
        HubImages("someone/no-such-images", gated=gated).open()
    assert "\n" not in str(raised.value)
    assert advice in str(raised.value)
    assert ("login" in str(raised.value)) == gated
