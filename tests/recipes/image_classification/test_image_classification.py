"""The image classifier: what it sees, how it augments, and the folder it leaves."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch.nn.functional import one_hot
from transformers import BertConfig, PretrainedConfig, pipeline

from lion_lightning.errors import ConfigError
from lion_lightning.recipes.bert_mlm.data import TextBlocks
from lion_lightning.recipes.image_classification.data import ImageArrays
from lion_lightning.recipes.image_classification.sources import Digits
from lion_lightning.recipes.text.corpus import PythonDocs
from lion_lightning.training.checkpoint.files import load
from lion_lightning.training.run import run
from tests.recipes.small_images import Noise, batch_of, build, prepared, resnet, vit


@pytest.fixture(scope="module")
def noise() -> ImageArrays:
    return prepared(Noise())


@pytest.fixture(scope="module")
def digits() -> ImageArrays:
    return prepared(Digits())


def test_the_model_is_sized_for_the_data(noise: ImageArrays, digits: ImageArrays) -> None:
    assert build(vit(), noise)(batch_of(noise)["pixels"]).shape == (8, 4)
    assert build(vit(2), digits)(batch_of(digits)["pixels"]).shape == (8, 10)
    assert build(resnet(), digits)(batch_of(digits)["pixels"]).shape == (8, 10)
    config = build(vit(), noise).model.config
    assert config.id2label == {0: "north", 1: "east", 2: "south", 3: "west"}
    assert config.label2id["west"] == 3


def test_the_input_has_zero_mean_and_unit_deviation(digits: ImageArrays) -> None:
    module = build(vit(2), digits)
    pixels = torch.from_numpy(np.array(digits.ready.train.pixels)).float() / 255
    normal = module.normalize(pixels)
    assert float(normal.mean()) == pytest.approx(0, abs=1e-3)
    assert float(normal.std()) == pytest.approx(1, abs=1e-2)


def test_augmentation_is_a_function_of_seed_and_position(noise: ImageArrays) -> None:
    module = build(vit(), noise, crop_padding=2, flip=True, seed=1)
    before = torch.random.get_rng_state()
    first = module.augment(batch_of(noise))[0]
    torch.manual_seed(5)
    assert torch.equal(module.augment(batch_of(noise))[0], first)
    assert not torch.equal(module.augment(batch_of(noise, position=8))[0], first)
    assert not torch.equal(build(vit(), noise, crop_padding=2, flip=True, seed=2).augment(batch_of(noise))[0], first)
    torch.random.set_rng_state(before)
    module.augment(batch_of(noise))[0]
    assert torch.equal(torch.random.get_rng_state(), before), "augmentation draws from the global generator"


def test_augmentation_moves_and_mirrors_pictures_within_their_range(noise: ImageArrays) -> None:
    batch = batch_of(noise, 32)
    plain = batch["pixels"].float() / 255
    mirrored = build(vit(), noise, flip=True).augment(batch)[0]
    flips = [torch.allclose(seen, kept.flip(-1)) for seen, kept in zip(mirrored, plain, strict=True)]
    stays = [torch.allclose(seen, kept) for seen, kept in zip(mirrored, plain, strict=True)]
    assert all(flip != stay for flip, stay in zip(flips, stays, strict=True))
    assert 5 < sum(flips) < 27
    cropped = build(vit(), noise, crop_padding=2).augment(batch)[0]
    assert cropped.shape == plain.shape
    assert not torch.allclose(cropped, plain)
    assert cropped.min() >= 0
    assert cropped.max() <= 1
    assert torch.equal(build(vit(), noise).augment(batch)[0], plain)


def test_the_loss_is_smoothed_cross_entropy(noise: ImageArrays) -> None:
    module = build(vit(), noise, label_smoothing=0.2)
    batch = batch_of(noise)
    logs = module(batch["pixels"]).log_softmax(-1)
    direct = -(0.8 * logs.gather(1, batch["labels"][:, None]).squeeze(1) + 0.2 * logs.mean(1)).mean()
    torch.testing.assert_close(module.training_step(batch, 0), direct, rtol=1e-4, atol=1e-5)


def test_validation_counts_right_answers_over_uneven_batches(noise: ImageArrays) -> None:
    module = build(vit(), noise)
    images = noise.ready.train
    with torch.no_grad():
        guesses = module(torch.from_numpy(np.array(images.pixels))).argmax(-1)
        for start in (0, 5, 10, 15, 20, 25, 30):
            pairs = [(index, index) for index in range(start, min(start + 5, 32))]
            module.validation_step(noise.train_set.__getitems__(pairs), 0)
    assert float(module.metrics.compute()["val/top1"]) == pytest.approx((guesses.numpy() == images.labels).mean())


@pytest.mark.parametrize("config", [vit(2), resnet()], ids=["vit", "resnet"])
@pytest.mark.parametrize("kind", ["noise", "digits"])
def test_the_export_opens_with_image_classification_and_agrees(
    config: PretrainedConfig, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    data: ImageArrays = request.getfixturevalue(kind)
    module = build(type(config)(**config.to_dict()), data)
    module.export(tmp_path, "# card")
    classify = pipeline("image-classification", model=str(tmp_path), device="cpu")
    assert (tmp_path / "README.md").read_text() == "# card"
    stored = np.array(data.ready.val.pixels[:3])
    with torch.no_grad():
        shares = module(torch.from_numpy(stored)).softmax(-1)
    for pixels, expected in zip(stored, shares, strict=True):
        picture = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
        answers = {answer["label"]: answer["score"] for answer in classify(picture, top_k=20)}
        assert answers == pytest.approx(dict(zip(data.ready.classes, expected.tolist(), strict=True)), abs=1e-4)


def test_the_loss_of_mixed_images_is_that_of_soft_targets(noise: ImageArrays) -> None:
    module = build(vit(), noise, mixup=1.0, label_smoothing=0.1)
    batch = batch_of(noise)
    images, share = module.augment(batch)
    assert share < 1
    logs = module.model(pixel_values=module.normalize(images)).logits.log_softmax(-1)
    targets = share * one_hot(batch["labels"], 4) + (1 - share) * one_hot(batch["labels"].roll(1), 4)
    direct = -((0.9 * targets + 0.1 / 4) * logs).sum(1).mean()
    torch.testing.assert_close(module.training_step(batch, 0), direct, rtol=1e-4, atol=1e-5)


def test_the_sample_number_that_was_seen_on_the_host_is_used_once(noise: ImageArrays) -> None:
    module = build(vit(), noise, crop_padding=2)
    expected = module.augment(batch_of(noise, position=8))[0]
    module.on_train_batch_start(batch_of(noise, position=8), 0)
    away = {**batch_of(noise, position=8), "sample": torch.empty(8, dtype=torch.long, device="meta")}
    assert torch.equal(module.augment(away)[0], expected), "read from where it cannot be read"
    assert not torch.equal(module.augment(batch_of(noise))[0], expected)


def test_test_time_flip_takes_the_mean_of_the_shares(noise: ImageArrays) -> None:
    plain, flipped = build(vit(), noise), build(vit(), noise, test_time_flip=True)
    batch = batch_of(noise)
    with torch.no_grad():
        both = [plain(pixels).softmax(-1) for pixels in (batch["pixels"], batch["pixels"].flip(-1))]
        flipped.validation_step(batch, 0)
    shares = (both[0] + both[1]) / 2
    expected = -shares.gather(1, batch["labels"][:, None]).log().mean()
    assert not torch.allclose(shares, both[0], atol=1e-4)
    assert float(flipped.metrics.compute()["val/loss"]) == pytest.approx(float(expected), rel=1e-5)


STRONG = (
    "recipe.module.randaugment_layers=2", "recipe.module.mixup=0.5", "recipe.module.cutmix=1.0",
    "recipe.module.random_erasing=0.25", "recipe.module.flip=true",
)  # fmt: skip
TINY = (
    "recipe=image_classification", "logger=none", "data.batch_size=16", "trainer.max_steps=4",
    "trainer.val_check_interval=4", "model.config.num_hidden_layers=1", "model.config.hidden_size=32",
    "model.config.num_attention_heads=2", "model.config.intermediate_size=32",
)  # fmt: skip


def test_a_resumed_run_augments_as_the_whole_run_did(compose: Any, tmp_path: Path) -> None:
    def trained(name: str, *overrides: str) -> dict[str, torch.Tensor]:
        run(compose(*TINY, *STRONG, f"run_dir={tmp_path / name}", "export=false", *overrides))
        return load(tmp_path / name / "checkpoints/last.ckpt")["state_dict"]

    whole = trained("whole", "checkpoint.every_n_steps=2")
    resumed = trained("resumed", f"resume={tmp_path}/whole/checkpoints/step-000000002.ckpt")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_run_leaves_figures_and_pictures(compose: Any, tmp_path: Path) -> None:
    where = [f"run_dir={tmp_path}", "logger=csv", "callbacks=ema", "recipe.module.test_time_flip=true"]
    run(compose(*TINY[:1], *TINY[2:], *where))
    logged = "".join(file.read_text() for file in tmp_path.rglob("metrics.csv"))
    assert all(name in logged for name in ("val/loss", "val/top1", "val/top5", "val/ece"))
    for name in ("confusion_matrix", "worst_mistakes"):
        with Image.open(tmp_path / "export" / f"{name}.png") as picture:
            assert min(picture.size) > 100


def test_the_worst_mistakes_are_shown(digits: ImageArrays) -> None:
    lines = build(vit(2), digits).showcase()
    assert len(lines) == 3
    assert all("taken for" in line for line in lines)


def test_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="trains on images, not on TextBlocks; try data=digits"):
        build(vit(), TextBlocks(PythonDocs(), batch_size=4))  # type: ignore[arg-type]


def test_a_model_without_the_head_is_refused(digits: ImageArrays) -> None:
    with pytest.raises(ConfigError, match="image-classification head, not bert"):
        build(BertConfig(), digits)


def test_patches_that_do_not_fit_are_refused(digits: ImageArrays) -> None:
    with pytest.raises(ConfigError, match="patch_size=3 does not divide the images of 8 x 8 pixels"):
        build(vit(3), digits)


def test_both_kinds_of_attention_agree(digits: ImageArrays) -> None:
    sdpa, eager = (build(vit(2), digits, attention=kind) for kind in ("sdpa", "eager"))
    assert (sdpa.model.config._attn_implementation, eager.model.config._attn_implementation) == ("sdpa", "eager")
    pixels = batch_of(digits)["pixels"]
    torch.testing.assert_close(sdpa(pixels), eager(pixels))


@pytest.mark.parametrize(
    ("device", "asked", "used"),
    [("cpu", None, "eager"), ("cpu", "sdpa", "sdpa"), ("cuda", None, "sdpa"), ("cuda", "eager", "eager")],
)
def test_attention_is_eager_on_a_cpu_unless_it_is_set(
    digits: ImageArrays, monkeypatch: pytest.MonkeyPatch, device: str, asked: str | None, used: str
) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    monkeypatch.setattr(type(trainer.strategy), "root_device", torch.device(device))
    module = build(vit(2), digits, attention=asked)
    module.trainer = trainer
    module.setup("fit")
    assert module.model.config._attn_implementation == used


def test_a_model_without_attention_draws_no_warning(digits: ImageArrays, caplog: pytest.LogCaptureFixture) -> None:
    module = build(resnet(), digits)
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    caplog.clear()
    module.setup("fit")
    assert not caplog.records


@pytest.mark.parametrize(("config", "attention"), [(resnet(), "sdpa"), (vit(2), "flesh")])
def test_attention_that_a_model_does_not_have_is_refused(
    digits: ImageArrays, config: PretrainedConfig, attention: str
) -> None:
    with pytest.raises(ConfigError, match=f"attention must be null, sdpa or eager, got '{attention}'"):
        build(config, digits, attention=attention)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_bad_smoothing_is_refused(digits: ImageArrays, smoothing: float) -> None:
    with pytest.raises(ConfigError, match="label_smoothing must be in"):
        build(vit(2), digits, label_smoothing=smoothing)
