"""Which rank is late: each says in the background where it is, and whoever waits in vain reads what the others said."""

import json
import logging
import threading
import time
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

log = logging.getLogger(__name__)
INTERVAL_SECONDS = 2.0
PATIENCE_SECONDS = 1.5 * INTERVAL_SECONDS  # whoever is alive has beaten by then
COMMUNICATION = ("gloo", "nccl", "timed out", "connection", "socket", "store")  # in the message of such an error
PHASES = ("between batches", "in the forward pass", "in the backward pass or the step")


class Heartbeat(Callback):
    """Names the rank that the others waited for.

    A thread writes (step, phase, time) of this rank to the process group's store every two seconds, and costs the
    training loop nothing. When an exception ends a run of several ranks, each surviving rank reads them and says which
    rank is behind the others or silent, or else which ones have not given up waiting as it has.
    """

    def __init__(self) -> None:
        self._place, self._gave_up = (0, 0), False
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size == 1:
            return
        self._gave_up = False
        self._over.clear()
        self._store = dist.PrefixStore("lion_lightning/heartbeat", dist.distributed_c10d._get_default_store())
        self._thread = threading.Thread(target=self._beat, args=(trainer.global_rank,), daemon=True, name="heartbeat")
        self._thread.start()

    def _beat(self, rank: int) -> None:
        while self._say(rank) and not self._over.wait(INTERVAL_SECONDS):
            pass

    def _say(self, rank: int) -> bool:
        try:
            self._store.set(str(rank), json.dumps([*self._place, self._gave_up, time.time()]))
        except RuntimeError as error:  # the store went with its rank: the run is ending
            log.debug("no more heartbeats: %s", error)
            return False
        return True

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._place = (trainer.global_step, 1)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._place = (trainer.global_step, 2)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._place = (trainer.global_step, 0)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._gave_up = _is_about_others(exception)
        if self._thread is not None:
            self._say(trainer.global_rank)
        if self._thread is not None and self._gave_up and (told := self._late(trainer)):
            log.error("[rank %d] waited in vain for %s", trainer.global_rank, told)
        self._stop()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def _stop(self) -> None:
        """Waits for a beat under way: a thread that comes back from the store while Python ends aborts the process."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(PATIENCE_SECONDS)

    def _late(self, trainer: Trainer) -> str:
        """Who is behind this rank, or silent, or else still busy where this one has given up; empty if nobody is."""
        time.sleep(PATIENCE_SECONDS)
        late: list[str] = []
        busy: list[str] = []
        for rank in (other for other in range(trainer.world_size) if other != trainer.global_rank):
            try:
                step, phase, gave_up, seen = self._heard(rank)
            except RuntimeError as error:
                return f"a rank; who, cannot be told, since the store is gone ({type(error).__name__})"
            silent = time.time() - seen
            if not gave_up:
                told = f"rank {rank}, last seen {silent:.0f} s ago at step {step}, {PHASES[phase]}"
                (late if (step, phase) < self._place or silent > PATIENCE_SECONDS else busy).append(told)
        return "; ".join(late or busy)

    def _heard(self, rank: int) -> tuple[int, int, bool, float]:
        """What `rank` last wrote: step, phase, whether it gave up waiting, and when in seconds."""
        if not self._store.check([str(rank)]):
            return 0, 0, False, 0.0
        step, phase, gave_up, seen = json.loads(self._store.get(str(rank)))
        return step, phase, gave_up, seen


def _is_about_others(exception: BaseException) -> bool:
    message = str(exception).lower()
    return isinstance(exception, RuntimeError) and any(word in message for word in COMMUNICATION)
