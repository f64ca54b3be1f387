"""The account of data that lion-check-data prints without training."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lion_lightning.commands.check_data import main


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def test_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    for index in range(4):
        picture(tmp_path / "data" / "train" / "cat" / f"{index}.png", index)
    for index in range(2):
        picture(tmp_path / "data" / "train" / "dog" / f"{index}.png", 10 + index)
    picture(tmp_path / "data" / "test" / "cat" / "again.png", 0)  # a training picture
    picture(tmp_path / "data" / "test" / "cat" / "new.png", 99)
    (tmp_path / "data" / "train" / "dog" / "torn.png").write_bytes(b"no picture")
    sheet = tmp_path / "samples.png"
    settings = [
        "recipe=image_classification",
        "data=image_files",
        f"data.path={tmp_path / 'data'}",
        "data.batch_size=2",
    ]
    main([*settings, f"data.cache_dir={tmp_path / 'cache'}", "--pictures", str(sheet), "--samples", "2"])
    said = " ".join(capsys.readouterr().out.split())
    assert "1 of 7 images cannot be read" in said
    assert "│ cat │ 4 │ 2 │ 75.00% │" in said
    assert "│ dog │ 2 │ 0 │ 25.00% │" in said
    assert "No validation samples of dog" in said
    assert "same pixels: 0 repeated in training, 0 repeated in validation; 1 of the validation set" in said
    assert Image.open(sheet).width > 100


def test_labelled_texts(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    table = tmp_path / "reviews.csv"
    rows = [f"a film that is number {number},{'good' if number % 3 else 'bad'}" for number in range(120)]
    table.write_text("\n".join(["text,label", *rows, rows[0]]), encoding="utf-8")
    settings = ["recipe=text_classification", "data=labeled_files", f"data.path={table}"]
    main([*settings, f"data.cache_dir={tmp_path / 'cache'}", "--samples", "1"])
    said = " ".join(capsys.readouterr().out.split())
    assert "2 classes, the rarest first" in said
    assert "unknown (" in said
    assert "repeated in training" in said
    assert "training 0: " in said


def test_a_schedule_of_batch_sizes_does_not_matter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "words.txt"
    text.write_text("\n\n".join(f"the cat number {n} sat on mat {n % 7} and slept" for n in range(500)))
    settings = ["data=text_files", f"data.path={text}", "data.sequence_length=32", "data.vocab_size=300"]
    main([*settings, "data.batch_schedule=[[0,16],[200,64]]", f"data.cache_dir={tmp_path / 'cache'}"])
    assert "texts with the same tokens" in " ".join(capsys.readouterr().out.split())


def test_a_few_pictures_are_enough(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(12):
        file = tmp_path / "pictures" / ("cat", "dog")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(file)
    settings = ["recipe=image_classification", "data=image_files", "data.path=pictures", "data.image_size=8"]
    main([*settings, "data.cache_dir=cache", "data.batch_size=128"])
    assert "2 classes, the rarest first" in capsys.readouterr().out


def test_names_and_texts_in_brackets_are_no_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    for index, name in enumerate(("[red]", "[/x]", ":cat:") * 4):
        picture(tmp_path / "data" / "train" / name.replace("/", "\u2215") / f"{index}.png", index)
    picture(tmp_path / "data" / "test" / "[red]" / "0.png", 99)
    settings = ["recipe=image_classification", "data=image_files", f"data.path={tmp_path / 'data'}"]
    main([*settings, f"data.cache_dir={tmp_path / 'cache'}", "--samples", "0", "--pictures", str(tmp_path / "no.png")])
    said = " ".join(capsys.readouterr().out.split())
    assert "│ [red] │ 4 │ 1 │" in said
    assert "No validation samples of :cat:, [\u2215x]" in said
    assert not (tmp_path / "no.png").exists(), "0 samples are none"
    table = tmp_path / "reviews.csv"
    rows = [f"a film [/that] is number {number},{('[good]', '[/bad]')[number % 2]}" for number in range(120)]
    table.write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    settings = ["recipe=text_classification", "data=labeled_files", f"data.path={table}"]
    main([*settings, f"data.cache_dir={tmp_path / 'cache'}", "--samples", "2"])
    said = " ".join(capsys.readouterr().out.split())
    assert "│ [/bad] │" in said
    assert "validation 0: [good]: a film [ / that ] is number" in said


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["recipe=image_classification", "data=image_files", "data.path=/nowhere"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: data.path=/nowhere: there is no such file or folder\n"
    with pytest.raises(SystemExit):
        main(["--config-dir", "/nowhere"])
    assert capsys.readouterr().err == "error: --config-dir /nowhere: no such folder\n"
    with pytest.raises(SystemExit):
        main(["recipe=image_classification", "--samples", "-1"])
    assert capsys.readouterr().err == "error: --samples must be at least 0, got -1\n"
