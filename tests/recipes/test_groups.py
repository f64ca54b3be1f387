"""Runs that cannot be compared are in different groups, and as usual the group is short."""

from typing import Any

import pytest

TEXT = "bert_mlm-python_docs-modernbert_tiny-1000x64x1"
USUAL = {
    "bert_mlm": TEXT,
    "image_classification": "image_classification-digits-vit_micro-2000x64x1",
    "text_classification": "text_classification-python_packages-modernbert_tiny-200x32x1",
}


@pytest.mark.parametrize("recipe", USUAL)
def test_the_group_of_a_run_as_usual_is_recipe_data_model_and_budget(compose: Any, recipe: str) -> None:
    assert compose(f"recipe={recipe}", "run_dir=out").group == USUAL[recipe]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.pretrained=runs/a.b/export", "-from-runs/a.b/export"),
        ("recipe.module.masking.unit=word", "-word"),
        ("recipe.module.masking.unit=span", "-span"),
        ("data.length_schedule=[[0,32],[300,128]]", "-lengths-[[0, 32], [300, 128]]"),
        ("data.batch_schedule=[[0,16],[200,64]]", "-batches-[[0, 16], [200, 64]]"),
        ("data.limit_train_samples=500", "-first-500"),
    ],
)
def test_what_is_not_as_usual_is_told_at_the_end(compose: Any, override: str, told: str) -> None:
    assert compose(override, "run_dir=out").group == TEXT + told


def test_mixtures_of_other_weights_or_sources_are_other_groups(compose: Any) -> None:
    mixtures = ("{path: a, weight: 3}", "{path: a, weight: 2}", "{hub: a, weight: 3}")
    groups = {compose("data=mixture", f"data.sources=[{one},{{path: b}}]", "run_dir=out").group for one in mixtures}
    assert len(groups) == 3
    assert all("weight" in group for group in groups)


def test_several_of_them_are_all_told(compose: Any) -> None:
    overrides = "recipe.module.masking.unit=word", "data.batch_schedule=[[0,16],[200,64]]", "model.pretrained=a"
    assert compose(*overrides, "run_dir=out").group == f"{TEXT}-from-a-word-batches-[[0, 16], [200, 64]]"
