"""Bad data for the image recipe: one clear message, or counted and told; nothing silently dropped."""

import io
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from lion_lightning.errors import ConfigError
from lion_lightning.recipes.image_classification.data import ImageArrays
from lion_lightning.recipes.image_classification.images import read, square
from lion_lightning.recipes.image_classification.sources import ImageFiles
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


def giant() -> bytes:
    """A valid PNG of 100 million pixels in a hundred kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 10_000, 10_000, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(10_000 * (1 + 1250)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def tiff(pixels: np.ndarray) -> bytes:
    """A grey TIFF of signed integers, which Pillow does not write with 16 bits."""
    height, width = pixels.shape
    fields = {
        256: width, 257: height, 258: 8 * pixels.itemsize, 259: 1, 262: 1, 273: 8, 277: 1, 278: height,
        279: pixels.nbytes, 339: 2,
    }  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    head = b"II*\0" + struct.pack("<I", 8 + pixels.nbytes)
    return head + pixels.tobytes() + struct.pack("<H", len(fields)) + entries + bytes(4)


def test_a_class_that_only_validation_has_is_an_error(tmp_path: Path) -> None:
    blobs = [encoded(picture("cat"))] * 4
    write_parquet(tmp_path / "train.parquet", blobs, pa.array(["cat", "dog"] * 2))
    write_parquet(tmp_path / "test.parquet", blobs, pa.array(["cat", "dog", "owl", "cat"]))
    with pytest.raises(ConfigError, match=r"validation image 2 has the label 'owl', .* 2 training classes; so has 1"):
        load(tmp_path)


def test_a_class_folder_that_only_validation_has_keeps_its_name(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"cat": 4, "owl": 4})
    write_folder(tmp_path / "test", {"cat": 1, "dog": 1, "owl": 1})
    splits = load(tmp_path)
    assert splits.classes == CLASSES
    assert colors_agree(splits.val, splits.classes)
    assert colors_agree(splits.train, splits.classes)


def test_a_missing_label_column_is_an_error_that_lists_the_columns(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [encoded(picture("cat"))] * 4, pa.array([1.0] * 4), column="weight")
    with pytest.raises(ConfigError, match=r"and a label column, found image, weight; data\.source\.label chooses"):
        load(tmp_path)


def test_a_parquet_file_without_images_is_an_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "train.parquet")
    with pytest.raises(ConfigError, match="needs an image column and a label column, found text, label"):
        load(tmp_path)


def test_plain_bytes_are_told_from_an_image_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [encoded(picture("cat"))] * 2, "label": [0, 1]}), tmp_path / "train.parquet")
    with pytest.raises(ConfigError, match=r"found image, label \(an image column is a struct of bytes and path\)"):
        load(tmp_path)


def test_a_file_of_a_set_that_is_missing_is_told(tmp_path: Path) -> None:
    for name in ("train-00000-of-00003", "train-00002-of-00003", "test-0-of-1"):
        hub_dataset(["cat", "dog"] * 4).to_parquet(tmp_path / f"{name}.parquet")
    assert prepared(tmp_path).describe()["missing files"] == "train-00001-of-00003.parquet"
    assert "missing files" not in prepared(tmp_path / "train-00000-of-00003.parquet").describe()
    hub_dataset(["cat", "dog"]).to_parquet(tmp_path / "train-00001-of-00003.parquet")
    assert "missing files" not in prepared(tmp_path).describe()
    (tmp_path / "train-00000-of-00003.parquet").rename(tmp_path / "train-00003-of-00003.parquet")
    assert "missing files" not in prepared(tmp_path).describe(), "counted from 1"
    for number in (1, 2):  # as the hub once named them
        place = tmp_path / f"train-0000{number}-of-00003.parquet"
        place.rename(place.with_name(f"train-0000{number}-of-00003-ab{number}.parquet"))
    (tmp_path / "train-00003-of-00003.parquet").unlink()
    assert prepared(tmp_path).describe()["missing files"] == "train-00000-of-00003.parquet"


def test_a_parquet_file_without_rows_is_left_out_and_told(tmp_path: Path) -> None:
    hub_dataset(["cat", "dog"] * 4).to_parquet(tmp_path / "train-0.parquet")
    hub_dataset([]).to_parquet(tmp_path / "train-1.parquet")
    assert "1 not used: tables without rows, such as train-1.parquet" in prepared(tmp_path).describe()["files"]
    hub_dataset([]).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ConfigError, match=r"data.path=.*: test.parquet has no rows"):
        load(tmp_path)


def test_an_unlabelled_image_is_an_error(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [encoded(picture("cat"))] * 4, pa.array([0, 1, None, 0]))
    with pytest.raises(ConfigError, match=r"train image 2 has the label None, .* so has 1 of 4 images"):
        load(tmp_path)


BROKEN = {
    "no picture": b"this is no picture",
    "cut off": encoded(Image.effect_noise((64, 64), 80))[:900],
    "only a header": encoded(picture("cat"))[:20],
    "a wrong checksum": encoded(picture("cat"))[:-20] + bytes(20),
    "empty": b"",
    "null": None,
    "100 million pixels": giant(),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")
def test_a_broken_picture_is_left_out_and_told(tmp_path: Path, kind: str) -> None:
    names = ["cat", "dog", "owl", "dog"] * 3
    blobs: list[bytes | None] = [encoded(picture(name)) for name in names]
    blobs[5] = BROKEN[kind]
    write_parquet(tmp_path / "train.parquet", blobs, pa.array(names))
    hub_dataset(["dog", "cat"]).to_parquet(tmp_path / "test.parquet")
    data = prepared(tmp_path)
    assert (len(data.ready.train), len(data.ready.val)) == (11, 2)
    assert colors_agree(data.ready.train, CLASSES), "labels slipped by one"
    assert "1 of 12 images cannot be read: image 5: " in data.describe()["left out (train)"]
    assert prepared(tmp_path).describe()["left out (train)"] == data.describe()["left out (train)"], "the second start"


def test_broken_files_in_a_folder_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"cat": 6, "dog": 6})
    write_folder(tmp_path / "val", {"cat": 2, "dog": 2})
    (tmp_path / "val" / "dog" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    data = prepared(tmp_path)
    assert "1.png" in data.describe()["left out (val)"]
    assert colors_agree(data.ready.val, data.ready.classes)
    assert len(data.ready.val) == 3


def test_too_many_broken_pictures_are_an_error(tmp_path: Path) -> None:
    blobs = [b"broken"] * 3 + [encoded(picture("cat"))] * 9
    write_parquet(tmp_path / "train.parquet", blobs, pa.array(["cat", "dog"] * 6))
    assert len(load(tmp_path, max_broken=3).train) > 0
    with pytest.raises(ConfigError, match=r"data.path=.*over 1 images cannot be read, the last of them image \d"):
        load(tmp_path, max_broken=1)


def test_no_picture_that_can_be_read_is_an_error(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [encoded(picture("cat"))] * 4, pa.array(["cat", "dog"] * 2))
    write_parquet(tmp_path / "test.parquet", [b"broken"] * 3, pa.array(["cat"] * 3))
    with pytest.raises(ConfigError, match="none of the 3 val images can be read: image 0: cannot identify"):
        load(tmp_path)


def test_a_class_without_training_images_is_told(tmp_path: Path) -> None:
    hub_dataset(["cat", "owl"]).to_parquet(tmp_path / "train.parquet")
    hub_dataset(["dog", "cat", "dog"]).to_parquet(tmp_path / "test.parquet")
    told = prepared(tmp_path).describe()
    assert told["only in validation"] == "dog (2 images)"


def test_a_validation_set_without_a_class_of_training_is_an_error(tmp_path: Path) -> None:
    """Tiny ImageNet has `train/CLASS/images/0.png` but `val/images/0.png`, and its labels in a text file."""
    write_folder(tmp_path / "train", {"cat": 4, "dog": 4})
    (tmp_path / "val" / "images").mkdir(parents=True)
    picture("cat").save(tmp_path / "val" / "images" / "0.png")
    with pytest.raises(ConfigError, match=r"no validation image has a class of training: .* images, .* dog"):
        load(tmp_path)


def test_a_class_whose_pictures_are_all_broken_is_told(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"cat": 4, "dog": 4, "owl": 1})
    write_folder(tmp_path / "val", {"cat": 1, "dog": 1})
    (tmp_path / "train" / "owl" / "0.png").write_bytes(b"no picture")
    told = prepared(tmp_path).describe()
    assert told["without any image"] == "owl"
    write_folder(tmp_path / "val", {"owl": 2})
    assert prepared(tmp_path).describe()["only in validation"] == "owl (2 images)"
    (tmp_path / "train" / "owl" / "0.png").unlink()
    on_access = ImageArrays(ImageFiles(str(tmp_path), image_size=8), batch_size=4, decoded_gib=0.0)
    on_access.setup("fit")
    assert on_access.describe()["only in validation"] == "owl (2 images)"


def test_an_empty_class_folder_is_told(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"cat": 4, "dog": 4, "owl": 0})
    write_folder(tmp_path / "val", {"cat": 1, "dog": 1})
    (tmp_path / "test" / "cat").mkdir(parents=True)
    (tmp_path / "train" / ".hidden").mkdir()
    assert prepared(tmp_path).describe()["folders without images"] == "test, train/owl"
    (tmp_path / "val" / "owl").mkdir()
    assert prepared(tmp_path).describe()["folders without images"] == "test, train/owl, val/owl", "from the cache"


def test_files_that_are_no_images_are_counted(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 8, "dog": 8})
    (tmp_path / "cat" / "notes.txt").write_text("about cats")
    (tmp_path / "dog" / "song.mp3").write_bytes(b"wuff")
    assert "2 not used: no images, such as cat/notes.txt" in prepared(tmp_path).describe()["files"]


def test_a_parquet_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    hub_dataset(["cat", "dog"] * 4).to_parquet(tmp_path / "train.parquet")
    whole = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / "train.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"data.path=.*train.parquet cannot be read: .*Parquet"):
        load(tmp_path)


def test_a_validation_file_without_the_label_is_named(tmp_path: Path) -> None:
    hub_dataset(["cat", "dog"] * 4).to_parquet(tmp_path / "train.parquet")
    hub_dataset(["cat", "dog"]).remove_columns("label").to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ConfigError, match=r"data.path="):
        load(tmp_path)


def test_lists_of_labels_are_refused(tmp_path: Path) -> None:
    labels = pa.array([[0, 1], [1]] * 4)
    write_parquet(tmp_path / "train.parquet", [encoded(picture("cat"))] * 8, labels)
    with pytest.raises(ConfigError, match="label must hold one class per image"):
        load(tmp_path)
    named = hub_dataset(["cat", "dog"] * 4, column="kind").add_column("label", labels.to_pylist())
    named.to_parquet(tmp_path / "train.parquet")
    assert colors_agree(load(tmp_path).train, CLASSES)


def test_the_label_column_can_be_named(tmp_path: Path) -> None:
    hub_dataset(["cat", "dog"] * 4, column="kind").to_parquet(tmp_path / "train.parquet")
    assert load(tmp_path, label="kind").classes == CLASSES
    with pytest.raises(ConfigError, match="a label column sort, found image, kind"):
        load(tmp_path, label="sort")


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path: Path) -> None:
    """Pillow's own conversion makes everything above 255 white."""
    ramp = np.linspace(0, 65_535, 64).round().astype(np.uint16).reshape(8, 8)
    pixels = read({"bytes": encoded(Image.fromarray(ramp)), "path": None})
    np.testing.assert_array_equal(np.asarray(pixels)[..., 0], ramp // 257)


def test_a_turned_photograph_is_turned_back(tmp_path: Path) -> None:
    """Orientation 6: the camera was held so that the top of the scene is at the right of the stored picture."""
    upright = Image.new("RGB", (40, 40), "black")
    upright.paste((255, 255, 255), (0, 0, 40, 20))
    stream, notes = io.BytesIO(), Image.Exif()
    notes[0x0112] = 6
    upright.rotate(90).save(stream, "JPEG", exif=notes)
    pixels = square({"bytes": stream.getvalue(), "path": None}, 8)
    assert pixels[:, :3].min() > 200
    assert pixels[:, -3:].max() < 50


def test_the_range_of_floats_is_not_guessed() -> None:
    with pytest.raises(ValueError, match="32-bit floats"):
        read({"bytes": encoded(Image.new("F", (8, 8)), "TIFF"), "path": None})


@pytest.mark.parametrize("dtype", [np.int32, np.int16])
def test_the_range_of_wide_and_signed_integers_is_not_guessed(dtype: type) -> None:
    """Scaled as 16 bits, a picture with values up to 255 is black; Pillow gives all of them as 32-bit integers."""
    with pytest.raises(ValueError, match="32-bit or signed integers, whose range is unknown"):
        read({"bytes": tiff(np.full((8, 8), 200, dtype)), "path": None})


def test_sixteen_bits_of_a_ppm_file_are_scaled() -> None:
    blob = b"P5 8 8 65535 " + np.full((8, 8), 25_700, ">u2").tobytes()
    np.testing.assert_array_equal(np.asarray(read({"bytes": blob, "path": None})), 100)


def test_a_validation_set_smaller_than_a_batch_is_used_whole(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"cat": 8, "dog": 8})
    write_folder(tmp_path / "val", {"cat": 1, "dog": 2})
    data = prepared(tmp_path)
    data.trainer = SimpleNamespace(
        global_rank=0, world_size=1, strategy=SimpleNamespace(root_device=torch.device("cpu"))
    )
    assert sum(len(batch["labels"]) for batch in data.val_dataloader()) == 3
    data.trainer.world_size = 4
    with pytest.raises(ConfigError, match="3 validation samples are too few for 4 processes"):
        data.val_dataloader()


@pytest.mark.parametrize("path", [None, "", "/nowhere"])
def test_a_missing_path_is_named(path: str | None) -> None:
    with pytest.raises(ConfigError, match=r"data\.path="):
        ImageFiles(path)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ConfigError, match="no parquet file and no image in it"):
        ImageFiles(str(tmp_path))


def test_a_picture_that_grows_to_gigabytes_when_resized_is_not_decoded(tmp_path: Path) -> None:
    """1 x 20,000 pixels are 163 bytes as a file; with 224 pixels on the shorter side they would take 4 GiB."""
    blob = encoded(Image.new("1", (20_000, 1)))
    assert len(blob) < 200
    with pytest.raises(ValueError, match="20000x1, resized to 4480000x224, is over 64,000,000 pixels"):
        square({"bytes": blob, "path": None}, 224)
    assert square({"bytes": blob, "path": None}, 8).shape == (3, 8, 8)
    names = ["cat", "dog"] * 6
    write_parquet(tmp_path / "train.parquet", [blob, *(encoded(picture(name)) for name in names[1:])], pa.array(names))
    lines = prepared(tmp_path, image_size=224, val_fraction=0.5).describe()
    assert any("image 0: 20000x1, resized" in lines.get(f"left out ({split})", "") for split in ("train", "val"))
