"""The masked language model's options: none of them changes what is computed, but for documents kept apart."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from small_bert import LENGTH, batch_of, build
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, BertConfig, ModernBertConfig, PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lion_lightning.recipes.text.model as options_module
from lion_lightning.errors import ConfigError
from lion_lightning.recipes.bert_mlm.data import TextBlocks
from lion_lightning.recipes.bert_mlm.masking import Masking
from lion_lightning.recipes.bert_mlm.model import hidden_logits, hidden_loss
from lion_lightning.recipes.bert_mlm.module import BertMLM
from lion_lightning.recipes.text.model import ModelOptions, model_flops
from lion_lightning.training.build import instantiate

KINDS = (BertConfig, ModernBertConfig)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
Kind = type[PretrainedConfig]


def gradients(module: BertMLM, data: TextBlocks) -> tuple[float, dict[str, Tensor]]:
    loss = module.train().training_step(batch_of(data), 0)
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in module.model.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *((kind, change) for kind in KINDS for change in ({"activation_checkpointing": True}, {"attention": "eager"})),
        (ModernBertConfig, {"compile": "aot_eager"}),  # one compilation is enough: each takes seconds
    ],
)
def test_an_option_changes_neither_loss_nor_gradients_nor_names(
    blocks: TextBlocks, kind: Kind, change: dict[str, Any]
) -> None:
    plain, other = (build(blocks, kind=kind, options=ModelOptions(**kw), **NO_DROPOUT) for kw in ({}, change))
    (loss, expected), (same, found) = gradients(plain, blocks), gradients(other, blocks)
    assert same == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert list(other.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_keeps_less_for_the_backward_pass(blocks: TextBlocks, kind: Kind) -> None:
    def kept(options: ModelOptions) -> int:
        module, sizes = build(blocks, kind=kind, options=options).train(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            module.training_step(batch_of(blocks), 0)
        return sum(sizes)

    assert kept(ModelOptions(activation_checkpointing=True)) < 0.6 * kept(ModelOptions())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "change"),
    [(ModernBertConfig, {"within_documents": True}), (BertConfig, {"activation_checkpointing": True})],
)
def test_batches_do_not_compile_again(blocks: TextBlocks, kind: Kind, change: dict[str, Any]) -> None:
    """One graph for training; for validation one of its full batches and one of all others; no break in any."""
    torch._dynamo.reset()
    counters.clear()
    module = build(blocks, kind=kind, options=ModelOptions(compile="eager", **change))

    def train(steps: int) -> None:
        module.train()
        for step in range(steps):
            batch = batch_of(blocks)
            module.training_step({**batch, "sample": batch["sample"] + 100 * step}, 0).backward()

    def validate(*sizes: int) -> None:
        module.eval()
        with torch.inference_mode():
            for size in sizes:
                module.validation_step(batch_of(blocks, size), 0)

    train(3)
    assert counters["stats"]["unique_graphs"] == 1
    validate(8, 8, 3)
    assert counters["stats"]["unique_graphs"] <= 3
    compiled = counters["stats"]["unique_graphs"]
    train(2)
    validate(8, 5, 2)
    assert counters["stats"]["unique_graphs"] == compiled
    assert not counters["graph_break"]


@pytest.mark.slow
def test_a_copy_of_a_compiled_module_computes_with_its_own_weights(blocks: TextBlocks) -> None:
    module = build(blocks, options=ModelOptions(compile="eager"))
    before = module.training_step(batch_of(blocks), 0).item()
    other = copy.deepcopy(module)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.5)
    assert other.training_step(batch_of(blocks), 0).item() != pytest.approx(before)
    assert module.training_step(batch_of(blocks), 0).item() == pytest.approx(before)


def test_a_compiled_run_ends_where_the_plain_one_does(compose: Any, short_prose: Any, tmp_path: Any) -> None:
    from lion_lightning.training.run import run

    small = [
        "data=text_files", f"data.path={short_prose}", "data.sequence_length=16", "data.vocab_size=300", "logger=none",
        "data.batch_size=8", "data.val_fraction=0.3", "trainer.max_steps=4", "model.config.num_hidden_layers=1",
        "export=true",
    ]  # fmt: skip
    ends = [run(compose(*small, f"run_dir={tmp_path / name}", f"model.compile={name}")) for name in ("false", "eager")]
    assert ends[1] == pytest.approx(ends[0], rel=1e-4)
    exported = [AutoModelForMaskedLM.from_pretrained(tmp_path / name / "export") for name in ("false", "eager")]
    torch.testing.assert_close(exported[1].state_dict(), exported[0].state_dict(), rtol=1e-3, atol=3e-3)


# Documents of a block kept apart.


STRONG = {"num_hidden_layers": 4, "initializer_range": 0.3}  # a token tells on the others by more than rounding


def packed(blocks: TextBlocks, seed: int) -> tuple[Tensor, slice]:
    """A block with another document on each side of one that is always the same, and where that one is."""
    separator = blocks.ready.tokenizer.sep_token_id
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, 512, (1, LENGTH), generator=generator)
    middle = slice(10, 22)
    tokens[0, middle] = torch.arange(40, 40 + 12)
    tokens[0, [9, 21]] = separator
    return tokens, middle


def encode(module: BertMLM, tokens: Tensor) -> Tensor:
    places = torch.arange(tokens.shape[1])[None]
    with torch.no_grad():
        return hidden_logits(module.model, tokens, places, module.separator)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_document_does_not_depend_on_its_neighbours(blocks: TextBlocks, kind: Kind, attention: str) -> None:
    window = {"local_attention": 8} if kind is ModernBertConfig else {}
    options = ModelOptions(within_documents=True, attention=attention)
    apart = build(blocks, kind=kind, options=options, **STRONG, **window)
    (one, middle), (two, _) = packed(blocks, 1), packed(blocks, 2)
    alone = encode(apart, one[:, middle])
    torch.testing.assert_close(encode(apart, one)[middle], alone, rtol=0, atol=1e-4)
    torch.testing.assert_close(encode(apart, two)[middle], alone, rtol=0, atol=1e-4)
    together = build(blocks, kind=kind, **STRONG, **window)
    assert (encode(together, one)[middle] - encode(together, two)[middle]).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_flash_attention_is_told_the_same_documents(
    blocks: TextBlocks, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernel is replaced by a loop over the documents it is told; the masks of SDPA must give the same scores."""
    window = {"local_attention": 8} if kind is ModernBertConfig else {}
    module = build(blocks, kind=kind, options=ModelOptions(within_documents=True), **STRONG, **window)
    tokens = torch.cat([packed(blocks, seed)[0] for seed in (1, 2, 3)])
    places = torch.arange(LENGTH).repeat(3, 1)
    with torch.no_grad():
        expected = hidden_logits(module.model, tokens, places, module.separator)
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", varlen_attention)
        module.model.config._attn_implementation = "flash_attention_2"
        found = hidden_logits(module.model, tokens, places, module.separator)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def varlen_attention(
    layer: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **told: Any
) -> tuple[Tensor, None]:
    assert attention_mask is None
    flat = [part.transpose(1, 2).flatten(0, 1) for part in (query, key, value)]
    bounds, window = told["cu_seq_lens_q"].tolist(), told.get("sliding_window")
    assert bounds == told["cu_seq_lens_k"].tolist()
    pieces = []
    for start, end in pairwise(bounds):
        assert end - start <= told["max_length_q"]
        place = torch.arange(end - start)
        near = (place[:, None] - place[None, :]).abs() < (window or end)  # the library's window is one more
        q, k, v = (part[start:end].transpose(0, 1) for part in flat)
        pieces.append(scaled_dot_product_attention(q, k, v, attn_mask=near).transpose(0, 1))
    return torch.cat(pieces).unflatten(0, (query.shape[0], query.shape[2])), None


# What is refused.


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"attention": "flash"}, r"model.attention must be one of sdpa, eager, flash_attention_2, got 'flash'"),
        ({"attention": "flash_attention_2"}, r"flash_attention_2 needs a GPU and the flash-attn package; try sdpa"),
        ({"compile": "fast"}, r"model.compile must be true, false or a backend .*, got 'fast'"),
        ({"activation_checkpointing": "yes"}, r"model.activation_checkpointing must be true or false, got 'yes'"),
        ({"within_documents": 1}, r"model.within_documents must be true or false, got 1"),
    ],
)
def test_a_bad_option_is_named(change: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options_module, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(ConfigError, match=told):
        ModelOptions(**change)


# Work, and sizes by name.


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_that_torch_counts(blocks: TextBlocks, kind: Kind) -> None:
    module = build(blocks, kind=kind, options=ModelOptions(attention="eager"), **NO_DROPOUT).train()
    masked = module._mask(batch_of(blocks, 1), Masking(), seed=1)
    with FlopCounterMode(display=False) as counter:
        hidden_loss(module.model, masked.input_ids, masked.positions, masked.targets, None).backward()
    assert module.flops_per_sample() == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_local_layers_are_counted_within_their_window(blocks: TextBlocks) -> None:
    wide, narrow = (build(blocks, kind=ModernBertConfig, local_attention=window) for window in (64, 8))
    near = sum(abs(i - j) <= 4 for i in range(LENGTH) for j in range(LENGTH))
    local = narrow.model.config.layer_types.count("sliding_attention")
    assert local == 1
    assert wide.flops_per_sample() - narrow.flops_per_sample() == 12 * 32 * local * (LENGTH**2 - near)


def test_more_hidden_tokens_are_more_work(blocks: TextBlocks) -> None:
    few, many = build(blocks, rate=0.15), build(blocks, rate=0.5)
    head = 32 * 32 + 32 * len(blocks.ready.tokenizer)
    assert many.flops_per_sample() - few.flops_per_sample() == 6 * head * (16 - 5)
    assert model_flops(few.model, LENGTH, 5) == few.flops_per_sample()


# Millions of weights: Turc et al., 2019 (arXiv:1908.08962), table 1; Devlin et al., 2019; Warner et al., 2024.
PUBLISHED = {
    "bert_tiny": 4.4, "bert_mini": 11.3, "bert_small": 29.1, "bert_medium": 41.7, "bert_base": 110.1,
    "bert_large": 340, "modernbert_base": 149,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_by_name_has_the_published_size(compose: Any, name: str) -> None:
    config = instantiate(compose(f"model={name}", "run_dir=out").model.config)
    head = AutoModelForPreTraining if config.model_type == "bert" else AutoModelForMaskedLM
    with torch.device("meta"):
        model = head.from_config(config)
    assert sum(weight.numel() for weight in model.parameters()) / 1e6 == pytest.approx(PUBLISHED[name], rel=0.013)
