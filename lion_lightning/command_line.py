"""What Hydra leaves to us: the command's name, trusted packages, checks, suggestions for errors, `--explain KEY`."""

import argparse
import difflib
import functools
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lion_lightning.errors import ConfigError

UNKNOWN_KEY = re.compile(r"Could not (?:override|delete from config\.) '?([\w.@/-]+)|'([\w.@/-]+)' is not in struct")
UNKNOWN_CHOICE = re.compile(r"(?:Could not find|Cannot find primary config|Could not load) '([\w./-]+)/([\w.-]+)'")

OTHER_NAMES = {
    "learning_rate": "lr", "wd": "weight_decay", "decay": "weight_decay", "beta1": "betas", "beta2": "betas",
    "bs": "batch_size", "epochs": "max_epochs", "num_train_epochs": "max_epochs", "steps": "max_steps",
    "gradient_accumulation_steps": "accumulate_grad_batches", "max_grad_norm": "gradient_clip_val",
    "bf16": "precision", "fp16": "precision", "amp": "precision", "device": "accelerator", "gpus": "devices",
    "warmup": "warmup_steps", "output_dir": "run_dir", "optimizer": "optim", "dataset": "data", "scheduler": "schedule",
}  # fmt: skip
"""What other trainers call some of our settings."""
SHOWN_TUNED = 2  # lines of --explain from conf/tuned
TEXTS = (
    "run_dir", "run_name", "resume", "ckpt", "input", "data.path", "data.val_path", "data.cache_dir", "data.tokenizer",
    "model.pretrained", "group", "logger.project",
)  # fmt: skip
"""Settings that are a path or a name."""
MORE_THAN_ONE = {"callbacks", "debug", "tuned"}
"""Groups of which a run can have several choices."""
FLAGS_WITHOUT_VALUE = ("-m", "--multirun", "--run", "-r", "--resolve", "--help", "-h", "--hydra-help")


TRUST = "LION_LIGHTNING_TRUST"
"""Environment variable: packages, separated by commas, whose classes and functions a configuration may name."""

OVERRIDES_FILE = "overrides.yaml"
"""In the folder of a run: the settings that its command line had."""
typed: list[str] = []
"""The arguments of `lion-train` as they were typed."""


def command_name() -> str:
    """How the program was started: `python train.py`, `lion-train`, `python -m lion_lightning`."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return f"python -m {program.parent.name}"
    return f"python {sys.argv[0]}" if program.suffix == ".py" else program.stem


def take_trusted(arguments: Sequence[str]) -> list[str]:
    """Note the packages of `trust=[PACKAGE,...]` and return the other arguments.

    They are noted in the environment, where processes that this one starts find them, and they are never a part of the
    configuration, so that one that comes with a checkpoint cannot extend them. The working folder is searched last.

    Raises:
        ConfigError: a name that no package can have.
    """
    typed[:] = arguments
    given = [argument.partition("=")[2] for argument in arguments if argument.lstrip("+").startswith("trust=")]
    named = [name.strip(" '\"") for value in given for name in value.strip("[]").split(",") if name.strip()]
    for name in named:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(f"trust={name}: not the name of a Python package; write trust=[PACKAGE,PACKAGE]")
    if named:
        os.environ[TRUST] = ",".join(dict.fromkeys([*trusted(), *named]))
        trusted.cache_clear()
    if trusted() and os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    return [argument for argument in arguments if not argument.lstrip("+").startswith("trust=")]


@functools.cache
def trusted() -> tuple[str, ...]:
    """The packages that the user trusts, as the environment had them when this was first asked."""
    return tuple(name.strip() for name in os.environ.get(TRUST, "").split(",") if name.strip())


def add_config_dir(parser: argparse.ArgumentParser) -> None:
    """Add `--config-dir FOLDER`, which can be given several times; see `search_path`."""
    told = "more configurations, as lion-train takes them"
    parser.add_argument("--config-dir", "-cd", action="append", default=[], metavar="FOLDER", help=told)


def search_path(folders: Sequence[str | Path]) -> list[str]:
    """The override that adds the configurations of `--config-dir FOLDER` where Hydra does not read the command line.

    Raises:
        ConfigError: there is no such folder.
    """
    for folder in folders:
        if not Path(folder).is_dir():
            raise ConfigError(f"--config-dir {folder}: no such folder")
    quoted = ["'{}'".format(f"file://{Path(folder).resolve()}".replace("'", "\\'")) for folder in folders]
    return [f"hydra.searchpath=[{','.join(quoted)}]"] if quoted else []


def run_folder(ckpt: str | Path) -> Path | None:
    """The folder of the run that `ckpt` means: itself, or the one it lies in; None where no `config.yaml` is kept."""
    place = Path(ckpt).expanduser().resolve()
    return next((folder for folder in (place, *place.parents[:2]) if (folder / "config.yaml").is_file()), None)


def overrides_of(folder: Path | None) -> list[str] | None:
    """The settings that the command line of a run had, without its place; None where they are not kept.

    Args:
        folder: of the run.
    """
    if folder is None or not (folder / OVERRIDES_FILE).is_file():
        return None
    kept = OmegaConf.to_container(OmegaConf.load(folder / OVERRIDES_FILE))
    words = [str(word) for word in kept] if isinstance(kept, list) else []
    return [word for word in words if not word.startswith(("run_dir=", "resume=", "hydra.", "hydra/"))]


def text_of(argument: str) -> str:
    """The value of a setting `key=value` as Hydra reads it: without quotes and escapes."""
    return str(OverridesParser.create().parse_override(argument).value())


def check_arguments(arguments: Sequence[str], config: Path) -> None:
    """Refuses what Hydra would accept silently or answer with its usage text.

    Args:
        arguments: of the command line, before Hydra reads them.
        config: the folder with train.yaml and its groups.

    Raises:
        ConfigError: a setting with dashes or that cannot be read, a `tuned` file that does not exist, or `resume=auto`
            without a folder.
    """
    groups = {entry.stem for entry in config.iterdir()}
    keys = {str(key) for key in OmegaConf.load(config / "train.yaml")}
    extends = any(word.startswith(("hydra.searchpath", "--config-dir", "-cd")) for word in arguments)
    for position, argument in enumerate(arguments):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("--") and name.split(".")[0] in groups | keys:
            value = value if equals else next(iter(arguments[position + 1 :]), "VALUE")
            raise ConfigError(f"{argument}: settings have no dashes; write {name}={value}")
        before = arguments[position - 1] if position else ""
        is_value_of_flag = before.startswith("-") and "=" not in before and before not in FLAGS_WITHOUT_VALUE
        if not argument.startswith("-") and not is_value_of_flag:
            _check_syntax(argument, config)
        if value == "null" and name.lstrip("+") in groups:  # which Hydra answers with a traceback
            files = sorted(file.stem for file in (config / name.lstrip("+")).glob("*.yaml"))
            choices = "none" if name.lstrip("+") == "tuned" else ", ".join(files)
            raise ConfigError(f"{argument}: null is no choice of a group; allowed is {name}={choices}")
        if value.startswith("[") and "," in value and name.lstrip("+") in groups - MORE_THAN_ONE:
            raise ConfigError(f"{argument}: a list would mix the settings of its choices; name one, or sweep with -m")
        if name.lstrip("+") == "tuned" and not extends:
            _check_tuned(value, config / "tuned")
    settings = {argument.partition("=")[0].lstrip("+") for argument in arguments}
    if "resume=auto" in arguments and not settings & {"run_dir", "hydra.run.dir", "hydra.sweep.dir"}:
        raise ConfigError(
            "resume=auto continues the newest checkpoint of run_dir, and without run_dir=FOLDER every run has a new one"
        )


def _check_syntax(argument: str, config: Path) -> None:
    """Refuses a setting that is not `key=value` as Hydra reads it, with the setting's name, which Hydra leaves out."""
    name, equals, value = argument.partition("=")
    if not equals and not argument.startswith("~"):
        groups = sorted(file.parent.name for file in config.glob(f"*/{argument}.yaml"))
        meant = f"; did you mean {groups[0]}={argument}?" if groups else ", such as 'data.path=my folder'"
        raise ConfigError(f"{argument}: a setting is key=value without spaces, or with quotes around it{meant}")
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException as error:
        if any(value.count(pair[0]) != value.count(pair[1]) for pair in ("[]", "{}", "()")):
            raise ConfigError(f"{argument}: a bracket is not closed, or not opened") from error
        raise ConfigError(f"{argument}: the value needs quotes of its own: '{name}=\"{value}\"'") from error
    if name.lstrip("+") in TEXTS and not override.is_sweep_override():
        _check_text(argument, override.value())


def _check_text(argument: str, value: Any) -> None:
    """Refuses a path or name that is a number for Hydra, such as that of a job, and one that has been left out."""
    name, _, text = argument.lstrip("+").partition("=")
    if isinstance(value, int | float):  # of which zeros and underscores are lost
        raise ConfigError(f"{argument}: a text that looks like a number needs quotes of its own: '{name}=\"{text}\"'")
    if value == "" or (value is None and name in ("run_dir", "run_name")):
        raise ConfigError(f"{argument} is empty; is a variable of the shell not set?")
    if name == "run_dir" and value.startswith("~"):
        raise ConfigError(f"{argument}: ~ would be the name of a folder; write $HOME in its place")


def _check_tuned(value: str, folder: Path) -> None:
    names = sorted(file.stem for file in folder.glob("*.yaml"))
    for name in value.split(","):
        if name.removesuffix(".yaml") not in (*names, "none") and "${" not in name:
            raise ConfigError(f"tuned={name}: there is no conf/tuned/{name}.yaml{_meant(name, names)}")


def suggestion(error: Exception, config: Path) -> str:
    """The end of a message about an unknown key or choice: what may have been meant; empty if nothing is similar.

    Args:
        error: of Hydra or OmegaConf.
        config: the folder with train.yaml and its groups.
    """
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return ""
    text = str(error)
    if found := UNKNOWN_CHOICE.search(text):
        return _meant(found[2], [file.stem for file in (config / found[1]).glob("*.yaml")])
    if found := UNKNOWN_KEY.search(text):
        name = found[1] or found[2]
        group, _, key = name.partition(".")
        known = known_keys(config)
        if name not in known or not (config / group).is_dir():
            return _meant(name, known)
        # The key exists, but not in the chosen file; or that file has it one level deeper.
        owners = re.findall(rf"conf/{group}/(\w+)\.yaml", "".join(_explanation(name, config)))
        below = [other for other in known if re.fullmatch(rf"{group}\.\w+\.{key}", other)]
        below = [other for other in below if "${" not in "".join(_explanation(other, config))]
        told = f"; did you mean {' or '.join(below)}?" if below else ""
        return f": the chosen {group} has no such setting; these have it: {group}={'|'.join(owners)}{told}"
    return ""


def explain(keys: Sequence[str], config: Path) -> str:
    """The value of settings in a run, and where they are written: the lines of the files that have them.

    Args:
        keys: as the command line writes them: `optim.lr`, `seed`, or a group; with `=` a setting of the run; and
            `--config-dir FOLDER`.
        config: the folder with train.yaml and its groups.

    Raises:
        ConfigError: no key is given, or no file has one of that name.
    """
    parser = argparse.ArgumentParser(add_help=False)
    add_config_dir(parser)
    options, keys = parser.parse_known_args(keys)
    more = search_path(options.config_dir)
    folders = [config, *map(Path, options.config_dir)]
    settings = [word for word in keys if "=" in word]
    keys = [word for word in keys if word not in settings]
    if not keys:
        raise ConfigError("--explain needs a setting, such as optim.lr; --cfg job lists all of a run")
    told = ["\n".join(_explanation(key, *folders)) for key in keys]
    with hydra.initialize_config_dir(str(config), version_base="1.3"):
        cfg = hydra.compose("train", [*settings, *more])
    run = " ".join(["a run", *(["with", *settings] if settings else [])])
    for number, key in enumerate(keys):
        value = OmegaConf.select(cfg, key, throw_on_resolution_failure=False)  # Hydra's own are not there
        if value is not None and not OmegaConf.is_dict(value):
            told[number] += f"\n  {run} has {value}"
    return "\n\n".join(told)


def _explanation(key: str, *folders: Path) -> list[str]:
    files = [] if "." in key else [file for folder in folders for file in sorted((folder / key).glob("*.yaml"))]
    if files:
        return [f"{key}=...", *(f"  {file.stem:<28} {_first_comment(file)}" for file in files)]
    lines = [line for name, line in _settings(*folders) if name == key]
    if not lines:
        raise ConfigError(f"--explain {key}: no file in conf/ has it{_meant(key, known_keys(*folders))}")
    tuned = [line for line in lines if line.startswith("  conf/tuned/")]
    if len(tuned) > SHOWN_TUNED:
        others = (
            f"  conf/tuned/: {len(tuned)} files, one for each recipe and optimizer; --cfg job shows what a run takes"
        )
        lines = [*(line for line in lines if line not in tuned), others]
    return [key, *lines]


def _first_comment(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    comments = (line.lstrip("# ") for line in lines if line.startswith("#") and "@package" not in line)
    return next(comments, "")


def known_keys(*folders: Path) -> list[str]:
    """Every setting of every file below `folders`, with the name that the command line gives it, and the groups."""
    keys = {entry.stem for folder in folders for entry in folder.iterdir() if any(entry.glob("*.yaml"))}
    keys.update(key for key, _ in _settings(*folders))
    return sorted(key for key in keys if not re.search(r"^hydra\b|\bdefaults$|(?:^|\.)_", key))


def _settings(*folders: Path) -> Iterator[tuple[str, str]]:
    """The settings of all files: the name on the command line, and the file and line that it stands in."""
    for folder, file in [(root, path) for root in folders for path in sorted(root.rglob("*.yaml"))]:
        place, text = file.relative_to(folder), file.read_text(encoding="utf-8")
        shown = (file if folder != folders[0] else "conf" / place).as_posix()
        package = re.search(r"^# @package (\S+)", text, re.MULTILINE)
        groups = package[1].replace("_global_", "").split(".") if package else place.parent.parts
        above = [(-1, group) for group in groups if group]  # indentation and name
        for line in text.splitlines():
            if match := re.match(r"( *)([\w@/-]+):", line):
                indent = len(match[1])
                above = [(depth, name) for depth, name in above if depth < indent] + [(indent, match[2])]
                yield ".".join(name for _, name in above), f"  {shown}: {re.sub(r' {2,}', '  ', line.strip())}"


def _meant(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` for up to three names of `known`: similar ones of the same group, or the same in others."""
    group, _, last = name.rpartition(".")
    others, last = list(known), OTHER_NAMES.get(last, last)
    siblings = {key.rpartition(".")[2]: key for key in others if key.rpartition(".")[0] == group}
    near = [siblings[key] for key in difflib.get_close_matches(last, siblings, n=3, cutoff=0.6)]
    near += [key for key in others if key.rpartition(".")[2] == last]
    if not siblings:
        near += difflib.get_close_matches(name, others, n=3, cutoff=0.6)
    near = list(dict.fromkeys(near))[:3]
    return f"; did you mean {' or '.join(near)}?" if near else ""
