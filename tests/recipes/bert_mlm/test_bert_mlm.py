"""The masked language model: its head on hidden tokens, its fixed validation, and the folder it leaves."""

from pathlib import Path

import pytest
import torch
from small_bert import LENGTH, batch_of, build
from transformers import BertConfig, ModernBertConfig, ResNetConfig, pipeline

from lion_lightning.errors import ConfigError
from lion_lightning.hyperparams import cosine
from lion_lightning.optim import Lion
from lion_lightning.recipes.bert_mlm.data import TextBlocks
from lion_lightning.recipes.bert_mlm.masking import Masking
from lion_lightning.recipes.bert_mlm.model import hidden_logits
from lion_lightning.recipes.bert_mlm.module import VALIDATION, VALIDATION_SEED, BertMLM
from lion_lightning.recipes.image_classification.data import ImageArrays
from lion_lightning.recipes.image_classification.sources import Digits
from lion_lightning.recipes.text.tokenizer import starts_word


@pytest.fixture(scope="module")
def data(blocks: TextBlocks) -> TextBlocks:
    return blocks


@pytest.fixture(scope="module", params=[BertConfig, ModernBertConfig])
def module(data: TextBlocks, request: pytest.FixtureRequest) -> BertMLM:
    return build(data, kind=request.param)


@torch.no_grad()
def test_scores_of_hidden_tokens_are_those_of_the_whole_model(module: BertMLM, data: TextBlocks) -> None:
    masked = module._mask(batch_of(data), Masking(), seed=3)
    whole = module.model(input_ids=masked.input_ids).logits
    rows = masked.positions.unsqueeze(-1).expand(-1, -1, whole.shape[-1])
    expected = whole.gather(1, rows).flatten(0, 1)
    found = hidden_logits(module.model, masked.input_ids, masked.positions, None)
    assert found.shape == expected.shape == (4 * round(0.15 * LENGTH), len(data.ready.tokenizer))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_training_loss_is_the_cross_entropy_of_the_whole_model(module: BertMLM, data: TextBlocks) -> None:
    """Against labels in the convention of `transformers`: -100 wherever nothing is hidden."""
    batch = batch_of(data)
    masked = module._mask(batch, Masking(), seed=1)
    labels = torch.full_like(masked.input_ids, -100).scatter(1, masked.positions, masked.targets)
    loss = module.training_step(batch, 0)
    torch.testing.assert_close(loss, module.model(input_ids=masked.input_ids, labels=labels).loss, rtol=1e-4, atol=1e-5)
    assert loss.requires_grad


def validate(module: BertMLM, data: TextBlocks, batch_size: int) -> tuple[float, float]:
    indices = list(range(16))
    for start in range(0, 16, batch_size):
        with torch.no_grad():
            module.validation_step(data.val_set.__getitems__([(i, i) for i in indices[start : start + batch_size]]), 0)
    values = float(module.val_loss.compute()), float(module.val_accuracy.compute())
    module.val_loss.reset()
    module.val_accuracy.reset()
    return values


def test_validation_is_the_same_for_every_seed_rate_call_and_batch_size(data: TextBlocks) -> None:
    reference = validate(build(data), data, 4)
    other = build(data, seed=7, rate=0.4)
    torch.manual_seed(99)
    for batch_size in (4, 4, 16, 3):
        assert validate(other, data, batch_size) == pytest.approx(reference, rel=1e-5)


def test_validation_hides_fifteen_percent(module: BertMLM, data: TextBlocks) -> None:
    masked = module._mask(batch_of(data), VALIDATION, VALIDATION_SEED)
    assert masked.positions.shape[1] == round(0.15 * LENGTH)


def test_training_masks_follow_the_seed_the_sample_and_the_rate(data: TextBlocks) -> None:
    batch = batch_of(data)
    later = {**batch, "sample": batch["sample"] + 1000}
    with torch.no_grad():
        first, again, seed, sample = (
            float(build(data, seed=seed).training_step(pairs, 0))
            for seed, pairs in ((1, batch), (1, batch), (2, batch), (1, later))
        )
    assert first == again
    assert len({first, seed, sample}) == 3
    assert build(data, rate=0.5)._mask(batch, Masking(rate=0.5), 1).positions.shape[1] == LENGTH // 2


def test_whole_words_are_hidden_in_training_and_tokens_in_validation(data: TextBlocks) -> None:
    module, batch = build(data, unit="word", rate=0.3), batch_of(data, 16)
    starts = starts_word(data.ready.tokenizer)[batch["input_ids"]]
    word = starts.cumsum(1)
    for masking, cut in ((module.masking, False), (VALIDATION, True)):
        masked = module._mask(batch, masking, seed=1)
        kept = masked.targets != -100
        hidden = torch.zeros_like(starts).scatter(1, masked.positions, kept)
        pieces = [
            {(row, int(word[row, place])) for row, place in where.nonzero().tolist()} for where in (hidden, ~hidden)
        ]
        special = {(row, int(word[row, 0])) for row in range(16)}
        assert bool((pieces[0] & pieces[1]) - special) == cut
    assert "starts_word" not in module.state_dict()


def test_an_untrained_model_is_about_as_good_as_word_frequencies(data: TextBlocks) -> None:
    """The head starts from the corpus' log frequencies, so the first loss is near the unigram entropy."""
    loss, _ = validate(build(data), data, 16)
    assert loss == pytest.approx(data.unigram_entropy(), abs=0.6)


def test_the_export_opens_with_fill_mask_and_agrees(module: BertMLM, data: TextBlocks, tmp_path: Path) -> None:
    module.export(tmp_path, "# card")
    fill = pipeline("fill-mask", model=str(tmp_path), device="cpu")
    assert (tmp_path / "README.md").read_text() == "# card"
    assert (tmp_path / "model.safetensors").is_file()
    tokenizer = data.ready.tokenizer
    sentence = f"The value is {tokenizer.mask_token} to the function."
    with torch.no_grad():
        ids = tokenizer(sentence, return_tensors="pt").input_ids
        place = (ids[0] == tokenizer.mask_token_id).nonzero().item()
        shares = module.model(input_ids=ids).logits[0, place].softmax(-1)
    best = shares.topk(5)
    answers = fill(sentence)
    assert [answer["token"] for answer in answers] == best.indices.tolist()
    assert [answer["score"] for answer in answers] == pytest.approx(best.values.tolist(), rel=1e-4)
    assert answers[0]["token_str"] == tokenizer.decode([best.indices[0]])


def test_three_sentences_are_filled_in(module: BertMLM) -> None:
    lines = module.showcase()
    assert len(lines) == 3
    assert all("[MASK]" in line and "it was: " in line for line in lines)


def test_the_summary_counts_the_parameters_once(module: BertMLM) -> None:
    count = sum(parameter.numel() for parameter in module.model.parameters())
    assert f"{count / 1e6:.1f} M parameters" in module.describe()["model"]
    head, table = module.model.get_output_embeddings().weight, module.model.get_input_embeddings().weight
    assert head is table


def test_images_are_refused() -> None:
    images = ImageArrays(Digits(), batch_size=4)
    with pytest.raises(ConfigError, match=r"trains on text, not on ImageArrays; try data=python_docs"):
        build(images)  # type: ignore[arg-type]


def test_a_model_without_the_head_is_refused(data: TextBlocks) -> None:
    with pytest.raises(ConfigError, match="not resnet"):
        BertMLM(ResNetConfig(), data, Lion, cosine, Masking())


def test_a_sequence_longer_than_the_model_is_refused(data: TextBlocks) -> None:
    with pytest.raises(ConfigError, match=r"sequence_length=32 is longer than the model's 16 positions"):
        build(data, max_position_embeddings=16)
