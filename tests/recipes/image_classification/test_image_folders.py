"""Every file of an image folder is used or reported, the split comes from the top folders, classes from their names."""

import os
from pathlib import Path

import datasets
import pytest

from lion_lightning.errors import ConfigError
from lion_lightning.recipes.files import account, list_files
from lion_lightning.recipes.image_classification.images import ImageSplits
from lion_lightning.recipes.image_classification.sources import ImageFiles
from tests.recipes.written_images import colors_agree, encoded, load, picture, prepared, write_folder


def images_in(splits: ImageSplits) -> int:
    return len(splits.train) + len(splits.val)


def per_class(splits: ImageSplits) -> dict[str, int]:
    labels = [*splits.train.labels, *splits.val.labels]
    return {name: labels.count(number) for number, name in enumerate(splits.classes)}


def files_line(path: Path, **settings: object) -> str:
    return prepared(path, **settings).describe()["files"]


def test_a_class_named_train_is_a_class(tmp_path: Path) -> None:
    for name, color in (("train", "cat"), ("bus", "dog"), ("tram", "owl")):
        (tmp_path / name).mkdir()
        for number in range(6):
            picture(color).save(tmp_path / name / f"{number}.png")
    data = prepared(tmp_path)
    assert per_class(data.ready) == {"bus": 6, "train": 6, "tram": 6}
    assert "train: taken for classes" in data.describe()["folders"]


def test_copies_of_training_images_in_the_validation_set_are_told(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"cat": 4, "dog": 4})
    write_folder(tmp_path / "val", {"cat": 2})
    picture("owl").save(tmp_path / "val" / "cat" / "new.png")
    assert prepared(tmp_path).describe()["copies"] == "2 of 3 validation images have the pixels of a training image"


def test_words_in_file_names_decide_nothing(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 25, "dog": 25})
    for number in range(10):
        picture("cat").save(tmp_path / "cat" / f"stress_test_{number}.png")
    splits = load(tmp_path)
    assert images_in(splits) == 60
    assert per_class(splits) == {"cat": 35, "dog": 25}


def test_the_top_folders_are_splits_and_deeper_names_are_not(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"cat": 4, "dog": 4})
    write_folder(tmp_path / "val", {"cat": 2, "dog": 2})
    write_folder(tmp_path / "test", {"cat": 3})
    (tmp_path / "train" / "cat" / "test").mkdir()
    (tmp_path / "train" / "dog" / "test").mkdir()
    data = prepared(tmp_path)
    assert (len(data.ready.train), len(data.ready.val)) == (8, 4)
    assert data.describe()["files"] == (
        "15 on disk = 8 train images + 4 val images + 3 not used: images of the test split, since there is a "
        "validation split, such as test/cat/0.png"
    )


def test_a_folder_that_alone_holds_the_images_is_looked_into(tmp_path: Path) -> None:
    inside = tmp_path / "archive" / "cats and dogs"
    write_folder(inside / "train", {"cat": 4, "dog": 4})
    write_folder(inside / "test", {"cat": 2, "dog": 2})
    (tmp_path / "archive" / "LICENSE").write_text("")
    data = prepared(tmp_path)
    assert (len(data.ready.train), len(data.ready.val), data.classes) == (8, 4, ("cat", "dog"))
    assert "13 on disk = 8 train images + 4 val images + 1 not used" in data.describe()["files"]
    write_folder(tmp_path / "one", {"cat": 4})
    with pytest.raises(ConfigError, match="images have the class 'cat'"):
        load(tmp_path / "one")


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("training_set/training_set", "test_set/test_set"),
        ("train2017", "val2017"),
        ("Train Images", "Validation Images"),
    ],
)
def test_folders_that_differ_in_the_word_for_a_split_are_splits(tmp_path: Path, train: str, val: str) -> None:
    write_folder(tmp_path / train, {"cat": 4, "dog": 4})
    write_folder(tmp_path / val, {"cat": 2, "dog": 2})
    splits = load(tmp_path)
    assert (len(splits.train), len(splits.val), splits.classes) == (8, 4, ("cat", "dog"))
    (write_folder(tmp_path, {"owl": 5}) / "owl").rename(tmp_path / "pred")  # pictures without classes
    assert len(load(tmp_path).train) == 8
    assert "5 not used: images in no split folder, such as pred/0.png" in files_line(tmp_path)


@pytest.mark.parametrize(
    "names",
    [("steam train", "electric train"), ("train_test", "bus_test"), ("train", "test tube"), ("train", "test", "bus")],
)
def test_classes_with_the_word_for_a_split_are_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name, color in zip(names, ("cat", "dog", "owl"), strict=False):
        (write_folder(tmp_path, {color: 5}) / color).rename(tmp_path / name)
    assert per_class(load(tmp_path)) == dict.fromkeys(names, 5)


@pytest.mark.parametrize("decoded_gib", [1.0, 0.0])
def test_a_limit_that_has_the_first_classes_alone_is_told(
    tmp_path: Path, decoded_gib: float, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path, {"cat": 9, "dog": 9, "owl": 9})
    data = prepared(tmp_path)
    data.decoded_gib, data.classes, data.limit_train_samples = decoded_gib, (), 4
    data.setup("fit")
    data.check_samples(2)
    assert "the first samples have 1 of the 3 classes" in caplog.text


def test_splits_can_be_asked_for_and_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"cat": 4, "dog": 4})
    write_folder(tmp_path / "val", {"cat": 2, "dog": 2})
    write_folder(tmp_path / "extra", {"owl": 5})
    for asked in (None, True):
        splits = load(tmp_path, split_folders=asked)
        assert (len(splits.train), len(splits.val), splits.classes) == (8, 4, ("cat", "dog"))
        line = files_line(tmp_path, split_folders=asked)
        assert "5 not used: images in no split folder, such as extra/owl/0.png" in line
    classes = {"extra/owl", "train/cat", "train/dog", "val/cat", "val/dog"}
    assert set(load(tmp_path, split_folders=False).classes) == classes


def test_linked_class_folders_and_pictures_are_followed(tmp_path: Path) -> None:
    write_folder(tmp_path / "elsewhere", {"owl": 6})
    write_folder(tmp_path / "data", {"cat": 6, "dog": 5})
    (tmp_path / "data" / "owl").symlink_to(tmp_path / "elsewhere" / "owl")
    (tmp_path / "data" / "dog" / "linked.png").symlink_to(tmp_path / "data" / "dog" / "0.png")
    (tmp_path / "data" / "dog" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "data" / "dog" / "round").symlink_to(tmp_path / "data")
    splits = load(tmp_path / "data")
    assert per_class(splits) == {"cat": 6, "dog": 6, "owl": 6}
    assert colors_agree(splits.train, splits.classes)
    assert "a link without a target, such as dog/lost.png" in files_line(tmp_path / "data")


def test_classes_of_one_name_in_different_folders_stay_apart(tmp_path: Path) -> None:
    for place, color in (("animals/jaguar", "cat"), ("cars/jaguar", "dog"), ("__background__", "owl")):
        (tmp_path / place).mkdir(parents=True)
        for number in range(4):
            picture(color).save(tmp_path / place / f"{number}.png")
    assert per_class(load(tmp_path)) == {"__background__": 4, "animals/jaguar": 4, "cars/jaguar": 4}


def test_a_folder_that_all_classes_have_is_no_part_of_their_names(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "all" / name / "images").mkdir(parents=True)
        for number in range(4):
            picture(name).save(tmp_path / "all" / name / "images" / f"{number}.png")
    assert per_class(load(tmp_path)) == {"cat": 4, "dog": 4}


def test_everything_else_is_reported(tmp_path: Path) -> None:
    root = tmp_path / "photos [2024]"
    write_folder(root, {"cat": 5, "dog": 5})
    picture("cat").save(root / "loose.png")
    picture("dog").save(root / "dog" / "LOUD.PNG", "PNG")
    picture("dog").save(root / "dog" / "new.avif")
    (root / "cat" / ".hidden.png").write_bytes(encoded(picture("cat")))
    (root / "cat" / "more.zip").write_bytes(b"PK\x03\x04 never opened")
    (root / "cat" / "notes.txt").write_text("about cats")
    data = prepared(root)
    assert per_class(data.ready) == {"cat": 5, "dog": 7}
    assert data.describe()["files"] == (
        "16 on disk = 12 train images + 1 not used: hidden, such as cat/.hidden.png + 2 not used: no images, such as "
        "cat/more.zip + 1 not used: images in no class folder, such as loose.png"
    )
    assert len([path for path in root.rglob("*") if path.is_file()]) == 16


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_metadata_gives_the_labels_and_what_it_does_not_name_is_reported(tmp_path: Path, ending: str) -> None:
    rows = [(f"{number}.png", ("cat", "dog")[number % 2]) for number in range(10)]
    for name, color in rows:
        picture(color).save(tmp_path / name)
    picture("owl").save(tmp_path / "unnamed.png")
    if ending == "csv":
        text = "file_name,label\n" + "".join(f"{name},{label}\n" for name, label in rows)
    else:
        text = "".join(f'{{"file_name": "{name}", "label": "{label}"}}\n' for name, label in rows)
    (tmp_path / f"metadata.{ending}").write_text(text)
    splits = load(tmp_path)
    assert per_class(splits) == {"cat": 5, "dog": 5}
    assert colors_agree(splits.train, splits.classes)
    assert files_line(tmp_path) == (
        "12 on disk = 10 train images + 1 files with labels + 1 not used: images that the metadata does not name, such "
        "as unnamed.png"
    )


def test_metadata_above_split_folders_gives_the_labels(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"cat": 3, "dog": 3})
    write_folder(tmp_path / "test", {"cat": 1, "dog": 2})
    names = [file.relative_to(tmp_path).as_posix() for file in list_files(tmp_path)]
    kinds = {"cat": "tom", "dog": "rex"}
    rows = [f"{name},{kinds[name.split('/')[1]]}\n" for name in names if name != "test/dog/1.png"]
    (tmp_path / "metadata.csv").write_text("file_name,label\n" + "".join(rows))
    splits = load(tmp_path)
    assert (splits.classes, len(splits.train), len(splits.val)) == (("rex", "tom"), 6, 2)
    assert files_line(tmp_path) == (
        "10 on disk = 6 train images + 2 val images + 1 files with labels + 1 not used: images that the metadata does "
        "not name, such as test/dog/1.png"
    )
    (tmp_path / "metadata.csv").write_text("file_name,label\n" + "".join(rows) + "trian/cat/7.png,tom\n")
    with pytest.raises(ConfigError, match=r"1 of the 7 images that the metadata names are not there.*trian/cat/7.png"):
        load(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,label\ncat/0.png,tom\n")
    assert load(tmp_path).classes == ("cat", "dog")
    assert "1 not used: metadata without labels of images here" in files_line(tmp_path)


def test_metadata_beside_the_images_of_the_only_folder_gives_the_labels(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", {"cat": 4, "dog": 4})
    rows = [f"{name}/{number}.png,{name[0]}\n" for name in ("cat", "dog") for number in range(4)]
    (tmp_path / "images" / "metadata.csv").write_text("file_name,label\n" + "".join(rows))
    assert per_class(load(tmp_path)) == {"c": 4, "d": 4}


def test_metadata_may_write_paths_as_the_shell_and_windows_do(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 4, "dog": 4})
    rows = [f"./cat/{number}.png,tom\ndog\\{number}.png,rex\n" for number in range(4)]
    (tmp_path / "metadata.csv").write_text("file_name,label\n" + "".join(rows))
    assert per_class(load(tmp_path)) == {"rex": 4, "tom": 4}


def test_a_first_row_without_a_label_does_not_hide_those_of_others(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 4, "dog": 4})
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "cat/0.png"}\n{"file_name": "cat/1.png", "label": "owl"}\n')
    with pytest.raises(ConfigError, match=r"metadata.jsonl, row 1: cat/0.png has no label"):
        load(tmp_path)


def test_metadata_without_labels_hides_no_other_and_is_told(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 4, "dog": 4})
    images = [f"{name}/{number}.png" for name in ("cat", "dog") for number in range(4)]
    (tmp_path / "metadata.csv").write_text("file_name,label\n" + "".join(f"{name},{name[0]}\n" for name in images))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "cat/0.png", "text": "a cat"}\n')
    assert per_class(load(tmp_path)) == {"c": 4, "d": 4}
    assert files_line(tmp_path) == (
        "10 on disk = 8 train images + 1 files with labels + 1 not used: metadata without labels of images here (its "
        "columns: file_name, text; data.source.label chooses), such as metadata.jsonl"
    )


def test_no_training_image_comes_with_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    picture("cat").save(tmp_path / "train" / "0.png")
    write_folder(tmp_path / "val", {"cat": 2, "dog": 2})
    with pytest.raises(
        ConfigError,
        match=r"no training image in it: 5 on disk = 4 val images \+ 1 not used: images in no class folder, such",
    ):
        load(tmp_path)
    (tmp_path / "train" / "metadata.csv").write_text("file_name;label\n0.png;cat\n")
    with pytest.raises(
        ConfigError,
        match=r"metadata without labels of images here \(its columns: file_name;label; data\.source\.label chooses\)",
    ):
        load(tmp_path)


def test_metadata_without_file_names_is_told_what_they_are(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 4, "dog": 4})
    (tmp_path / "metadata.csv").write_text("name,label\ncat/0.png,tom\n")
    with pytest.raises(
        ConfigError, match=r"no column file_name; there are name, label \(file_name is the path .*label"
    ):
        load(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("gone.png,cat", r"1 of the 5 images that the metadata names are not there, such as gone.png"),
        ("0.png,dog", r"metadata.csv gives 0.png the labels 'cat' and 'dog'"),
        ("1.png,", r"metadata.csv, row 5: 1.png has no label"),
        ("1.png, ", r"metadata.csv, row 5: 1.png has no label"),
    ],
)
def test_metadata_that_contradicts_the_folder_is_an_error(tmp_path: Path, line: str, message: str) -> None:
    for number in range(4):
        picture("cat").save(tmp_path / f"{number}.png")
    rows = "".join(f"{number}.png,{('cat', 'dog')[number % 2]}\n" for number in range(4))
    (tmp_path / "metadata.csv").write_text(f"file_name,label\n{rows}{line}\n")
    with pytest.raises(ConfigError, match=message):
        ImageFiles(str(tmp_path)).open()


def test_parquet_files_beside_others_are_accounted_for(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [picture("cat"), picture("dog")] * 4, "label": [0, 1] * 4}
    for name in ("train-0.parquet", "validation-0.parquet", "test-0.parquet"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / name)
    (tmp_path / "README.md").write_text("a data set")
    assert files_line(tmp_path) == (
        "4 on disk = 1 train files + 1 val files + 1 not used: no images, such as README.md + 1 not used: files of the "
        "test split, since there is a validation split, such as test-0.parquet"
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "more.parquet")
    with pytest.raises(ConfigError, match=r"the name of more.parquet says no split, while other files' names do"):
        ImageFiles(str(tmp_path)).open()


def test_files_that_are_lost_are_an_error_of_the_library(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="3 files on disk"):
        account(3, {"images": 1}, {"hidden": [tmp_path / "a"]}, tmp_path)


def test_relabelling_and_moving_a_link_change_the_fingerprint(tmp_path: Path) -> None:
    store, root = tmp_path / "store", tmp_path / "data"
    write_folder(store, {"cat": 4, "dog": 4})
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for file in list_files(store / name):
            (root / name / f"{name}-{file.name}").symlink_to(file)
    first = ImageFiles(str(root)).fingerprint()
    assert ImageFiles(str(root)).fingerprint() == first
    os.rename(root / "cat" / "cat-0.png", root / "dog" / "cat-0.png")
    moved = ImageFiles(str(root)).fingerprint()
    assert moved != first
    os.unlink(root / "dog" / "cat-0.png")
    os.symlink(store / "cat" / "1.png", root / "dog" / "cat-0.png")
    pointed = ImageFiles(str(root)).fingerprint()
    assert pointed not in (first, moved)
    os.rename(root / "cat", root / "cow")  # the same targets in the same order under another class
    renamed = ImageFiles(str(root)).fingerprint()
    assert renamed not in (first, moved, pointed)
    os.rename(root / "cow", root / "cat")
    (root / "metadata.csv").write_text("file_name,label\n")
    with_metadata = ImageFiles(str(root)).fingerprint()
    (root / "metadata.csv").write_text("file_name,label\ncat/cat-1.png,dog\n")
    assert len({first, pointed, with_metadata, ImageFiles(str(root)).fingerprint()}) == 4


@pytest.mark.parametrize("name", ["cat/caf\udce9.png", "caf\udce9/0.png", "caf\udce9/"])
def test_a_name_that_is_not_utf8_is_one_line(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path, {"cat": 4, "dog": 4})
    file = tmp_path / name
    try:
        if name.endswith("/"):
            file.mkdir()
        else:
            file.parent.mkdir(exist_ok=True)
            picture("cat").save(file)
    except OSError:
        pytest.skip("this file system has no such names")
    with pytest.raises(ConfigError, match=r"the name b'caf\\xe9(.png)?' is not UTF-8; rename it") as told:
        load(tmp_path)
    str(told.value).encode()
