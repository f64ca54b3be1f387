"""The objects of a run, each built from its part of the configuration, with a ConfigError for what cannot work.

`_target_` nodes are built from an allowlist. Hydra's own blocklist lets `torch.load` through, so a config from a
stranger could run code. Here a target must resolve to a class (or a function of `hyperparams`) that was *defined* in a
module that recipes are made of, or in a package that the user trusts (`trust=[PACKAGE]` on the command line, or the
variable LION_LIGHTNING_TRUST): an alias of `os.system` inside an allowed module is refused.
"""

import functools
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
from huggingface_hub.errors import StrictDataclassError
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lion_lightning.command_line import TRUST, trusted
from lion_lightning.data.stream import StreamDataModule
from lion_lightning.errors import ConfigError, check_flag, check_number, configuring
from lion_lightning.training.checkpoint.files import DurableCheckpointIO
from lion_lightning.training.checkpoint.policy import RunCheckpoint
from lion_lightning.training.checkpoint.sharded import ShardedStrategy
from lion_lightning.training.logging_setup import RUN_ID_FILE
from lion_lightning.training.performance import PRECISION_VARIABLE, choose_precision
from lion_lightning.training.report import near
from lion_lightning.training.signals import StopFlag

LAUNCHERS = ("LOCAL_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # set by launchers for their processes
LABEL = "name"  # every group file has one: a label for people and run names, never an argument
ALLOWED_MODULES = (
    "lion_lightning.optim.lion.",
    "lion_lightning.optim.muon.",
    "lion_lightning.hyperparams.",
    "lion_lightning.guard.callback.",
    "lion_lightning.guard.rules.",
    "lion_lightning.tracking.wandb.",
    "lion_lightning.training.callbacks.",
    "lion_lightning.training.search_split.",
    "lion_lightning.recipes.",
    "torch.optim.",
    "torch.nn.",
    "optimi.",
    "transformers.models.",
    "lightning.pytorch.callbacks.",
    "lightning.pytorch.loggers.",
)
"""Where a class may be defined that a configuration names; of other modules of ours nothing is built."""
ALLOWED_FUNCTIONS = ("lion_lightning.hyperparams.",)
"""Where a function may be defined: elsewhere functions write files or run programs."""
IMPORTED = (
    *(f"lion_lightning.{name}." for name in ("optim", "hyperparams", "guard", "tracking", "training", "recipes")),
    "torch.",
    "optimi.",
    "transformers.",
    "lightning.",
)
"""What is imported in search of a name: an import runs code, so nothing else is."""
PRECISIONS = ("auto", "32-true", "bf16-mixed", "bf16-true", "16-mixed", "64-true")
POSITIVE = ("max_steps", "val_check_interval", "accumulate_grad_batches", "num_nodes", "log_every_n_steps")
# Keys of `trainer` that are no arguments of Lightning's Trainer, or that `build_trainer` computes.
OWN_TRAINER_KEYS = (
    "name", "max_steps", "max_epochs", "val_check_interval", "strategy", "timeout_minutes", "check_replicas_every"
)  # fmt: skip


def instantiate(node: Any, **overrides: Any) -> Any:
    """Build what `node["_target_"]` names, with the node's other keys and `overrides` as keyword arguments.

    Args:
        node: a config node with `_target_`, optionally `_partial_: true`. Nested `_target_` nodes are built first.
        overrides: keyword arguments that are passed unchanged: never converted, never searched for targets.

    Raises:
        ConfigError: a target that does not exist, is not on the allowlist, or does not take one of the arguments.
    """
    if isinstance(node, DictConfig):
        node = OmegaConf.to_container(node, resolve=True)
    if isinstance(node, list):
        return [instantiate(item) for item in node]
    if not isinstance(node, Mapping):
        return node
    if "_target_" not in node:
        return {key: instantiate(item) for key, item in node.items()}
    target, partial = resolve(node["_target_"]), bool(node.get("_partial_"))
    arguments = {key: instantiate(item) for key, item in node.items() if key not in ("_target_", "_partial_", LABEL)}
    arguments.update(overrides)
    signature = inspect.signature(target)
    try:
        signature.bind_partial(**arguments) if partial else signature.bind(**arguments)
    except TypeError as error:
        allowed = ", ".join(name for name in signature.parameters if name != "self")
        raise ConfigError(f"{node['_target_']}: {error}; it takes {allowed}") from error
    return functools.partial(target, **arguments) if partial else target(**arguments)


def resolve(path: str) -> Callable[..., Any]:
    """The class or function that `path` names, if it is on the allowlist; ConfigError if not."""
    if not isinstance(path, str):
        raise ConfigError(f"_target_={path!r} cannot be imported: it must be the dotted name of a class or function")
    trust = tuple(f"{package}." for package in trusted())
    if path.startswith("recipes.") and not any(name.startswith("recipes.") for name in trust):
        path = f"lion_lightning.{path}"  # the name in configurations of earlier versions
    target = None
    if path.startswith((*IMPORTED, *trust)):
        try:
            target = hydra.utils.get_object(path)
        except Exception as error:
            reason = error.__cause__ or error  # Hydra repeats the path before the reason
            raise ConfigError(f"_target_={path!r} cannot be imported: {reason}".splitlines()[0]) from error
    home = f"{getattr(target, '__module__', None)}."
    is_private = path.startswith("lion_lightning.") and any(part.startswith("_") for part in path.split("."))
    is_allowed = (
        (inspect.isclass(target) and home.startswith((*ALLOWED_MODULES, *trust)))
        or (inspect.isfunction(target) and home.startswith((*ALLOWED_FUNCTIONS, *trust)))
    ) and not is_private
    if not is_allowed:
        names = ", ".join(module.rstrip(".") for module in (*ALLOWED_MODULES, *trust))
        text = f"_target_={path!r} is not allowed: it must be a class defined in {names}"
        package = path.split(".")[0]
        if package not in {name.split(".")[0] for name in IMPORTED} | sys.stdlib_module_names:
            text += f"; if {package} is yours, trust=[{package}] on the command line or {TRUST}={package} allows it"
        raise ConfigError(text)
    assert target is not None
    return target


def check(cfg: DictConfig) -> None:
    """Raise ConfigError for the first setting that cannot work on this machine, before anything is built."""
    for name in POSITIVE:
        check_number(f"trainer.{name}", cfg.trainer[name], "[1, inf)", whole=True)
    check_number("trainer.max_epochs", cfg.trainer.max_epochs, "(0, inf)", or_null=True)
    check_number("trainer.gradient_clip_val", cfg.trainer.gradient_clip_val, "[0, inf)", or_null=True)
    check_number("trainer.timeout_minutes", cfg.trainer.timeout_minutes, "(0, inf)")
    check_number("trainer.check_replicas_every", cfg.trainer.check_replicas_every, "[0, inf)", whole=True)
    check_number("seed", cfg.seed, "[0, 4294967295]", whole=True)
    check_flag("export", cfg.export)
    if cfg.trainer.deterministic != "warn":
        check_flag("trainer.deterministic", cfg.trainer.deterministic)
    precision = cfg.trainer.precision
    if precision not in PRECISIONS:
        raise ConfigError(f"trainer.precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    gpus, cpus = torch.cuda.device_count(), os.cpu_count() or 1
    counts = {"gpu": gpus, "cuda": gpus, "mps": int(torch.backends.mps.is_available()), "cpu": cpus}
    counts["auto"] = gpus or counts["mps"] or cpus
    accelerator, devices = cfg.trainer.accelerator, cfg.trainer.devices
    if accelerator not in counts:
        raise ConfigError(f"trainer.accelerator must be one of {', '.join(sorted(counts))}, got {accelerator!r}")
    available = counts[accelerator]
    if not available:
        raise ConfigError(f"trainer.accelerator={accelerator}: this machine has none; try auto or cpu")
    if devices != "auto" and not (type(devices) is int and 1 <= devices <= available):
        raise ConfigError(f"trainer.devices={devices}: accelerator={accelerator} has 1 to {available} here")
    if precision == "16-mixed" and (accelerator == "cpu" or (accelerator == "auto" and not (gpus or counts["mps"]))):
        raise ConfigError("trainer.precision=16-mixed needs a GPU; on a CPU use bf16-mixed or 32-true")
    multirun = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    started_outside = "LOCAL_RANK" in os.environ or os.environ.get("SUBMITIT_EXECUTOR") == "slurm"
    if multirun and devices != 1 and not started_outside:
        raise ConfigError(
            f"-m with trainer.devices={devices}: every process would run the whole sweep; "
            "set trainer.devices=1, or start one job at a time under torchrun"
        )


def effective_batch_size(cfg: DictConfig) -> int:
    """Samples of an optimizer step, over all micro-batches and ranks."""
    devices = cfg.trainer.devices if isinstance(cfg.trainer.devices, int) else 1
    return cfg.data.batch_size * cfg.trainer.accumulate_grad_batches * devices * cfg.trainer.num_nodes


def settle_precision(cfg: DictConfig) -> str:
    """Replace `trainer.precision=auto` by what it stands for on this machine, and return the reason in words.

    The configuration that is logged, compared and kept in checkpoints then names the precision that was used.
    """
    if cfg.trainer.precision != "auto":
        return "as configured"
    is_alone = not started_by_launcher() and cfg.trainer.devices == 1 and cfg.trainer.num_nodes == 1
    name, reason = choose_precision(cfg.trainer.accelerator, is_alone)
    if name not in PRECISIONS[1:]:
        raise ConfigError(f"{PRECISION_VARIABLE} must be one of {', '.join(PRECISIONS[1:])}, got {name!r}")
    cfg.trainer.precision = name
    return f"auto: {reason}"


def max_steps(cfg: DictConfig, data: StreamDataModule) -> int:
    """Optimizer steps of the run; `trainer.max_epochs`, if given, in steps."""
    if cfg.trainer.max_epochs is None:
        return cfg.trainer.max_steps
    return math.ceil(cfg.trainer.max_epochs * data.num_train_samples / effective_batch_size(cfg))


def build_data(cfg: DictConfig) -> StreamDataModule:
    """The data module, prepared and set up."""
    with configuring("data"):
        data = instantiate(cfg.data)
    if not isinstance(data, StreamDataModule):
        raise ConfigError(f"data={cfg.data.name}: {type(data).__name__} is not a StreamDataModule")
    data.prepare_data()
    data.setup("fit")
    data.check_samples(effective_batch_size(cfg))
    return data


def build_module(cfg: DictConfig, data: StreamDataModule) -> Any:
    """The recipe's module for `data`, with its optimizer and schedule, each tried once: bad options fail now."""
    for name in ("lr", "weight_decay", "momentum", "eps"):
        if isinstance(cfg.optim.get(name), bool):  # which torch takes for 0 or 1
            raise ConfigError(f"optim.{name} must be a number, got {cfg.optim[name]!r}")
    with configuring("optim"):
        factory = instantiate(cfg.optim)
        shapes = {"weight": (2, 2), "bias": (2,)}  # ones, since random numbers would change the run's
        params = [(name, nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]
        factory([{"name": "decay", "params": params}])
    with configuring("schedule"):
        schedule = instantiate(cfg.schedule)
        schedule(cfg.trainer.max_steps)
    for name, value in cfg.model.config.items():
        if "dropout" in name and not isinstance(value, str):  # `transformers` looks at the type alone
            check_number(f"model.config.{name}", value, "[0, 1)", or_null=True)
        if name.startswith("num_") and isinstance(value, int):
            check_number(f"model.config.{name}", value, "[0, inf)", whole=True)
    with configuring("model.config", (ValueError, TypeError, StrictDataclassError)):
        config = instantiate(cfg.model.config)
    with configuring("recipe.module", (ValueError, TypeError, RuntimeError)):  # the last for shapes that cannot be
        return instantiate(
            cfg.recipe.module, config=config, data=data, optimizer_factory=factory, schedule=schedule, seed=cfg.seed
        )


def build_callbacks(cfg: DictConfig, group: str) -> list[Callback]:
    """The callbacks of a group of the configuration: `guard`, or `callbacks`, those that the command line adds."""
    nodes = [cfg.guard] if group == "guard" else cfg.get("callbacks", {}).values()
    with configuring(group):
        return [instantiate(node) for node in nodes if "_target_" in node]


def build_logger(cfg: DictConfig, continues: Path | None = None) -> Logger | None:
    """The logger; where the run continues from a checkpoint of its own folder, what was logged there stays.

    One of W&B goes on with the online run that this folder has had. Lightning's CSV logger begins by removing the
    metrics.csv of its folder, so it gets another, named after the checkpoint.
    """
    if "_target_" not in cfg.logger:
        return None
    try:
        if cfg.logger.name == "wandb":
            file = Path(cfg.run_dir) / RUN_ID_FILE
            run_id = file.read_text().strip() if continues and file.is_file() else None
            return instantiate(cfg.logger, run_id=run_id or None)
        if cfg.logger.name == "csv" and continues:
            return instantiate(cfg.logger, name="csv", version=f"from-{continues.stem}")
        return instantiate(cfg.logger, name=cfg.logger.name)  # of a file logger, the folder it writes to
    except (ModuleNotFoundError, ValueError) as error:
        raise ConfigError(f"logger={cfg.logger.name}: {error}") from error


def build_checkpoint(cfg: DictConfig, stop: StopFlag) -> RunCheckpoint:
    """The policy of checkpoints; each keeps the facts that a resumed run must have again, and what it may change."""
    whole: Any = OmegaConf.to_container(cfg, resolve=True)
    facts = {
        "recipe": cfg.recipe.name,
        "model": cfg.model.name,
        "data": cfg.data.name,
        "seed": cfg.seed,
        "optim": whole["optim"],
        "effective batch size": effective_batch_size(cfg),
        "precision": cfg.trainer.precision,
    }
    settings = {
        "schedule": whole["schedule"],
        "recipe.module": whole["recipe"]["module"],
        "guard": {name: value for name, value in whole["guard"].items() if name != "trace"},
        "trainer.gradient_clip_val": cfg.trainer.gradient_clip_val,
    }
    folder, recipe = Path(cfg.run_dir) / "checkpoints", cfg.recipe
    with configuring("checkpoint"):
        return RunCheckpoint(
            folder, recipe.monitor, recipe.mode, stop=stop, facts=facts, settings=settings, **cfg.checkpoint
        )


def build_trainer(cfg: DictConfig, logger: Logger | None, callbacks: list[Callback], bar: bool) -> pl.Trainer:
    """Lightning's Trainer for the run.

    Args:
        cfg: the whole configuration, with `trainer.max_steps` final.
        logger: None for no logging.
        callbacks: in the order in which they are called.
        bar: whether one of them is a progress bar.
    """
    steps = cfg.trainer.max_steps
    try:
        return pl.Trainer(
            **{key: value for key, value in cfg.trainer.items() if key not in OWN_TRAINER_KEYS},
            strategy=_build_strategy(cfg),
            max_steps=steps,
            val_check_interval=min(cfg.trainer.val_check_interval, steps) * cfg.trainer.accumulate_grad_batches,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_progress_bar=bar,
            default_root_dir=cfg.run_dir,
            logger=logger or False,
            callbacks=callbacks,
            plugins=[DurableCheckpointIO()],
        )
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise ConfigError(f"trainer: {error}") from error


def started_by_launcher() -> bool:
    """Whether a launcher started this process as one of several."""
    return any(variable in os.environ for variable in LAUNCHERS)


def _build_strategy(cfg: DictConfig) -> Strategy | str:
    """The strategy that `trainer.strategy` names; names other than ddp and fsdp2 are Lightning's own."""
    name = cfg.trainer.strategy
    if name not in ("ddp", "fsdp2"):
        return name
    if not started_by_launcher():
        raise ConfigError(
            f"trainer.strategy={name}: start its processes with torchrun --standalone --nproc-per-node=N "
            "-m lion_lightning ..., or with srun (docs/scaling.md)"
        )
    timeout = timedelta(minutes=cfg.trainer.timeout_minutes)
    if name == "ddp":
        return DDPStrategy(gradient_as_bucket_view=True, timeout=timeout)
    return ShardedStrategy(timeout=timeout)


def _settings_source() -> str:
    """The file with the optimizer's options, how many trials on what chose them, and if the command line sets some."""
    hydra_config = HydraConfig.get()
    choices = hydra_config.runtime.choices
    names = [f"tuned/{choices.get('tuned')}.yaml", f"optim/{choices.get('optim')}.yaml"]
    folders = [Path(source.path) for source in hydra_config.runtime.config_sources if source.schema == "file"]
    found = next((folder / name for name in names for folder in folders if (folder / name).is_file()), None)
    if found is None:
        return "the command line"
    comment = " ".join(line.lstrip("# ") for line in found.read_text(encoding="utf-8").splitlines() if line[:1] == "#")
    trials = re.search(r"best of \d+ trials", comment)
    task = re.search(r"\w+, ([\w (),.]+), ([\w.-]+), batch \d", comment)  # as `lion-tune` writes it
    searched = f" ({trials[0]}{f' with {task[2]} on {task[1]}' if task else ''})" if trials else ""
    ends = [", and the command line"] if any(item.startswith("optim.") for item in hydra_config.overrides.task) else []
    return "".join([near(found), searched, *ends])


def describe(
    cfg: DictConfig, data: StreamDataModule, module: Any, trainer: pl.Trainer, resumed: Path | None, precision: str
) -> dict[str, str]:
    """Lines for the panel at the start of a run and for the model card.

    Args:
        cfg: the whole configuration.
        data, module, trainer: what was built from it.
        resumed: the checkpoint it goes on from.
        precision: where the precision comes from.
    """
    where = f"{cfg.data.name} from {cfg.data.path}" if cfg.data.get("path") else cfg.data.name
    settings = ", ".join(f"{key} {value}" for key, value in cfg.optim.items() if key in ("lr", "betas", "weight_decay"))
    lines = {"optimizer": f"{cfg.optim.name}: {settings}; {cfg.schedule.name} schedule over {trainer.max_steps} steps"}
    if HydraConfig.initialized():
        lines["settings from"] = _settings_source()
    if "lr" in cfg.optim and cfg.optim.get("weight_decay") and cfg.optim.name != "sgd":  # whose decay is coupled
        share = float(cfg.optim.lr) * float(cfg.optim.weight_decay)
        lines["decay"] = f"lr x weight_decay: a step at the peak rate takes {100 * share:.2g} % off a weight"
    if os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE":
        lines["threads"] = "sleep while they wait (OMP_WAIT_POLICY=PASSIVE), which is faster on a busy machine"
    micro = (
        f"{cfg.data.batch_size} x {cfg.trainer.accumulate_grad_batches} micro-batches x {trainer.world_size} devices"
    )
    return {
        "data": where,
        **getattr(data, "describe", dict)(),  # of the recipes' data modules
        **getattr(module, "describe", dict)(),
        "effective batch": f"{effective_batch_size(cfg)} samples ({micro})",
        **lines,
        "precision": f"{cfg.trainer.precision} on {trainer.strategy.root_device.type} ({precision})",
        "goes on from": near(resumed) if resumed else "nothing: it starts afresh",
        "kept in": near(cfg.run_dir),
    }
