"""Sends SIGTERM to a run of two processes under torchrun's agent, at random moments: it saves and ends in seconds.

    python scripts/signal_test.py --repeats 20 --seed 1

One run is stopped again and again and goes on by `resume=auto` each time: by a signal to the agent, to rank 0, to rank
1, to both, twice, in a save and in a validation. Each time every process must end within ten seconds and leave a valid
checkpoint; at the end the run must equal one that was never stopped, bit for bit. Agent and ranks are real processes;
they are forked from this one, which has the libraries loaded, and talk by gloo.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import transformers.models.vit  # noqa: F401 (a run imports these three by name; here once for all attempts)
from lightning.pytorch import Callback, Trainer
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import lion_lightning.guard.callback
import lion_lightning.recipes.image_classification.module  # noqa: F401
from lion_lightning.__main__ import composed
from lion_lightning.training.checkpoint.files import TEMPORARY_PREFIX, load, newest_valid, verify
from lion_lightning.training.run import run
from lion_lightning.training.signals import EXIT_CODE_OFFSET

LIMIT_SECONDS, STARTUP_SECONDS = 10.0, 60.0
SETTINGS = (
    "recipe=image_classification", "logger=none", "export=false", "data.batch_size=16", "trainer.val_check_interval=20",
    "trainer=ddp", "trainer.accelerator=cpu", "guard.min_batch_size=0", "checkpoint.every_n_steps=2",
    "model.config.hidden_size=64", "model.config.num_hidden_layers=2", "model.config.intermediate_size=128",
)  # fmt: skip


class Marks(Callback):
    """Tells the script outside where a rank is: files named after its process, after steps, and while it validates."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        (self.folder / f"rank-{trainer.global_rank}").write_text(str(os.getpid()))

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        (self.folder / "validating").touch()

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        (self.folder / "validating").unlink(missing_ok=True)


def rank(folder: Path, steps: int) -> None:
    """One rank, quiet."""
    torch.set_num_threads(1)
    cfg = composed([*SETTINGS, f"run_dir={folder}", f"trainer.max_steps={steps}", "resume=auto"])
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        run(cfg, [Marks(folder)])


def agent(folder: Path, steps: int) -> None:
    """What torchrun is: an agent that starts two ranks and watches them."""
    config = LaunchConfig(
        1,
        1,
        2,
        run_id=folder.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,  # torchrun's own default
        start_method="fork",
    )
    try:
        elastic_launch(config, rank)(folder, steps)
    except SignalException as stopped:
        sys.exit(EXIT_CODE_OFFSET + stopped.sigval)
    except ChildFailedError as failed:
        sys.exit(max(failure.exitcode for failure in failed.failures.values()))


def launch(folder: Path, steps: int) -> BaseProcess:
    folder.mkdir(exist_ok=True)
    for mark in (*folder.glob("rank-*"), folder / "validating"):
        mark.unlink(missing_ok=True)
    process = get_context("fork").Process(target=agent, args=(folder, steps))
    process.start()
    return process


def wait_for(condition: Callable[[], Any], process: BaseProcess, what: str) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while not condition():
        if not process.is_alive() or time.monotonic() > deadline:
            process.kill()
            sys.exit(f"waited in vain for {what}; the agent's exit code is {process.exitcode}")
        time.sleep(0.001)


def ranks(folder: Path) -> list[int]:
    """Process numbers of the ranks that have made a step."""
    return [int(text) for path in sorted(folder.glob("rank-*")) if (text := path.read_text())]


def saving(folder: Path) -> bool:
    return any((folder / "checkpoints").glob(f"{TEMPORARY_PREFIX}*"))


def never(folder: Path) -> bool:
    return True


Case = tuple[str, Callable[[int, list[int]], list[int]], Callable[[Path], Any]]
CASES: list[Case] = [
    ("the agent", lambda agent, ranks: [agent], never),
    ("rank 0", lambda agent, ranks: ranks[:1], never),
    ("rank 1", lambda agent, ranks: ranks[1:], never),
    ("both ranks", lambda agent, ranks: ranks, never),
    ("the agent, twice", lambda agent, ranks: [agent, agent], never),
    ("rank 1, twice", lambda agent, ranks: [ranks[1], ranks[1]], never),
    ("rank 0, in a save", lambda agent, ranks: ranks[:1], saving),
    ("the agent, in a save", lambda agent, ranks: [agent], saving),
    ("rank 1, in a validation", lambda agent, ranks: ranks[1:], lambda folder: (folder / "validating").exists()),
    ("the agent, in a validation", lambda agent, ranks: [agent], lambda folder: (folder / "validating").exists()),
]


def is_running(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def stop_once(case: Case, folder: Path, steps: int, chance: random.Random) -> tuple[float, int]:
    """Stop the run as `case` says; the seconds until all processes had ended, and the step that was saved."""
    name, targets, moment = case
    process = launch(folder, steps)
    wait_for(lambda: len(ranks(folder)) == 2, process, "two ranks")
    time.sleep(chance.uniform(0, 0.3))
    wait_for(lambda: moment(folder), process, name)
    pids = ranks(folder)
    sent = time.monotonic()
    for target in targets(process.pid or 0, pids):
        os.kill(target, signal.SIGTERM)
        time.sleep(chance.uniform(0, 0.01))
    while any(is_running(pid) for pid in (process.pid or 0, *pids)) and time.monotonic() - sent < LIMIT_SECONDS:
        process.join(0.01)
    took = time.monotonic() - sent
    if took >= LIMIT_SECONDS:
        for pid in (process.pid or 0, *pids):
            os.kill(pid, signal.SIGKILL)
        sys.exit(f"{name}: still running after {LIMIT_SECONDS:.0f} s: agent {process.is_alive()}, ranks {pids}")
    path, wrong = newest_valid(folder / "checkpoints")
    if path is None or wrong:
        sys.exit(f"{name}: {wrong}")
    return took, int(load(path)["global_step"])


def finish(folder: Path, steps: int) -> dict[str, Any]:
    process = launch(folder, steps)
    process.join()
    if process.exitcode:
        sys.exit(f"the run ended with {process.exitcode}")
    verify(folder / "checkpoints/last.ckpt")
    return load(folder / "checkpoints/last.ckpt")


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether weights and momenta are equal in every bit."""
    tensors = [(left["state_dict"][name], right["state_dict"][name]) for name in left["state_dict"]]
    for one, two in zip(left["optimizer_states"], right["optimizer_states"], strict=True):
        tensors += [
            (one["state"][key][name], two["state"][key][name]) for key in one["state"] for name in one["state"][key]
        ]
    return all(torch.equal(one, two) for one, two in tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="how often the run is stopped (default 20)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default 1)")
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps of the run (default 800)")
    chosen = parser.parse_args()
    chance, folder = random.Random(chosen.seed), Path(tempfile.mkdtemp(prefix="signal-test-"))
    try:
        slowest = 0.0
        for number in range(chosen.repeats):
            case = CASES[number % len(CASES)]
            took, step = stop_once(case, folder / "stopped", chosen.steps, chance)
            slowest = max(slowest, took)
            print(f"SIGTERM to {case[0]}: all ended after {took:.1f} s, step {step} saved", flush=True)
        equal = same(finish(folder / "stopped", chosen.steps), finish(folder / "whole", chosen.steps))
        print(f"{chosen.repeats} stops, seed {chosen.seed}: the slowest took {slowest:.1f} s;")
        print(f"  resumed to the end: {'equal in every bit' if equal else 'DIFFERENT'} to the run without a stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
