"""Image sources: digits, folders and parquet files in the hub's schema, and what is kept of them."""

from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from lion_lightning.errors import ConfigError
from lion_lightning.recipes.image_classification.data import ImageArrays
from lion_lightning.recipes.image_classification.images import held_out
from lion_lightning.recipes.image_classification.sources import Digits, ImageFiles
from tests.recipes.written_images import (
    CLASSES,
    colors_agree,
    encoded,
    hub_dataset,
    load,
    picture,
    prepared,
    write_folder,
    write_parquet,
)


def test_digits_are_the_embedded_1797() -> None:
    splits = Digits(0.2).open()
    assert (len(splits.train), len(splits.val)) == (1438, 359)
    assert splits.train.pixels.shape[1:] == (3, 8, 8)
    assert (splits.train.pixels == splits.train.pixels[:, :1]).all(), "grey, as RGB"
    assert splits.train.pixels.dtype == np.uint8
    assert splits.train.pixels.max() > 200, "pixels use the range of a byte"
    assert splits.classes == tuple("0123456789")
    counts = np.bincount(np.concatenate([splits.train.labels, splits.val.labels]))
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as published


def test_held_out_images_are_the_same_each_time_and_no_others() -> None:
    kept, held = held_out(100, 0.3)
    again_kept, again_held = held_out(100, 0.3)
    assert sorted([*kept, *held]) == list(range(100))
    assert len(held) == 30
    assert sorted(held) == held.tolist() != list(range(30))
    assert np.array_equal(held, again_held)
    assert np.array_equal(again_kept, kept)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0])
def test_a_bad_share_is_named(fraction: float) -> None:
    with pytest.raises(ConfigError, match=f"data.val_fraction must be between 0 and 1, got {fraction}"):
        Digits(fraction).open()


def test_a_folder_of_class_folders(tmp_path: Path) -> None:
    splits = load(write_folder(tmp_path, {"dog": 8, "cat": 6, "owl": 6}))
    assert splits.classes == CLASSES
    assert (len(splits.train), len(splits.val)) == (15, 5)
    assert splits.train.pixels.shape == (15, 3, 8, 8)
    assert colors_agree(splits.train, CLASSES)
    assert colors_agree(splits.val, CLASSES)


@pytest.mark.parametrize("held", ["test", "val", "validation"])
def test_a_folder_with_a_validation_folder(tmp_path: Path, held: str) -> None:
    write_folder(tmp_path / "train", {"cat": 4, "dog": 4})
    write_folder(tmp_path / held, {"cat": 1, "dog": 2}, kind="jpg")
    splits = load(tmp_path)
    assert (len(splits.train), len(splits.val)) == (8, 3)
    assert sorted(splits.val.labels) == [0, 1, 1]
    assert colors_agree(splits.val, splits.classes)


def test_parquet_files_as_the_hub_writes_them(tmp_path: Path) -> None:
    hub_dataset(["cat", "dog", "owl"] * 3).to_parquet(tmp_path / "train-00000-of-00002.parquet")
    hub_dataset(["owl", "owl"]).to_parquet(tmp_path / "train-00001-of-00002.parquet")
    hub_dataset(["dog", "cat"]).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    splits = load(tmp_path)
    assert splits.classes == CLASSES, "the names of the classes are lost"
    assert splits.train.labels.tolist() == [0, 1, 2] * 3 + [2, 2]
    assert splits.val.labels.tolist() == [1, 0]
    assert colors_agree(splits.train, CLASSES)


def test_parquet_files_in_a_folder_per_split(tmp_path: Path) -> None:
    """The layout of the hub's own conversion to parquet: default/train/0000.parquet, default/test/0000.parquet."""
    for split, names in (("train", ["cat", "dog"] * 4), ("test", ["dog", "cat", "dog"])):
        (tmp_path / "default" / split).mkdir(parents=True)
        hub_dataset(names).to_parquet(tmp_path / "default" / split / "0000.parquet")
    splits = load(tmp_path)
    assert (len(splits.train), len(splits.val)) == (8, 3)
    assert splits.val.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "names",
    [
        ("birds-train", "birds-test"),
        ("partial-train/0", "partial-test/0"),
        ("1_Train", "1_dev"),
        ("train/a/0", "test/a/0"),
    ],
)
def test_the_split_is_a_word_anywhere_in_the_name(tmp_path: Path, names: tuple[str, str]) -> None:
    for name, classes in zip(names, (["cat", "dog"] * 4, ["dog", "cat", "dog"] * 2), strict=True):
        file = tmp_path / f"{name}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        hub_dataset(classes).to_parquet(file)
    splits = load(tmp_path)
    assert (len(splits.train), len(splits.val)) == (8, 6), "the test set is trained on"


def test_names_without_a_training_split_are_listed(tmp_path: Path) -> None:
    hub_dataset(["cat", "dog"] * 4).to_parquet(tmp_path / "birds-test.parquet")
    with pytest.raises(
        ConfigError, match=r"no file is for training; by their names there are birds-test.parquet \(test"
    ):
        load(tmp_path)
    assert len(load(tmp_path / "birds-test.parquet").train) == 6, "a file that is named is read whatever its name"
    hub_dataset(["cat", "dog"] * 4).to_parquet(tmp_path / "train-or-test.parquet")
    with pytest.raises(ConfigError, match=r"the name train-or-test.parquet says test and train; rename it"):
        load(tmp_path)


def test_several_files_whose_names_say_no_split_are_told(tmp_path: Path) -> None:
    for name in ("a", "b"):
        hub_dataset(["cat", "dog"] * 4).to_parquet(tmp_path / f"{name}.parquet")
    assert prepared(tmp_path).describe()["splits"] == "no file has a name that says a split: all 2 are for training"


def test_a_file_is_no_validation_set_for_the_first_letters_of_its_name(tmp_path: Path) -> None:
    hub_dataset(["cat", "dog"] * 8).to_parquet(tmp_path / "values.parquet")
    splits = load(tmp_path)
    assert (len(splits.train), len(splits.val)) == (12, 4)


@pytest.mark.parametrize("name", ["birds.parquet", "test.parquet", ".birds.parquet", "metadata.parquet"])
def test_one_parquet_file(tmp_path: Path, name: str) -> None:
    """It is read whatever its name would mean in a folder."""
    hub_dataset(["cat", "dog", "owl", "cat"] * 5).to_parquet(tmp_path / name)
    splits = load(tmp_path / name)
    assert (len(splits.train), len(splits.val)) == (15, 5)
    assert colors_agree(splits.train, CLASSES)
    assert colors_agree(splits.val, CLASSES)


def test_the_label_column_of_cifar100_is_found(tmp_path: Path) -> None:
    hub_dataset(["cat", "dog"] * 4, column="fine_label").to_parquet(tmp_path / "train.parquet")
    assert load(tmp_path).classes == CLASSES


def several_columns(names: Sequence[str], images: Sequence[str], labels: Sequence[str]) -> datasets.Dataset:
    """All image columns but the last are black, all label columns but the last say cat."""
    features = {name: datasets.Image() for name in images}
    features |= {name: datasets.ClassLabel(names=list(CLASSES)) for name in labels}
    black, colored = [Image.new("RGB", (8, 8))] * len(names), [picture(name) for name in names]
    rows = {name: colored if name == images[-1] else black for name in images}
    rows |= {name: list(names) if name == labels[-1] else ["cat"] * len(names) for name in labels}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (["mask", "image"], ["season", "label"]),
        (["mask", "img"], ["coarse_label", "fine_label"]),
    ],
)
def test_of_several_columns_the_one_with_the_usual_name_is_taken_and_told(
    tmp_path: Path, images: list[str], labels: list[str]
) -> None:
    several_columns(["cat", "dog"] * 8, images, labels).to_parquet(tmp_path / "train.parquet")
    data = prepared(tmp_path)
    assert colors_agree(data.ready.train, CLASSES)
    assert set(data.ready.train.labels) == {0, 1}
    assert data.describe()["columns"] == f"{images[1]} of {', '.join(images)}; {labels[1]} of {', '.join(labels)}"


def test_columns_that_cannot_be_told_apart_are_listed(tmp_path: Path) -> None:
    several_columns(["cat", "dog"] * 8, ["image"], ["season", "kind"]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ConfigError, match=r"there are 2 label columns, season, kind; data.source.label chooses"):
        load(tmp_path)
    assert "columns" not in prepared(tmp_path, label="kind").describe()
    several_columns(["cat", "dog"] * 8, ["front", "back"], ["label"]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(
        ConfigError, match=r"there are 2 image columns, front, back; call the one with the pictures image"
    ):
        load(tmp_path)


def test_parquet_with_names_for_labels(tmp_path: Path) -> None:
    names = ["owl", "dog", "owl", "cat"] * 2
    write_parquet(tmp_path / "train.parquet", [encoded(picture(name)) for name in names], pa.array(names))
    splits = load(tmp_path)
    assert splits.classes == CLASSES
    assert colors_agree(splits.train, CLASSES)
    assert colors_agree(splits.val, CLASSES)


@pytest.mark.parametrize("dtype", [pa.int64(), pa.int8(), pa.uint8(), pa.uint16()])
def test_parquet_with_bare_numbers_for_labels(tmp_path: Path, dtype: pa.DataType) -> None:
    numbers = list(range(12)) * 2
    write_parquet(tmp_path / "train.parquet", [encoded(picture("cat"))] * 24, pa.array(numbers, dtype))
    splits = load(tmp_path)
    assert splits.classes == tuple(str(number) for number in range(12)), "class 2 has to be called 2, not 10"
    assert sorted([*splits.train.labels, *splits.val.labels]) == sorted(numbers)


@pytest.mark.parametrize("size", [(40, 10), (10, 40), (3, 3), (8, 8), (9, 8), (1001, 3)])
def test_the_middle_square_of_a_picture_is_taken(tmp_path: Path, size: tuple[int, int]) -> None:
    """White in the middle square, black beside it."""
    width, height = size
    side = min(size)
    canvas = Image.new("RGB", size, "black")
    canvas.paste(
        (255, 255, 255), ((width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2)
    )
    write_parquet(tmp_path / "train.parquet", [encoded(canvas)] * 4, pa.array(["cat", "dog"] * 2))
    pixels = load(tmp_path).train.pixels
    assert pixels.shape[1:] == (3, 8, 8)
    assert pixels[:, :, 1:-1, 1:-1].min() > 200
    assert pixels.mean() > 220


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA", "I;16"])
def test_pictures_of_any_mode_become_rgb(tmp_path: Path, mode: str) -> None:
    image = Image.new("L", (8, 8), 255)
    image = (
        image.convert("I").point(lambda value: value * 257).convert("I;16") if mode == "I;16" else image.convert(mode)
    )
    kind = "TIFF" if mode == "CMYK" else "PNG"
    write_parquet(tmp_path / "train.parquet", [encoded(image, kind)] * 4, pa.array(["cat", "dog"] * 2))
    pixels = load(tmp_path).train.pixels
    assert pixels.shape == (3, 3, 8, 8)
    assert pixels.min() == 255


def test_decoded_images_are_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "pictures", {"cat": 8, "dog": 8})

    def prepared() -> ImageArrays:
        data = ImageArrays(
            ImageFiles(str(tmp_path / "pictures"), image_size=8), batch_size=4, cache_dir=str(tmp_path / "cache")
        )
        data.prepare_data()
        data.setup("fit")
        return data

    first = prepared()
    picture("cat").save(tmp_path / "pictures" / "cat" / "new.png")
    changed = prepared()
    assert len(changed.ready.train) + len(changed.ready.val) == 17
    monkeypatch.setattr(ImageFiles, "open", None)
    second = prepared()
    assert np.array_equal(second.ready.train.pixels, changed.ready.train.pixels)
    assert second.ready.classes == first.ready.classes == ("cat", "dog")
    assert isinstance(second.ready.train.pixels, np.memmap)
    assert "decoded just now" in first.describe()["images"]
    assert "from the cache" in second.describe()["images"]
    batch = second.train_set.__getitems__([(100, 3), (101, 0)])
    assert batch["sample"].tolist() == [100, 101]
    assert batch["labels"].tolist() == second.ready.train.labels[[3, 0]].tolist()
    assert batch["pixels"].numpy().tolist() == second.ready.train.pixels[[3, 0]].tolist()


def test_pixel_statistics_are_those_of_the_training_images() -> None:
    data = ImageArrays(Digits(), batch_size=4)
    data.setup("fit")
    mean, std = data.pixel_statistics()
    pixels = Digits().open().train.pixels.astype(np.float64) / 255
    assert mean == pytest.approx([pixels.mean()] * 3, rel=1e-4)
    assert std == pytest.approx([pixels.std()] * 3, rel=1e-4)


def test_brackets_in_the_name_of_a_parquet_file_are_no_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "birds [v2]"
    folder.mkdir()
    write_parquet(folder / "train[1].parquet", [encoded(picture("cat"))] * 9, ["x"] * 9)
    write_parquet(folder / "train1.parquet", [encoded(picture("dog"))] * 9, ["a"] * 9)
    assert load(folder).classes == ("a", "x")


def test_the_only_picture_of_a_class_is_trained_on(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 40, "dog": 40})
    for number in range(6):
        (tmp_path / f"rare {number}").mkdir()
        picture("owl").save(tmp_path / f"rare {number}" / "one.png")
    splits = load(tmp_path, val_fraction=0.3)
    assert set(splits.train.labels.tolist()) == set(range(8))
    assert len(splits.train) + len(splits.val) == 86


def test_statistics_are_of_images_from_all_over_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lion_lightning.recipes.image_classification.data.STATISTICS_FROM_ARRAYS", 20)
    write_folder(tmp_path / "train", {"cat": 40, "dog": 40})
    write_folder(tmp_path / "val", {"cat": 2, "dog": 2})
    mean, _ = prepared(tmp_path).pixel_statistics()
    assert mean == pytest.approx([105 / 255, 105 / 255, 10 / 255], abs=0.01)


def test_what_a_search_holds_out_is_decoded_as_for_validation(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"cat": 10, "dog": 10}, size=(40, 60))
    write_folder(tmp_path / "val", {"cat": 2, "dog": 2})
    data = prepared(tmp_path)
    data.decoded_gib, data.classes = 0.0, ()
    data.__dict__.pop("splits", None)
    data.setup("fit")
    is_held = np.arange(20) % 5 == 4
    data.hold_out(is_held)
    assert (len(data.train_set), len(data.val_set), len(data.train_labels)) == (16, 4, 16)
    first, again = (data.val_set.__getitems__([(number, 0)])["pixels"] for number in (0, 7))
    assert bool((first == again).all()), "no crop that depends on the position in the run"
