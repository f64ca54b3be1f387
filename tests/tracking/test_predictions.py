"""A table of predictions is in the run, images and all."""

import json

import numpy as np
import pytest
from PIL import Image

from lion_lightning.tracking.runs import read_run
from lion_lightning.tracking.wandb import RunLogger


class Classifier:
    def predictions(self):
        image = np.zeros((8, 8, 3), dtype="uint8")
        return ["image", "label", "guess", "share"], [[image, "3", "8", 0.9], [image, "1", "7", 0.8]]


@pytest.fixture
def logger(tmp_path):
    logger = RunLogger(project="p", run_name="r", group="g", save_dir=str(tmp_path), mode="offline")
    yield logger
    logger.finish(0)


def test_the_table_is_in_the_run(logger, tmp_path):
    assert logger.log_predictions(Classifier()) == 2
    logger.finish(0)
    assert any(name.startswith("val/predictions") for name in read_run(tmp_path).metrics)
    (table,) = tmp_path.rglob("val/predictions*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["image", "label", "guess", "share"]
    assert [row[1:] for row in content["data"]] == [["3", "8", 0.9], ["1", "7", 0.8]]
    (log,) = tmp_path.rglob("run-*.wandb")
    assert b"media/images/" in log.read_bytes(), "the pictures travel with the table"


def test_a_module_without_predictions_logs_nothing(logger):
    assert logger.log_predictions(object()) == 0


class Draughtsman:
    def pictures(self):
        return {"confusion_matrix": np.full((20, 30, 3), 200, dtype="uint8")}


def test_pictures_are_in_the_run(logger, tmp_path):
    assert logger.log_predictions(Draughtsman()) == 0
    logger.finish(0)
    (file,) = tmp_path.rglob("media/images/val/confusion_matrix*.png")
    with Image.open(file) as picture:
        assert picture.size == (30, 20)
