"""Runs from the W&B server, through W&B's public API."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lion_lightning.tracking.offline import UnreadableRun, hardware_of
from lion_lightning.tracking.runs import Run, State

RUNS_AT_A_TIME = 8  # the wait is for the network
# The server's words for how a run stands, in ours.
STATES: dict[str, State] = {
    "finished": "finished",
    "failed": "failed",
    "crashed": "crashed",
    "killed": "crashed",
    "running": "running",
    "pending": "running",
    "preempting": "running",
    "preempted": "crashed",
}


def fetch_runs(project: str, group: str | None = None) -> list[Run]:
    """Every run of `entity/project`, or of one group of it, with its whole history, oldest first.

    Raises:
        UnreadableRun: no key, no such project, or no connection; the message is W&B's, in one line.
    """
    import wandb

    try:
        found = wandb.Api().runs(project, filters={"group": group} if group else None, lazy=False)
        with ThreadPoolExecutor(RUNS_AT_A_TIME) as pool:
            return list(pool.map(_run_of, list(found)))
    except (wandb.Error, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UnreadableRun(f"--wandb {project}: {reason or type(error).__name__}") from error


def _run_of(run: Any) -> Run:
    return Run(
        source=run.url,
        id=run.id,
        name=run.name,
        group=run.group or "",
        state=STATES.get(run.state, "crashed"),
        exit_code=None,
        config=dict(run.config),
        history=list(run.scan_history()),
        created=run.created_at or "",
        hardware=hardware_of(run.metadata or {}),
    )
