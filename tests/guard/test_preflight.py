"""Preflight finds what is wrong with settings, and nothing wrong with any that are shipped or published."""

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from lion_lightning import Lion
from lion_lightning.guard.lr_warmup import warmup_length
from lion_lightning.guard.preflight import TURNOVER_LIMIT, RunSettings, inspect, turnover
from lion_lightning.hyperparams import from_adamw
from lion_lightning.recipes.image_classification.airbench import AirbenchConfig, AirbenchForImageClassification
from lion_lightning.training.build import build_data, build_module, effective_batch_size, instantiate, max_steps

RECIPES = ("bert_mlm", "image_classification")
OPTIMIZERS = ("lion", "adamw", "signum", "sgd", "adafactor", "lion_amos", "muon")
PAPER = ("paper_base", "paper_base_language", "paper_billion_language", "paper_vit_b16_imagenet")
LONG = RunSettings(total_steps=300_000, warmup_steps=3_000, batch_size=4096)


def bert_base_matrices(dtype=torch.float32):
    """Attention and the two matrices of the feed-forward part of one layer, as BERT starts them."""
    torch.manual_seed(1)
    return [nn.Parameter((0.02 * torch.randn(shape)).to(dtype)) for shape in ((768, 768), (3072, 768), (768, 3072))]


def found(optimizer, run=LONG):
    return {finding.kind: finding.message for finding in inspect(optimizer, run)}


def lion(lr=1e-4, weight_decay=0.1, **options):
    return Lion(bert_base_matrices(), lr=lr, weight_decay=weight_decay, **options)


@pytest.fixture(scope="module")
def data_of(compose) -> Callable[[str], Any]:
    """The data of a recipe, the same for every optimizer."""
    return functools.cache(lambda recipe: build_data(compose(f"recipe={recipe}", "run_dir=out")))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_nothing_is_wrong_with_a_shipped_recipe(compose, data_of, tmp_path, recipe, optim):
    cfg = compose(f"recipe={recipe}", f"optim={optim}", f"run_dir={tmp_path}")
    data = data_of(recipe)
    torch.manual_seed(cfg.seed)
    module, steps = build_module(cfg, data), max_steps(cfg, data)
    module._trainer = SimpleNamespace(estimated_stepping_batches=steps)
    optimizer = module.configure_optimizers()["optimizer"]
    run = RunSettings(
        total_steps=steps,
        warmup_steps=warmup_length(None, steps),
        batch_size=effective_batch_size(cfg),
        gradient_clip_val=cfg.trainer.get("gradient_clip_val"),
        min_batch_size=cfg.guard.min_batch_size,
    )
    assert found(optimizer, run) == {}


@pytest.mark.parametrize("tuned", PAPER)
def test_nothing_is_wrong_with_what_was_published(compose, tuned):
    factory = instantiate(compose(f"tuned={tuned}", "run_dir=out").optim)
    assert found(factory(bert_base_matrices())) == {}


@pytest.mark.parametrize("tuned", PAPER)
def test_thirty_times_a_published_rate_is_found(compose, tuned):
    cfg = compose(f"tuned={tuned}", "run_dir=out")
    cfg.optim.lr *= 30
    message = found(instantiate(cfg.optim)(bert_base_matrices()))["lr"]
    assert f"lr={cfg.optim.lr:g}" in message


@pytest.mark.parametrize("rate", [1e-3, 2e-3, 3e-3])
def test_a_rate_of_adamw_is_found_and_a_tenth_of_it_is_not(rate):
    assert "lr" in found(lion(lr=rate))
    assert "lr" not in found(lion(**from_adamw(rate, 0.01)))


def test_a_short_memory_bears_a_higher_rate():
    assert "limit 200" in found(lion(lr=3e-3, weight_decay=1.0))["lr"]
    assert "lr" not in found(lion(lr=3e-3, weight_decay=1.0, betas=(0.9, 0.95)))
    assert "lr" not in found(lion(lr=8e-4, betas=(0.9, 0.9999))), "judged as one of 100 steps"


@pytest.mark.parametrize(
    ("lr", "betas", "width", "rows"),
    [
        (2e-3, (0.9, 0.95), 512, 128_256 // 32),  # Wen et al.: 130 M parameters in 32 layers, Llama 3's tokenizer
        (1e-3, (0.9, 0.99), 768, 50_304 // 12),  # Semenov et al.: 124 M in 12 layers, GPT-2's
    ],
)
def test_the_best_rates_of_published_sweeps_are_within_the_limit(lr, betas, width, rows):
    torch.manual_seed(1)
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width), (rows, width)]
    layer = [nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes]  # with its share of the embedding
    assert turnover(Lion(layer, lr=lr, betas=betas)) < TURNOVER_LIMIT


def test_a_rate_that_is_only_somewhat_too_high_is_called_one_of_adamw():
    assert "looks like an AdamW rate" in found(lion(lr=2e-3))["lr"]


def test_a_rate_far_too_high_comes_with_one_that_is_not():
    message = found(lion(lr=1e-2))["lr"]
    assert "far too high" in message
    assert "lr" not in found(lion(lr=float(message.split("try ")[1])))


def test_the_turnover_is_what_one_sign_step_does_to_a_layers_output():
    torch.manual_seed(1)
    weight = 0.02 * torch.randn(256, 768, dtype=torch.float64)
    inputs = torch.randn(768, dtype=torch.float64)
    step = 1e-4 * inputs.sign().expand(256, -1)  # the worst step for this input
    change = (step @ inputs).square().mean().sqrt() / (weight @ inputs).square().mean().sqrt()
    # mean |x| of a normal x is 0.8 of its deviation
    optimizer = Lion([nn.Parameter(weight)], lr=1e-4, betas=(0.9, 0.95))
    assert turnover(optimizer) / 20 * 0.8 == pytest.approx(float(change), rel=0.1), "a memory of 20 steps"


def test_a_schedule_that_has_begun_does_not_hide_the_peak():
    optimizer = lion(lr=1e-2)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.001)
    assert "lr" in found(optimizer)


def test_a_rate_that_suits_a_convolutional_net_is_not_advised_against():
    net = nn.Sequential(nn.Conv2d(256, 256, 3), nn.BatchNorm2d(256), nn.Flatten(), nn.Linear(256, 10))
    assert "lr" not in found(Lion(net.parameters(), lr=2e-3))
    assert "far too high" in found(Lion(net.parameters(), lr=0.1))["lr"]
    assert "far too high" in found(Lion(nn.Conv2d(256, 256, 3).parameters(), lr=0.1))["lr"]


@pytest.mark.parametrize("optim", ["lion", "adamw"])
def test_the_tuned_settings_of_a_convolutional_net_get_no_finding(compose, optim):
    cfg = compose("recipe=cifar10_airbench", f"optim={optim}", "run_dir=out")
    net = AirbenchForImageClassification(AirbenchConfig(num_labels=10))
    run = RunSettings(total_steps=9_375, warmup_steps=1_875, batch_size=128)
    assert found(instantiate(cfg.optim)(net.parameters()), run) == {}


def test_matrices_that_start_at_zero_and_vectors_have_no_say():
    zeros = [nn.Parameter(torch.zeros(8, 8)), nn.Parameter(torch.zeros(8))]
    assert turnover(Lion(zeros, lr=1e-3)) == 0
    assert "lr" not in found(Lion(zeros, lr=1e-3))


@pytest.mark.parametrize(
    ("decay", "steps", "wrong"), [(1e-4, 1000, True), (0.01, 1000, True), (0.1, 1000, False), (1e-4, 10**8, False)]
)
def test_a_decay_that_does_nothing_over_the_run_is_found(decay, steps, wrong):
    run = RunSettings(total_steps=steps, warmup_steps=20, batch_size=64)
    assert ("decay" in found(lion(weight_decay=decay), run)) == wrong


def test_rates_and_decays_worked_out_for_each_group_are_no_oversight():
    groups = [{"params": [param], "lr": 1e-5 * (1 + n)} for n, param in enumerate(bert_base_matrices())]
    assert found(Lion(groups, weight_decay=0.01), RunSettings(1000, 20, 64)) == {}
    assert "decay" in found(Lion(groups, weight_decay=1e5), RunSettings(1000, 20, 64))


def test_a_decay_that_eats_the_weights_is_found():
    assert "over 10 % of a weight a step" in found(lion(weight_decay=2000.0))["decay"]


def test_no_decay_at_all_and_a_run_without_end_are_fine():
    assert found(lion(weight_decay=0.0)) == {}
    assert found(lion(weight_decay=1e-6), RunSettings(math.inf, 20, 64)) == {}


def test_a_run_of_a_few_steps_is_a_trial_and_judged_as_a_thousand():
    assert found(lion(weight_decay=0.2), RunSettings(10, 1, 64)) == {}


def test_no_warm_up_is_found_unless_the_schedule_has_its_own():
    cold = RunSettings(1000, warmup_steps=0, batch_size=64)
    assert "there is no warm-up" in found(lion(), cold)["warmup"]
    optimizer = lion()
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 100))
    assert "warmup" not in found(optimizer, cold)


@pytest.mark.parametrize("betas", [(0.9, 0.9999999), (0.0, 0.99), (0.999, 0.99), (0.9, 0.5)])
def test_unusual_betas_are_found(betas):
    assert f"({betas[0]:g}, {betas[1]:g})" in found(lion(betas=betas))["betas"]


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.95, 0.98), (0.9, 0.999)])
def test_usual_betas_are_not(betas):
    assert found(lion(betas=betas)) == {}


@pytest.mark.parametrize(("size", "wrong"), [(None, False), (16, True), (63, True), (64, False)])
def test_a_batch_below_64_is_found_for_any_optimizer(size, wrong):
    run = RunSettings(100_000, 100, batch_size=size)
    assert ("batch_size" in found(lion(), run)) == wrong
    assert ("batch_size" in found(SGD(bert_base_matrices(), lr=0.1), run)) == wrong


def test_how_often_to_accumulate_is_said():
    assert "4 times" in found(lion(), RunSettings(100_000, 100, batch_size=16))["batch_size"]


def test_two_that_clip_are_one_too_many():
    both = RunSettings(100_000, 100, 64, gradient_clip_val=1.0)
    assert "gradient_clip_val=1" in found(lion(), both)["clipping"]
    assert found(lion(), RunSettings(100_000, 100, 64, gradient_clip_val=1.0, gate=False)) == {}
    assert found(AdamW(bert_base_matrices(), lr=1e-3), both) == {}


def test_bf16_weights_that_round_steps_away_are_found_for_others_and_not_for_ours():
    weights = bert_base_matrices(torch.bfloat16)
    assert "rounded away" in found(AdamW(weights, lr=1e-5))["bf16"]
    assert found(AdamW(weights, lr=1e-3)) == {}
    assert found(AdamW(bert_base_matrices(), lr=1e-5)) == {}
    assert found(Lion(weights, lr=1e-5, weight_decay=1.0)) == {}


def test_what_is_special_to_lion_is_left_out_for_others():
    run = RunSettings(1000, warmup_steps=0, batch_size=64, gradient_clip_val=1.0)
    assert found(AdamW(bert_base_matrices(), lr=1e-2, betas=(0.5, 0.5), weight_decay=1e-6), run) == {}


def test_numbers_of_adamw_name_the_conversion():
    params = [nn.Parameter(torch.randn(8, 8))]
    (finding,) = inspect(Lion(params, lr=1e-3, weight_decay=0.1), RunSettings(500, 50))
    assert "from_adamw(0.001, 0.1)" in finding.message
    assert inspect(Lion(params, lr=1e-4, weight_decay=1.0), RunSettings(500, 50)) == []
    assert inspect(Lion(params, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.9)), RunSettings(500, 50)) == []
