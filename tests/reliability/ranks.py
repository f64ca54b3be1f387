"""One of several ranks; `torchrun ... -m tests.reliability.ranks JOBS FOLDER` runs each job and writes what it saw."""

import faulthandler
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import hydra
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer

import lion_lightning.training.run as run_module
from lion_lightning.__main__ import report_error
from lion_lightning.training.signals import TrainingInterrupted
from tests.reliability import resharding

LIMIT_SECONDS = 100  # far more than a job takes; less than torchrun is given, so that the job says where it waits
ROOT = Path(__file__).resolve().parent.parent.parent


class Observer(Callback):
    """Keeps the mean loss over all ranks and the samples of all ranks of each step, and does what a job asks for.

    Args:
        job: `signal`, `diverge`, `fail`, `hang` and `kill` as (rank, step): send SIGTERM to itself, change a weight,
            raise, sleep for ever, send SIGKILL to itself unless torchrun has restarted it; `lose`: the folder of the
            checkpoints. With `fatal` an error ends the process as it does at the door. One with a `mode` is of
            `resharding`.
    """

    def __init__(self, job: dict[str, Any], rank: int) -> None:
        self.job, self.rank = job, rank
        self.losses: dict[int, float] = {}
        self.samples: dict[int, list[int]] = {}
        self.validation: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = batch_idx // trainer.accumulate_grad_batches + 1
        loss, sample = outputs["loss"].detach().clone().view(1), batch["sample"]
        losses, samples = [loss], [sample]
        if trainer.world_size > 1:
            losses = [torch.empty_like(loss) for _ in range(trainer.world_size)]
            samples = [torch.empty_like(sample) for _ in range(trainer.world_size)]
            dist.all_gather(losses, loss)
            dist.all_gather(samples, sample)
        self.losses[step] = self.losses.get(step, 0.0) + float(torch.cat(losses).mean())
        self.samples.setdefault(step, []).extend(int(value) for part in samples for value in part)
        if trainer.global_step == step and self.job.get("signal") == [self.rank, step]:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.job.get("kill") == [self.rank, step] and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.job.get("lose") == [self.rank, step]:
            folder = Path(trainer.default_root_dir) / "checkpoints"
            folder.rename(folder.with_name("before"))
            folder.write_text("a file where the folder was")
        if self.job.get("diverge") == [self.rank, step]:
            with torch.no_grad():
                next(module.parameters()).view(-1)[0] += 1e-3

    def on_before_backward(self, trainer: Trainer, module: Any, loss: Any) -> None:
        here = [self.rank, trainer.global_step + 1]
        if self.job.get("fail") == here:
            raise RuntimeError("this rank is broken")
        if self.job.get("hang") == here:
            time.sleep(10_000)

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        self.validation[trainer.global_step] = float(trainer.callback_metrics["val/loss"])


def carry_out(job: dict[str, Any], rank: int) -> dict[str, Any]:
    """One run; what came of it, in plain types."""
    observer, build = Observer(job, rank), run_module.progress
    run_module.progress = lambda *arguments: [observer, *build(*arguments)]
    error = ""
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = hydra.compose("train", overrides=job["settings"])
    began = time.perf_counter()
    try:
        run_module.run(cfg)
    except (TrainingInterrupted, RuntimeError) as raised:
        if job.get("fatal"):
            report_error(raised)
        error = f"{type(raised).__name__}: {raised}"
    finally:
        run_module.progress = build
    print(f"{job['name']}: {time.perf_counter() - began:.1f} s", flush=True)
    return {"losses": observer.losses, "samples": observer.samples, "validation": observer.validation, "error": error}


def main(jobs: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    for job in json.loads(jobs.read_text()):
        faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True)  # a deadlock says where
        seen = resharding.carry_out(job, rank) if "mode" in job else carry_out(job, rank)
        faulthandler.cancel_dump_traceback_later()
        (folder / f"{job['name']}-rank{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
