"""Signals that ask a run to end: SIGTERM, SIGINT and SIGUSR1 set a flag; the run saves and ends at a step boundary.

Nothing else happens in a handler: it may run inside `optimizer.step`, a save or a collective. Lightning 2.6's own
SIGTERM handler broadcasts from inside it, which deadlocks when the other ranks are elsewhere; `StopFlag` takes its
place.

submitit's own signal, SIGUSR2 before a time limit, is one more: its handler puts the job back into the queue and ends
the process at once, so it waits until the run is saved.

Exit codes: 143 after SIGTERM, 130 after SIGINT, 138 after SIGUSR1 (128 + the signal's number, as shells have it).
"""

import logging
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from lightning.pytorch import Trainer

log = logging.getLogger(__name__)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REQUEUE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)  # one of them, by SUBMITIT_PREEMPT_SIGNAL
EXIT_CODE_OFFSET = 128
WORKER_GRACE_SECONDS = 20


class TrainingInterrupted(SystemExit):
    """A signal ended the run at a step boundary. The message says what was saved.

    A `SystemExit`, so that a sweep ends with the run and is not taken for a failed job by Hydra.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(EXIT_CODE_OFFSET + signum)
        self.message, self.exit_code = message, EXIT_CODE_OFFSET + signum

    def __str__(self) -> str:
        return self.message


class StopFlag:
    """Whether this process was asked to end, and by which signal.

    Use it as a context around training; `install` puts its handlers (back) in place::

        with StopFlag() as stop:
            ...
            if stop.requested: ...

    Args:
        alone: no launcher and no other rank: a second SIGINT then interrupts at once, for whoever presses Ctrl+C twice.
            Under a launcher the second one is usually the launcher passing the first one on.

    Attributes:
        signal: number of the last signal, 0 for none.
    """

    def __init__(self, alone: bool = True) -> None:
        self.signal, self.alone = 0, alone
        self._signals: tuple[signal.Signals, ...] = STOP_SIGNALS
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signal != 0

    def install(self) -> None:
        """Handle the stop signals here; nothing in a thread that is not the main one, where Python forbids it."""
        if threading.current_thread() is threading.main_thread():
            for signum in self._signals:
                signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT == self.signal and self.alone:
            signal.default_int_handler(signum, frame)
        self.signal = signum

    def __enter__(self) -> "StopFlag":
        if is_submitits(signal.getsignal(signal.SIGUSR2)):
            self._signals = (*STOP_SIGNALS, signal.SIGUSR2)
        self._before = {signum: signal.getsignal(signum) for signum in self._signals}
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            for signum, handler in self._before.items():
                signal.signal(signum, handler)
            if isinstance(error, TrainingInterrupted):
                self._requeue(error)

    def _requeue(self, stop: TrainingInterrupted) -> None:
        """Hand the signal that ended the run on to submitit, if it is the one that it waits for.

        On the first rank, submitit puts the job back into the queue and exits; on the others it does nothing.
        """
        signum = stop.exit_code - EXIT_CODE_OFFSET
        handler: Any = self._before.get(signum)
        if signum in REQUEUE_SIGNALS and is_submitits(handler):
            log.warning("%s", stop)  # the door, which would say it, is not reached
            handler(signum, None)


def is_submitits(handler: Any) -> bool:
    """Whether a signal's handler was set by submitit, inside one of its jobs."""
    module = getattr(handler, "__module__", None) or ""
    return "SUBMITIT_EXECUTOR" in os.environ and module.partition(".")[0] == "submitit"


def replace_lightnings_handlers(trainer: Trainer, stop: StopFlag) -> None:
    """Handle the stop signals by `stop` alone, from the start of training on, where Lightning has set its own.

    Lightning also broadcasts its flag before every step; it is never set any more, so that is left out.
    """
    stop.install()
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]


def outlive_stop_signals(worker: int) -> None:
    """For loader workers: a signal to the whole process group is for the main process, which still needs them.

    The main process may also mean it, at its own end; so SIGTERM ends a worker after a while.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)


def _end_later(signum: int, frame: FrameType | None) -> None:
    signal.alarm(WORKER_GRACE_SECONDS)


def _nothing() -> None:
    """In place of Lightning's broadcast."""
