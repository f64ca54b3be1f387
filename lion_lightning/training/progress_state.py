"""Lightning's loop counters inside a checkpoint: what a resumed run takes for done, and what it does first."""

from typing import Any

from lightning.pytorch import Trainer

KEY = "lion_lightning"  # our part of a checkpoint
_BATCHES = "epoch_loop.batch_progress"
_VALIDATION = "epoch_loop.val_loop.batch_progress"


def validation_due(trainer: Trainer) -> bool:
    """Whether this step ends with a validation."""
    loop = trainer.fit_loop
    fetcher = loop._data_fetcher
    return fetcher is not None and loop.epoch_loop._should_check_val_fx(fetcher)


def expect_validation(checkpoint: dict[str, Any]) -> None:
    """Make a run resumed from `checkpoint` begin with the validation that its last step should have ended with.

    Lightning skips that validation where a checkpoint was written before it. It repeats one that was interrupted, so
    the checkpoint says: the step is complete, and the first validation batch has been begun.
    """
    state = checkpoint["loops"]["fit_loop"]
    for counts in (state[_BATCHES]["total"], state[_BATCHES]["current"]):
        counts["completed"] = counts["processed"]
    for counts in (state[_VALIDATION]["total"], state[_VALIDATION]["current"]):
        counts.update(ready=1, started=1, processed=0, completed=0)
    state[_VALIDATION]["is_last_batch"] = False


def recount(checkpoint: dict[str, Any], accumulate_grad_batches: int) -> None:
    """Count the batches of `checkpoint` in micro-batches of the run that goes on, which may accumulate more of them."""
    before = checkpoint.get(KEY, {}).get("accumulate_grad_batches", accumulate_grad_batches)
    if before == accumulate_grad_batches:
        return
    state = checkpoint["loops"]["fit_loop"][_BATCHES]
    for counts in (state["total"], state["current"]):
        unfinished = counts["processed"] - counts["completed"]
        for name in ("ready", "started", "processed"):
            counts[name] = counts[name] // before * accumulate_grad_batches
        counts["completed"] = counts["processed"] - unfinished
