from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from transformers import BertConfig, BertForMaskedLM, ViTConfig, ViTForImageClassification

from lion_lightning import Lion, from_adamw
from lion_lightning.hyperparams import (
    PRESETS,
    beta_for_half_life,
    decay_for_timescale,
    for_batch_size,
    lion_amos,
    parameter_groups,
    preset,
    published_factor,
)


def names(group):
    return {name for name, _ in group["params"]}


def test_from_adamw_keeps_the_product_of_rate_and_decay():
    lion = from_adamw(lr=1e-3, weight_decay=0.1)
    assert lion == pytest.approx({"lr": 1e-4, "weight_decay": 1.0})
    for factor in (3, 5, 10):
        lion = from_adamw(lr=4e-4, weight_decay=0.05, factor=factor)
        assert lion["lr"] * lion["weight_decay"] == pytest.approx(4e-4 * 0.05)
        assert lion["lr"] == pytest.approx(4e-4 / factor)


@pytest.mark.parametrize(
    ("parameters", "lr", "lion_lr"),
    [
        (124e6, 1e-3, 1e-3),
        (210e6, 1e-3, 5e-4),
        (720e6, 1e-3, 2e-4),
        (8e9, 1e-3, 1e-4),
        (1e6, 1e-3, 1e-3),
        (130e6, 8e-3, 2e-3),
        (520e6, 4e-3, 5e-4),
    ],
)
def test_from_adamw_knows_the_factors_that_were_published(parameters, lr, lion_lr):
    lion = from_adamw(lr, 0.1, parameters=int(parameters))
    assert lion["lr"] == pytest.approx(lion_lr)
    assert lion["lr"] * lion["weight_decay"] == pytest.approx(lr * 0.1)
    factors = [published_factor(size, lr) for size in range(50_000_000, 2_000_000_000, 50_000_000)]
    assert factors == sorted(factors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0}, "lr must be a positive number, got 0.0"),
        ({"lr": float("nan")}, "lr must be a positive number, got nan"),
        ({"lr": 1e-3, "weight_decay": -1}, "weight_decay must be a number of at least 0, got -1"),
        ({"lr": 1e-3, "weight_decay": None}, "weight_decay must be a number, got None"),
        ({"lr": 1e-3, "factor": 0.5}, "factor must be a number of at least 1"),
        ({"lr": 1e-3, "parameters": 0}, "parameters must be a positive number, got 0"),
        ({"lr": 1e-3, "factor": 3.0, "parameters": 10}, "give factor or parameters, not both"),
    ],
)
def test_from_adamw_refuses_what_is_not_a_setting(arguments, message):
    with pytest.raises(ValueError, match=message):
        from_adamw(**arguments)


def test_every_preset_makes_an_optimizer_and_names_its_source():
    for name, published in PRESETS.items():
        group = Lion([nn.Parameter(torch.zeros(2))], **preset(name)).param_groups[0]
        assert group["lr"] == published.lr
        assert group["weight_decay"] == published.weight_decay
        assert len(published.source) > 20
    with pytest.raises(ValueError, match=r"name must be one of base, .* got 'gpt5'"):
        preset("gpt5")


def test_bert_decays_matrices_and_nothing_else():
    model = BertForMaskedLM(
        BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    )
    decay, no_decay = parameter_groups(model, weight_decay=0.1)
    assert (decay["name"], decay["weight_decay"]) == ("decay", 0.1)
    assert (no_decay["name"], no_decay["weight_decay"]) == ("no_decay", 0.0)
    assert "bert.embeddings.word_embeddings.weight" in names(decay)
    assert "bert.encoder.layer.0.attention.self.query.weight" in names(decay)
    assert "bert.embeddings.position_embeddings.weight" in names(no_decay)
    assert all(name.endswith("weight") for name in names(decay))
    assert not any("LayerNorm" in name or name.endswith("bias") for name in names(decay))


def test_tied_weights_come_once():
    model = BertForMaskedLM(
        BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    )
    grouped = [parameter for group in parameter_groups(model, 0.1) for _, parameter in group["params"]]
    assert len({id(parameter) for parameter in grouped}) == len(grouped) == len(list(model.parameters()))


def test_vit_positions_and_norms_do_not_decay():
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=8, patch_size=4
        )
    )
    _, no_decay = parameter_groups(model, 0.1)
    assert "vit.embeddings.position_embeddings" in names(no_decay)
    assert "vit.embeddings.cls_token" in names(no_decay)
    assert "vit.layernorm.weight" in names(no_decay)


def test_frozen_parameters_and_empty_groups_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    model[1].requires_grad_(False)
    (only,) = parameter_groups(model, 0.1)
    assert names(only) == {"0.weight"}
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="Sequential has no parameter with requires_grad=True"):
        parameter_groups(model, 0.1)


def test_amos_reads_the_published_bert_setting_off_a_matrix_of_that_scale():
    model = nn.Linear(768, 768)
    nn.init.normal_(model.weight, std=(1 / 768) ** 0.5)
    optimizer = lion_amos(parameter_groups(model, 0.0))
    decay, no_decay = optimizer.param_groups
    assert decay["lr"] == pytest.approx(4e-5, rel=0.03)
    assert decay["weight_decay"] == pytest.approx(0.0155, rel=0.03)
    assert decay["name"] == "decay/sigma=0.036"
    assert no_decay["weight_decay"] == 0.0


def test_amos_steps_each_parameter_by_its_own_scale_and_a_zero_one_by_the_median():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    with torch.no_grad():
        model[0].weight.fill_(0.5)
        model[0].bias.zero_()
    optimizer = lion_amos(parameter_groups(model, 0.0), alpha_0=1e-2, q=2.0, betas=(0.95, 0.98))
    by_name = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    assert by_name["0.weight"]["lr"] == pytest.approx(5e-3)
    assert by_name["0.weight"]["weight_decay"] == pytest.approx(1e-2 / (2 * 2 * 0.5))
    assert by_name["1.weight"]["lr"] == pytest.approx(1e-2)  # gains start at 1
    assert by_name["0.bias"]["lr"] == pytest.approx(5e-3)
    assert by_name["0.bias"]["betas"] == (0.95, 0.98)
    with pytest.raises(ValueError, match=r"alpha_0 must be a positive number, got 0"):
        lion_amos(parameter_groups(model, 0.0), alpha_0=0)


def test_shipped_files_of_published_settings_say_what_the_presets_say():
    folder = Path(__file__).parents[1] / "conf" / "tuned"
    files = {
        "base": "paper_base",
        "base_language": "paper_base_language",
        "billion_language": "paper_billion_language",
        "bert_base_amos": "amos_bert_base",
        "vit_b16_imagenet": "paper_vit_b16_imagenet",
    }
    assert files.keys() == PRESETS.keys()
    for name, file in files.items():
        shipped = OmegaConf.to_container(OmegaConf.load(folder / f"{file}.yaml"))["optim"]
        assert {**shipped, "betas": tuple(shipped["betas"])} == preset(name)


def test_weights_forget_over_the_time_scale_of_their_decay():
    param = nn.Parameter(torch.ones(1, dtype=torch.float64))
    decay = decay_for_timescale(lr=1e-3, steps=200)
    optimizer = Lion([param], lr=1e-3, weight_decay=decay)
    param.grad = torch.zeros_like(param)
    for _ in range(200):
        optimizer.step()
    assert param.item() == pytest.approx(0.3679, rel=5e-3)  # 1 / e
    with pytest.raises(ValueError, match="steps must be a positive number, got 0"):
        decay_for_timescale(1e-3, 0)


def test_a_half_life_in_samples_is_one_at_every_batch_size():
    for batch_size in (8, 64, 1024):
        assert beta_for_half_life(6400, batch_size) ** (6400 / batch_size) == pytest.approx(0.5)


def test_another_batch_size_keeps_time_scales_in_samples():
    options = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 1.0, "cautious": True}
    scaled = for_batch_size(options, old=64, new=256)
    assert scaled["lr"] == pytest.approx(2e-4)
    assert scaled["betas"] == pytest.approx((0.6, 0.96))
    assert 256 / (scaled["lr"] * scaled["weight_decay"]) == pytest.approx(64 / (1e-4 * 1.0))
    assert scaled["cautious"] is True
    back = for_batch_size(scaled, old=256, new=64)
    assert back["lr"] == pytest.approx(options["lr"])
    assert back["betas"] == pytest.approx(options["betas"])
    with pytest.raises(ValueError, match="cannot be scaled to a batch 16 times"):
        for_batch_size(options, old=64, new=1024)
