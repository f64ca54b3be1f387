"""A mistake in a configuration is one line that names the setting, its value and what is allowed.

More of them, through the checks of the command line, are in tests/recipes/test_common_mistakes.py.
"""

from pathlib import Path
from typing import Any

import pytest

from lion_lightning.errors import ConfigError
from lion_lightning.training.run import run


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["trainer.devices=99"], r"trainer\.devices=99: .* 1 to \d+"),
        (["trainer.accelerator=abacus"], "trainer.accelerator must be one of .* got 'abacus'"),
        (["trainer.precision=8-bit"], "trainer.precision must be one of .* got '8-bit'"),
        (["trainer.max_steps=2.5"], r"trainer\.max_steps .* got 2\.5"),
        (["trainer.max_epochs=many"], "trainer.max_epochs .*many"),
        (["trainer.val_check_interval=0"], "trainer.val_check_interval .* got 0"),
        (["trainer.accumulate_grad_batches=-1"], "trainer.accumulate_grad_batches .* got -1"),
        (["trainer.strategy=teleport"], "teleport"),
        (["trainer.gradient_clip_val=hard"], "gradient_clip_val.*hard"),
        (["seed=-1"], "seed .* got -1"),
        (["seed=one"], "seed .* got 'one'"),
        (["seed=4294967296"], "seed .* got 4294967296"),
        (["resume=/nowhere/last.ckpt"], "resume=/nowhere/last.ckpt"),
        (["resume=https://example.org/a.ckpt"], "must be a file on this machine, not a URL"),
        (["checkpoint.every_n_steps=0"], "every_n_steps must be .* got 0"),
        (["checkpoint.every_minutes=-1"], "every_minutes must be .* got -1"),
        (["trainer=ddp"], "start its processes with torchrun"),
        (["trainer=fsdp2"], "start its processes with torchrun"),
        (["data.batch_size=500", "trainer.accumulate_grad_batches=3"], "1500 samples is larger"),
        (["data.source.val_fraction=2"], "val_fraction must be between 0 and 1, got 2"),
        (["model.config.patch_size=3"], "patch_size=3 does not divide"),
        (["recipe.module.label_smoothing=2"], "label_smoothing must be in"),
        (["recipe.module.crop_padding=-1"], "crop_padding .*-1"),
        (["+optim.lrr=1"], "lrr.*takes.*lr"),
        (["schedule.final=2"], "final .*2"),
        (["guard.min_batch_size=-1"], "min_batch_size .*-1"),
        (["data=image_files"], "data.path=null: it must be an image folder"),
        (["logger=wandb", "logger.mode=sometimes"], "mode must be one of .* got 'sometimes'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_setting_that_cannot_work_is_one_line_that_names_it(
    compose: Any, tmp_path: Path, overrides: list[str], named: str
) -> None:
    short = ("recipe=image_classification", "trainer.max_steps=1", "export=false", "logger=none")
    with pytest.raises(ConfigError, match=named) as error:
        run(compose(*short, f"run_dir={tmp_path / 'run'}", *overrides))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model=resnet18"], "not resnet"),
        (["data=digits"], "bert_mlm trains on text, not on ImageArrays"),
        (["data=text_files", "data.path=/nowhere"], "data.path=/nowhere: there is no such file or folder"),
        (["data=text_files"], "needs data.path="),
        (["recipe.module.masking.rate=2"], "rate must be between 0 and 1, got 2"),
        (["recipe.module.masking.mask_share=2"], "mask_share"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_combination_that_cannot_work_is_one_line_that_names_it(
    compose: Any, short_prose: Path, tmp_path: Path, overrides: list[str], named: str
) -> None:
    small = [
        "data=text_files",
        f"data.path={short_prose}",
        "data.sequence_length=32",
        "data.vocab_size=512",
        "data.val_fraction=0.1",
    ]
    small = [] if any(entry.startswith("data=") for entry in overrides) else small
    with pytest.raises(ConfigError, match=named) as error:
        run(compose("recipe=bert_mlm", "logger=none", f"run_dir={tmp_path}", *small, *overrides))
    assert "\n" not in str(error.value)
