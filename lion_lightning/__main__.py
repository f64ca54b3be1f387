"""The command line: `train.py`, `python -m lion_lightning` and `lion-train`.

Command line -> Hydra configuration -> `training.run`; mistakes are reported in one line. Nothing heavy is imported
before there is something to run, so `--help`, `--cfg` and tab completion answer at once.
"""

import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from lion_lightning.command_line import (
    check_arguments,
    explain,
    overrides_of,
    run_folder,
    suggestion,
    take_trusted,
    text_of,
)
from lion_lightning.errors import ConfigError
from lion_lightning.training.logging_setup import refuse_secrets_of_a_sweep

EXIT_USAGE = 2
OF_EVALUATION = ("mode", "ckpt", "input", "run_dir", "hydra")
"""Settings of `mode=eval` and `mode=predict` that change nothing of the run."""
BUSY = 1.5  # load per core
UNWRITABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EEXIST, errno.ENOTDIR
)  # fmt: skip
failed_jobs: list[str] = []
"""Jobs of a sweep in this process that have failed, each with its error."""
WANTS_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"
_HERE = Path(__file__).resolve().parent
# In a checkout conf/ lies beside the package, in a wheel inside it.
CONFIG_FOLDER = next(folder for folder in (_HERE / "conf", _HERE.parent / "conf") if (folder / "train.yaml").is_file())


@hydra.main(version_base="1.3", config_path=str(CONFIG_FOLDER), config_name="train")
def train(cfg: DictConfig) -> float:
    """Run what `cfg` describes; returns the best value of the recipe's metric, which Hydra's sweepers optimise."""
    from lion_lightning.training.signals import TrainingInterrupted

    try:
        return runner(cfg)(cfg)
    except TrainingInterrupted as stop:
        print(f"{_rank()}{stop}", file=sys.stderr)
        raise
    except Exception as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            job = HydraConfig.get().job
            told = (str(error).strip() or type(error).__name__).splitlines()[0]
            failed_jobs.append(f"job {job.num} ({job.override_dirname.replace(',', ' ')}): {told}")
            raise  # Hydra notes it, goes on with the other jobs, and raises the first error at the end
        report_error(error)


def composed(settings: Sequence[str]) -> DictConfig:
    """The configuration that a command line with these settings has."""
    with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        return hydra.compose("train", list(settings))


def runner(cfg: DictConfig) -> Callable[[DictConfig], float]:
    """What runs a configuration, by its `mode`; ConfigError for a `mode` that is none, and for settings of another."""
    mode = cfg.mode
    if mode == "train":
        for name in ("ckpt", "input"):
            if cfg[name] is not None:
                raise ConfigError(f"{name}={cfg[name]} belongs to mode=eval and mode=predict; resume=PATH trains on")
        from lion_lightning.training.run import run

        return run
    if mode not in ("eval", "predict"):
        raise ConfigError(f"mode must be train, eval or predict, got {mode!r}")
    if mode == "eval":
        from lion_lightning.commands.evaluate import evaluate

        return evaluate
    from lion_lightning.commands.predict import predict

    return predict


def main() -> None:
    """Run the command line.

    Exit codes: 0 the run is done; 1 a crash, with its traceback; 2 a configuration that cannot work; 42 the guard
    stopped the run; 74 a checkpoint could not be written; 130, 138, 143 SIGINT, SIGUSR1 or SIGTERM ended it, saved.
    """
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > BUSY * (os.cpu_count() or 1):
        # torch's threads sleep while they wait: several times as fast on a busy machine, 4 to 20 % slower alone.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported
    # Without this Hydra prints an excerpt of its own and hides the exception from us.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        if "--explain" in sys.argv:
            print(explain(take_trusted([word for word in sys.argv[1:] if word != "--explain"]), CONFIG_FOLDER))
            return
        sys.argv[1:] = take_trusted(sys.argv[1:])
        refuse_secrets_of_a_sweep(sys.argv[1:])
        check_arguments(sys.argv[1:], CONFIG_FOLDER)
        given = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
        more = []
        is_training = given.get("mode", "train") == "train"
        settings = [word for word in sys.argv[1:] if word[:1] == "~" or ("=" in word and word[:1] != "-")]
        names = [word.lstrip("+~").partition("=")[0].split(".")[0] for word in settings]
        changes = [name for name in names if name not in OF_EVALUATION]
        if not is_training and "ckpt" in given and changes:
            # What the run was told comes first, so that its groups are chosen.
            kept = overrides_of(run_folder(text_of(f"ckpt={given['ckpt']}"))) or []
            more += [word for word in kept if word.partition("=")[0] not in given]
        folder = given.get("run_dir") or (None if is_training else "outputs/${mode}/${run_stamp:}")
        if folder and "hydra.run.dir" not in given:  # Hydra's log goes there too, and it makes no folder
            more.append(f"hydra.run.dir={folder}")
        # Hydra reads settings that stand together alone; of two for one key the last counts, which is the one typed.
        flags = [word for word in sys.argv[1:] if word not in settings]
        sys.argv[1:] = [*flags, *more, *settings]
        train()
    except Exception as error:
        if failed_jobs:
            print("\n".join([f"{len(failed_jobs)} jobs failed", *failed_jobs]), file=sys.stderr)
        report_error(error)


def report_error(error: Exception) -> NoReturn:
    """Exit with one line for an error that its message explains; any other goes on with its traceback."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun prints at its end which rank failed first, and why
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
    code = getattr(error, "exit_code", None)
    if isinstance(error, HydraException | OmegaConfBaseException | ConfigError):
        code = EXIT_USAGE
    if isinstance(error, OSError) and error.errno in UNWRITABLE and error.filename:
        code = EXIT_USAGE
        elsewhere = (
            "; run_dir=FOLDER keeps a run elsewhere, data.cache_dir=FOLDER or the variable XDG_CACHE_HOME its prepared "
            "data"
        )
        could_read = not os.path.exists(error.filename) or os.access(error.filename, os.R_OK)
        error = ConfigError(f"{error.filename}: {error.strerror}{elsewhere if could_read else ''}")
    if code is None or WANTS_TRACEBACK:
        raise error
    if isinstance(error, MissingConfigException) and "hydra/launcher/submitit" in str(error):
        text = "hydra/launcher=slurm needs a plugin that is not installed: pip install hydra-submitit-launcher"
    else:
        text = str(error).split("Config search path")[0].split("set HYDRA_FULL_ERROR")[0]
        if meant := suggestion(error, CONFIG_FOLDER):
            text = text.split("To append to your config")[0].strip().rstrip(".") + meant
    print(f"{_rank()}error: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(code)


def _rank() -> str:
    """A prefix that names this rank, if there are several."""
    for rank, world_size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):  # of torchrun, of srun
        if rank in os.environ and int(os.environ.get(world_size, "1")) > 1:
            return f"[rank {os.environ[rank]}] "
    return ""


if __name__ == "__main__":
    main()
