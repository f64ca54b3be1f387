"""Going on from a checkpoint: its weights and its tokenizer count, and what cannot work is told in a line."""

import json
import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_bert import batch_of, build
from transformers import BertConfig, BertModel, ModernBertConfig, ResNetConfig

from lion_lightning.errors import ConfigError
from lion_lightning.recipes.bert_mlm.data import TextBlocks
from lion_lightning.recipes.bert_mlm.masking import Masking
from lion_lightning.recipes.bert_mlm.model import build_model, hidden_logits
from lion_lightning.recipes.bert_mlm.module import BertMLM
from lion_lightning.recipes.text.model import ModelOptions
from lion_lightning.recipes.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module", params=[BertConfig, ModernBertConfig])
def trained(blocks: TextBlocks, request: pytest.FixtureRequest) -> BertMLM:
    """A model whose weights, the output bias among them, are not where a model from scratch has them."""
    module = build(blocks, kind=request.param)
    with torch.no_grad():
        for weight in module.model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return module


@pytest.fixture
def export(trained: BertMLM, tmp_path: Path) -> Path:
    trained.export(tmp_path / "export", "# card")
    return tmp_path / "export"


def go_on(blocks: TextBlocks, place: Path | str) -> BertMLM:
    return build(blocks, options=ModelOptions(pretrained=str(place)))


def test_an_export_goes_on_bit_for_bit(trained: BertMLM, export: Path, blocks: TextBlocks) -> None:
    module = go_on(blocks, export)
    assert type(module.model) is type(trained.model), "the checkpoint's configuration counts, not the recipe's"
    torch.testing.assert_close(module.state_dict(), trained.state_dict(), rtol=0, atol=0)
    masked = trained._mask(batch_of(blocks), Masking(), seed=3)
    scores, expected = (
        hidden_logits(each.eval().model, masked.input_ids, masked.positions, None) for each in (module, trained)
    )
    assert torch.equal(scores, expected)


def test_a_checkpoint_goes_on_in_training_mode(trained: BertMLM, export: Path, blocks: TextBlocks) -> None:
    model = build_model(trained.model.config, blocks, ModelOptions(pretrained=str(export)))
    assert all(part.training for part in model.modules())


def test_a_checkpoint_in_half_precision_is_trained_in_full(trained: BertMLM, export: Path, blocks: TextBlocks) -> None:
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    weights = load_file(export / "model.safetensors")
    halved = {name: weight.bfloat16() for name, weight in weights.items()}
    save_file(halved, export / "model.safetensors", metadata={"format": "pt"})
    assert {weight.dtype for weight in go_on(blocks, export).parameters()} == {torch.float32}


def test_the_exported_tokenizer_is_the_one_of_the_data(export: Path, blocks: TextBlocks) -> None:
    text = "The interpreter's prompt, unchanged."
    assert load_tokenizer(str(export))(text).input_ids == blocks.ready.tokenizer(text).input_ids


def test_an_encoder_without_a_vocabulary_head_gets_one_and_says_so(
    blocks: TextBlocks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = build(blocks).model.config
    BertModel(config).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        module = go_on(blocks, tmp_path)
    assert "drawn afresh" in caplog.text
    assert "cls.predictions.transform.dense.weight" in caplog.text
    assert "cannot be compared" in caplog.text, "the folder has no tokenizer"
    assert module.model.num_parameters() == build(blocks).model.num_parameters()


def refused(blocks: TextBlocks, place: Path | str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        go_on(blocks, place)
    assert len(str(caught.value).splitlines()) == 1
    assert str(place) in str(caught.value)


@pytest.mark.parametrize("place", ["/nowhere/export", "./nowhere", "a/b/c"])
def test_a_folder_that_is_not_there_is_named(blocks: TextBlocks, place: str) -> None:
    refused(blocks, place, "there is no such folder")


def test_a_name_that_the_hub_does_not_give_is_named(blocks: TextBlocks) -> None:
    refused(blocks, "nobody/nothing", "cannot be opened, as a folder or from the hub")


def test_a_file_is_no_folder(blocks: TextBlocks, export: Path) -> None:
    refused(blocks, export / "config.json", "is a file; give the folder it is in")


def test_an_empty_folder_is_named(blocks: TextBlocks, tmp_path: Path) -> None:
    refused(blocks, tmp_path, "cannot be opened")


def test_weights_cut_short_are_named(blocks: TextBlocks, export: Path) -> None:
    weights = export / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    refused(blocks, export, "cannot be opened")


def test_another_type_of_model_is_named(blocks: TextBlocks, tmp_path: Path) -> None:
    ResNetConfig().save_pretrained(tmp_path)
    refused(blocks, tmp_path, "is a model of type resnet, not bert or modernbert")


def test_a_missing_layer_is_named(blocks: TextBlocks, export: Path) -> None:
    weights = load_file(export / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layers.1." not in name and "layer.1." not in name}
    assert len(kept) < len(weights)
    save_file(kept, export / "model.safetensors", metadata={"format": "pt"})
    refused(blocks, export, "weights of the encoder are missing, such as ")


def test_a_vocabulary_larger_than_the_models_is_named(export: Path, blocks: TextBlocks) -> None:
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps({**config, "vocab_size": 400}))
    refused(blocks, export, "embeddings for 400 tokens, and the data's tokenizer has 512; set data.tokenizer=")


def test_another_vocabulary_of_the_same_size_is_named(export: Path, blocks: TextBlocks) -> None:
    kept = json.loads((export / "tokenizer.json").read_text())
    words = kept["model"]["vocab"]
    first, second = list(words)[100:102]
    words[first], words[second] = words[second], words[first]
    (export / "tokenizer.json").write_text(json.dumps(kept))
    refused(blocks, export, "has another vocabulary than the data's tokenizer")


def test_more_positions_than_the_checkpoint_has_are_refused(export: Path, blocks: TextBlocks) -> None:
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    with pytest.raises(ConfigError, match="longer than the model's 16 positions"):
        go_on(blocks, export)


def test_a_run_goes_on_from_the_export_of_another(compose: Any, prose: Path, tmp_path: Path) -> None:
    from lion_lightning.training.run import run

    text = tmp_path / "short.txt"
    text.write_text(prose.read_text(encoding="utf-8")[:100_000], encoding="utf-8")
    small = ["data=text_files", f"data.path={text}", "data.sequence_length=16", "data.vocab_size=300"]
    small += ["data.val_fraction=0.3", "data.batch_size=8", "logger=none", "trainer.val_check_interval=8"]
    train = partial(compose, *small, "model=bert_tiny", "model.config.num_hidden_layers=1")
    first = run(train(f"run_dir={tmp_path / 'one'}", "trainer.max_steps=8", "optim.lr=1e-3"))
    export = tmp_path / "one" / "export"
    still = ("trainer.max_steps=2", "optim.lr=1e-9")
    again = run(train(f"run_dir={tmp_path / 'two'}", f"model.pretrained={export}", *still))
    assert again == pytest.approx(first, rel=1e-4), "steps that move nothing leave the loss where it was"
    shutil.rmtree(export)
    with pytest.raises(ConfigError, match=r"data\.tokenizer=.*export: there is no such folder"):
        run(train(f"run_dir={tmp_path / 'three'}", f"model.pretrained={export}"))
