"""What a run keeps about itself, without its secrets: its configuration, the logger, and the end of the W&B run.

Secrets are found by the name of the setting, by the look of the value, and in URLs. Nothing heavy is imported here:
the command line needs it before there is something to run.
"""

import logging
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from lion_lightning.command_line import OVERRIDES_FILE
from lion_lightning.errors import ConfigError

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

    from lion_lightning.tracking.wandb import RunLogger

RUN_ID_FILE = "wandb_run_id"  # in the folder of an online run
# The value that stands for the run in W&B's table, by exact metric name.
SUMMARIES: dict[str, Any] = {
    **dict.fromkeys(("val/loss", "val/perplexity", "val/ece"), "min"),
    **dict.fromkeys(("val/accuracy", "val/top1", "val/top5", "perf/peak_memory_gib"), "max"),
    **dict.fromkeys(("train/loss", "train/loss_smoothed", "perf/step_ms", "perf/mfu"), "last"),
    **dict.fromkeys(("perf/samples_per_second", "perf/tokens_per_second"), "last"),
}
HIDDEN = "(hidden)"
# Names of settings that hold secrets: whole words of the name, so that `max_tokens` and `monkey` are none.
_SECRET_WORDS = frozenset(
    {"secret", "secrets", "password", "passwd", "passphrase", "credential", "credentials"}
    | {"token", "apikey", "authorization", "bearer", "cookie"}
)
_SECRET_PAIRS = frozenset((first, "key") for first in ("api", "access", "private", "secret", "auth"))
_PINS = frozenset({"revision", "commit", "sha", "sha1", "fingerprint"})  # 40 hexadecimal digits, and no secret
# What tokens look like: W&B (also wandb_v1_), Hugging Face, GitHub, OpenAI and Anthropic, AWS, Google, Slack, JWT.
_TOKENS = re.compile(
    r"wandb_v\d_[A-Za-z0-9_]{20,}|\b[0-9a-f]{40}\b|hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_[A-Za-z0-9_]{20,}|sk-[A-Za-z0-9_-]{20,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|AIza[A-Za-z0-9_-]{30,}"
    r"|xox[abprs]-[A-Za-z0-9-]{10,}|eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*"
)
_USER_INFO = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_QUERY = re.compile(r"(?i)(?<=[?&;])((?:[\w-]*(?:token|key|secret|signature|password|sig))=)[^&#\s]+")
_INTERPOLATION = re.compile(r"\$\{[^{}]*\}")
_OVERRIDE = re.compile(r"(?P<name>[+~]*[\w./@-]+)=(?P<value>.*)", re.DOTALL)


def redacted(value: Any, name: str = "") -> Any:
    """`value` with every secret in it replaced, at any depth.

    Args:
        value: a plain configuration: dicts, lists and scalars.
        name: the setting it belongs to; one such as `api_key` hides a string whatever it looks like.
    """
    if isinstance(value, Mapping):
        return {key: redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redacted(item, name) for item in value)
    if value is None or isinstance(value, bool) or name in _PINS:
        return value
    if _names_a_secret(name):
        return HIDDEN
    return redacted_text(value) if isinstance(value, str) else value


def redacted_text(text: str) -> str:
    """`text` without tokens, URL user information and secret query parameters."""
    hidden = _TOKENS.sub(HIDDEN, _USER_INFO.sub(HIDDEN, text))
    return _QUERY.sub(rf"\1{HIDDEN}", hidden)


def redacted_argument(argument: str) -> str:
    """A command-line override with its secret hidden: by the last part of its name, or by the look of its value."""
    found = _OVERRIDE.fullmatch(argument)
    name = re.split(r"[./@]", found["name"])[-1].lstrip("+~") if found else ""
    if found and _names_a_secret(name):
        return argument[: found.start("value")] + HIDDEN
    return argument if name in _PINS else redacted_text(argument)


def _names_a_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret, in snake, kebab or camel case."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().replace("-", "_").split("_")
    return bool(_SECRET_WORDS.intersection(words)) or any(pair in _SECRET_PAIRS for pair in pairwise(words))


def refuse_secrets_of_a_sweep(arguments: Sequence[str]) -> None:
    """Raise ConfigError if the command line of a sweep holds a secret, since Hydra keeps it in `multirun.yaml`."""
    if not any(argument in ("-m", "--multirun", "hydra.mode=MULTIRUN") for argument in arguments):
        return
    for argument in arguments:
        found = _OVERRIDE.fullmatch(argument)
        if found is None or redacted_argument(argument) == argument:
            continue
        if _INTERPOLATION.sub("", found["value"]).strip(" ,'\"[]"):  # more than references such as ${oc.env:NAME}
            name = found["name"]
            raise ConfigError(
                f"{name}={HIDDEN}: a sweep would keep this secret in multirun.yaml; put it into an environment "
                f"variable and write {name}='${{oc.env:NAME}}'"
            )


def keep_config(config: Mapping[str, Any], run_dir: Path) -> None:
    """Keep the resolved configuration beside the checkpoints, without its secrets; on rank 0.

    Args:
        config: the whole configuration, in plain types.
        run_dir: where `config.yaml` and the settings of the command line (`overrides.yaml`) are kept.
    """
    OmegaConf.save(OmegaConf.create(redacted(config)), run_dir / "config.yaml")
    if HydraConfig.initialized():
        given = [redacted_argument(argument) for argument in HydraConfig.get().overrides.task]
        OmegaConf.save(OmegaConf.create(given), run_dir / OVERRIDES_FILE)


def log_config(logger: "Logger | None", config: Mapping[str, Any], run_dir: Path) -> None:
    """Log the resolved configuration, without its secrets, which begins the W&B run; on rank 0.

    Args:
        logger: None for nothing.
        config: the whole configuration, in plain types.
        run_dir: where the id of an online W&B run is kept.
    """
    if logger is None:
        return
    given = sys.argv
    sys.argv = [given[0], *map(redacted_argument, given[1:])]  # W&B records them when its run begins, which is here
    try:
        logger.log_hyperparams(redacted(config))
    finally:
        sys.argv = given
    if wandb_logger := wandb_logger_of(logger):
        recipe = config["recipe"]
        wandb_logger.define_summaries({**SUMMARIES, recipe["monitor"]: recipe["mode"]})
        if wandb_logger.mode == "online":
            (run_dir / RUN_ID_FILE).write_text(wandb_logger.experiment.id)


@contextmanager
def closing(logger: "Logger | None") -> Iterator[None]:
    """Finish a W&B run in any case, with the exit code that this process will have."""
    code = 0
    try:
        yield
    except BaseException as error:
        code = getattr(error, "exit_code", 1)
        raise
    finally:
        if wandb_logger := wandb_logger_of(logger):
            wandb_logger.finish(code)


def wandb_logger_of(logger: "Logger | None") -> "RunLogger | None":
    """`logger` if it is a W&B run; without importing wandb where it is not used, since it need not be installed."""
    if logger is None or "wandb" not in sys.modules:
        return None
    from lion_lightning.tracking.wandb import RunLogger

    return logger if isinstance(logger, RunLogger) else None


def quiet_libraries() -> None:
    """Leave out what Lightning, Hydra and transformers say about themselves in every run."""
    import datasets
    import transformers

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # what it says of a target, ConfigError says too
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")  # Lightning 2.6 on a newer torch
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
