"""Mistakes on the command line that Hydra takes in silence, and what its errors suggest."""

import re

import hydra
import pytest
from omegaconf import OmegaConf

from lion_lightning.__main__ import CONFIG_FOLDER
from lion_lightning.command_line import check_arguments, explain, known_keys, suggestion
from lion_lightning.errors import ConfigError


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--optim", "adamw"], "--optim: settings have no dashes; write optim=adamw"),
        (["--trainer.max_steps=5"], "write trainer.max_steps=5"),
        (["tuned=bert_mlm_loin"], "there is no conf/tuned/bert_mlm_loin.yaml; did you mean bert_mlm_lion"),
        (["-m", "tuned=bert_mlm_lion,bert_mlm_lino"], "tuned=bert_mlm_lino: there is no"),
        (["tuned=null"], "tuned=null: null is no choice of a group; allowed is tuned=none"),
        (["optim=null"], "optim=null: null is no choice of a group; allowed is optim=adafactor, adamw, "),
        (["logger=[csv,tensorboard]"], "a list would mix the settings of its choices"),
        (["run_dir=2026_12"], """run_dir=2026_12: .* needs quotes of its own: 'run_dir="2026_12"'"""),
        (["group=5"], "looks like a number"),
        (["input=1e3"], "looks like a number"),
        (["+run_dir=true"], "looks like a number"),
        (["data.path="], "data.path= is empty; is a variable of the shell not set"),
        (["ckpt=''"], "is empty"),
        (["run_dir=null"], "run_dir=null is empty"),
        (["run_dir='~/runs'"], r"write \$HOME in its place"),
        (["resume=auto"], "without run_dir=FOLDER every run has a new one"),
    ],
)
def test_what_hydra_does_not_check_is_refused(arguments, said):
    with pytest.raises(ConfigError, match=said):
        check_arguments(arguments, CONFIG_FOLDER)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--cfg", "job"],
        ["optim=lion", "+optim.new=1", "~callbacks"],
        ["tuned=bert_mlm_lion"],
        ["tuned=none"],
        ["resume=auto", "run_dir=out"],
        ["resume=auto", "hydra.run.dir=out"],
        ["--config-dir", "mine", "tuned=mine"],
        ["-m", "seed=1,2"],
        ["-m", "logger=csv,none", "callbacks=[ema,mine]", "optim.betas=[0.9,0.99]"],
        ["-m", "data.path=a,b", "run_name=1,2"],
        ["run_dir='2026'", "resume=null", "data.path='~/texts'", "ckpt=${oc.env:HOME}"],
    ],
)
def test_what_is_right_passes(arguments):
    check_arguments(arguments, CONFIG_FOLDER)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("trainer.max_step=5", "trainer.max_steps"),
        ("lr=1", "optim.lr"),
        ("optim=lino", "lion"),
        ("model=resnet81", "resnet18"),
        ("recipee=bert_mlm", "recipe"),
        ("data.batchsize=5", "data.batch_size"),
        ("guard.dissabled=[]", "guard.disabled"),
        ("trainer.zzzzzz=1", ""),
    ],
)
def test_an_unknown_name_gets_what_is_similar(override, meant):
    with (
        hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"),
        pytest.raises(Exception, match=r"Could not") as told,
    ):
        hydra.compose("train", overrides=[override])
    found = suggestion(told.value, CONFIG_FOLDER)
    assert f"did you mean {meant}" in found if meant else found == ""


def test_other_errors_get_no_suggestion():
    assert suggestion(ValueError("Could not override 'lr'"), CONFIG_FOLDER) == ""


def test_keys_have_the_names_of_the_command_line():
    assert {"optim.lr", "trainer.max_steps", "seed", "checkpoint.keep", "recipe"} <= set(known_keys(CONFIG_FOLDER))


def test_explain_prints_default_and_comment_wherever_a_key_is_set():
    text = explain(["optim.lr", "checkpoint.keep"], CONFIG_FOLDER)
    assert "conf/optim/adamw.yaml: lr: 1e-3  # peak learning rate" in text
    assert re.search(r"conf/tuned/: 2\d files, one for each recipe and optimizer", text)
    assert len(text.splitlines()) < 15
    assert "conf/train.yaml: keep: 2  # this many of the latest stay" in text
    assert "weight_decay" not in text
    assert re.search(r"  wsd +The peak, then", explain(["schedule"], CONFIG_FOLDER))
    with pytest.raises(ConfigError, match=r"optim\.lrr: no file in conf/ has it; did you mean optim\.lr\?"):
        explain(["optim.lrr"], CONFIG_FOLDER)
    for no_key in ([], ["optim.lr=1e-3"]):
        with pytest.raises(ConfigError, match="needs a setting"):
            explain(no_key, CONFIG_FOLDER)


def test_explain_reads_the_folders_of_config_dir(tmp_path):
    (tmp_path / "optim").mkdir()
    file = tmp_path / "optim" / "mine.yaml"
    file.write_text("# Of mine.\n_target_: torch.optim.SGD\n_partial_: true\nname: mine\nhurry: 3  # how much\n")
    text = explain(["optim.hurry", "--config-dir", str(tmp_path), "optim=mine"], CONFIG_FOLDER)
    assert text == f"optim.hurry\n  {file}: hurry: 3  # how much\n  a run with optim=mine has 3"
    choices = explain(["optim", f"-cd={tmp_path}"], CONFIG_FOLDER)
    assert re.search(r"  lion +Lion, .*\n(.*\n)*  mine +Of mine\.", choices)


def test_keys_of_a_package_have_its_name():
    assert "conf/callbacks/ema.yaml: decay: 0.999" in explain(["callbacks.ema.decay"], CONFIG_FOLDER)


def test_every_known_key_is_explained():
    keys = known_keys(CONFIG_FOLDER)
    for key, told in zip(keys, explain(keys, CONFIG_FOLDER).split("\n\n"), strict=True):
        assert told.splitlines()[0].removesuffix("=...") == key
        assert told.splitlines()[1:], key


def test_explain_says_what_a_run_has():
    tuned = OmegaConf.load(CONFIG_FOLDER / "tuned/image_classification_adamw.yaml")
    assert explain(["optim.lr", "recipe=image_classification", "optim=adamw"], CONFIG_FOLDER).endswith(
        f"\n  a run with recipe=image_classification optim=adamw has {tuned.optim.lr}"
    )
    assert explain(["optim.betas"], CONFIG_FOLDER).endswith("]")
    assert "a run has" not in explain(["schedule"], CONFIG_FOLDER), "a group has files, not a value"
