"""Kills a training run over and over with SIGKILL, and fills its disk: a valid checkpoint always remains.

    python scripts/kill_test.py --kills 50 --seed 1

Every attempt is a process of its own that runs `resume=auto` and is killed at a random moment. After each kill the
newest checkpoint must be whole and no older than before; at the end the run must equal one that was never killed, bit
for bit. The temporary directory (TMPDIR) is on another file system than the run. Then the same on a tmpfs that is too
small (needs the right to mount; else the kernel's limit on the size of files stands in), which is enlarged in the end.
"""

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import transformers.models.vit  # noqa: F401 (a run imports these three by name; here once for all attempts)

import lion_lightning.guard.callback
import lion_lightning.recipes.image_classification.module  # noqa: F401
from lion_lightning.__main__ import composed
from lion_lightning.training.checkpoint.files import (
    TEMPORARY_PREFIX,
    CheckpointFailed,
    load,
    newest_valid,
    sweep_temporaries,
    verify,
)
from lion_lightning.training.run import run

OTHER_FILE_SYSTEM = Path("/dev/shm")
SETTINGS = (
    "recipe=image_classification", "logger=none", "export=false", "data.batch_size=16", "trainer.val_check_interval=50",
    "trainer.accelerator=cpu", "guard.min_batch_size=0", "checkpoint.every_n_steps=1", "model.config.hidden_size=64",
    "model.config.num_hidden_layers=2", "model.config.intermediate_size=128", "model.config.hidden_dropout_prob=0.1",
)  # fmt: skip
DISK_MEBIBYTES, CHECKPOINTS_THAT_FIT = 64, 5
LONGEST_DELAY_SECONDS, LONGEST_SAVE_SECONDS = 0.25, 0.01


def train(folder: Path, steps: int) -> None:
    """One attempt, quiet; ends with 74 where a checkpoint cannot be written."""
    torch.set_num_threads(1)
    cfg = composed([*SETTINGS, f"run_dir={folder}", f"trainer.max_steps={steps}", "resume=auto"])
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            run(cfg)
    except CheckpointFailed as error:
        print(f"  {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def attempt(folder: Path, steps: int) -> BaseProcess:
    process = get_context("fork").Process(target=train, args=(folder, steps))
    process.start()
    return process


def newest(folder: Path) -> int:
    """The step of the newest valid checkpoint; 0 for none."""
    path, _ = newest_valid(folder / "checkpoints")
    return 0 if path is None else verify(path).global_step


def last_file(folder: Path) -> int:
    """When `last.ckpt` was last replaced, in nanoseconds; 0 for never."""
    path = folder / "checkpoints/last.ckpt"
    return path.stat().st_mtime_ns if path.exists() else 0


def kill_once(folder: Path, steps: int, chance: random.Random, in_a_save: bool) -> bool:
    """Kill an attempt that has saved something, at any moment or in a save; whether it was in the middle of one."""
    before, process = last_file(folder), attempt(folder, steps)
    while process.is_alive() and last_file(folder) == before:
        time.sleep(0.002)
    if in_a_save:
        while process.is_alive() and not _half_written(folder):
            pass
    process.join(chance.uniform(0, LONGEST_SAVE_SECONDS if in_a_save else LONGEST_DELAY_SECONDS))
    process.kill()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        sys.exit(f"the run ended with {process.exitcode} before it was killed: give it more --steps")
    return bool(_half_written(folder))


def _half_written(folder: Path) -> list[Path]:
    return list((folder / "checkpoints").glob(f"{TEMPORARY_PREFIX}*"))


def differences(left: Any, right: Any, where: str = "") -> list[str]:
    """What of two checkpoints is not the same in every bit."""
    if isinstance(left, dict):
        names = [f"{where}.{key}" for key in left.keys() ^ right.keys() if key != "differentiable"]  # torch adds that
        return names + [
            d for key in left.keys() & right.keys() for d in differences(left[key], right[key], f"{where}.{key}")
        ]
    if isinstance(left, list | tuple):
        pairs = enumerate(zip(left, right, strict=True))
        return [found for number, (one, two) in pairs for found in differences(one, two, f"{where}.{number}")]
    if isinstance(left, torch.Tensor):
        return [] if torch.equal(left, right) else [where]
    return [] if left == right or left != left else [where]


def compare(folder: Path, reference: Path) -> str:
    whole, parts = (load(run_folder / "checkpoints/last.ckpt") for run_folder in (reference, folder))
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")
    found = [line for key in kept for line in differences(whole[key], parts[key], key)]
    best = [checkpoint["callbacks"]["RunCheckpoint"] for checkpoint in (whole, parts)]
    return "equal in every bit" if not found and best[0] == best[1] else f"DIFFERENT: {', '.join(found[:3])} {best}"


def kills(folder: Path, reference: Path, count: int, seed: int, steps: int) -> None:
    chance, in_a_save, step = random.Random(seed), 0, 0
    for number in range(count):
        in_a_save += kill_once(folder, steps, chance, in_a_save=number % 2 == 1)
        before, step = step, newest(folder)
        if step == 0 or step < before:
            wrong = newest_valid(folder / "checkpoints")[1]
            sys.exit(f"kill {number + 1}: step {before} was there before, now {step}: {wrong}")
    finish(folder, steps)
    print(f"{count} kills, {in_a_save} of them in the middle of a save, seed {seed}: a valid checkpoint after each,")
    print(f"  the last at step {step} of {steps}; resumed to the end: {compare(folder, reference)}")


def finish(folder: Path, steps: int) -> None:
    process = attempt(folder, steps)
    process.join()
    if process.exitcode:
        sys.exit(f"the resumed run ended with {process.exitcode}")


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[str]:
    """A file system of `size` bytes at `folder`, which is enlarged by `mount -o remount,size=`."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield (
            f"a tmpfs of {size:,} bytes" if mounted else "files limited by RLIMIT_FSIZE (mounting is not allowed here)"
        )
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def full_disk(folder: Path, reference: Path, steps: int) -> None:
    size = verify(reference / "checkpoints/last.ckpt").size
    with small_disk(folder, int(CHECKPOINTS_THAT_FIT * size)) as disk:
        is_tmpfs = disk.startswith("a tmpfs")
        filler = folder / "filler"
        kill_once(folder / "run", steps, random.Random(1), in_a_save=False)
        sweep_temporaries(folder / "run/checkpoints")
        if is_tmpfs:  # something else fills the disk
            filler.write_bytes(bytes(max(0, shutil.disk_usage(folder).free - size // 2)))
        else:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))
        process = attempt(folder / "run", steps)
        process.join()
        if process.exitcode != CheckpointFailed.exit_code:
            sys.exit(f"the disk was full and the run ended with {process.exitcode}")
        step = newest(folder / "run")
        if is_tmpfs:
            filler.unlink()
            subprocess.run(["mount", "-o", f"remount,size={DISK_MEBIBYTES}m", str(folder)], check=True)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        finish(folder / "run", steps)
        print(f"full disk ({disk}): ended with {process.exitcode}, step {step} is valid;")
        print(f"  with room again, resumed to the end: {compare(folder / 'run', reference)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how often the run is killed (default 50)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default 1)")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of the run (default 600)")
    chosen = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill-test-"))
    if OTHER_FILE_SYSTEM.is_dir():
        os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(dir=OTHER_FILE_SYSTEM)
        same = os.stat(tempfile.gettempdir()).st_dev == os.stat(folder).st_dev
        print(f"temporary files on {OTHER_FILE_SYSTEM}, {'the same' if same else 'another'} file system than the run")
    try:
        finish(folder / "reference", chosen.steps)
        kills(folder / "killed", folder / "reference", chosen.kills, chosen.seed, chosen.steps)
        full_disk(folder / "full", folder / "reference", chosen.steps)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
