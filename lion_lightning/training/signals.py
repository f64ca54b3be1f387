"""Signals that ask a run to end: SIGTERM, SIGINT and SIGUSR1 set a flag; the run saves and ends at a step boundary.

Nothing else happens in a handler, since it may run inside `optimizer.step`, a save or a collective. Lightning 2.6's own
SIGTERM handler broadcasts, which deadlocks when the other ranks are elsewhere; `StopFlag.install` replaces it when
training begins, where Lightning has set its own.

submitit's own signal, SIGUSR2 before a time limit, is one more: its handler puts the job back into the queue and ends
the process at once, so it is called only after the run is saved.
"""

import logging
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

log = logging.getLogger(__name__)
REQUEUE_SIGNALS = tuple(  # one of them, by SUBMITIT_PREEMPT_SIGNAL; Windows has neither
    getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, *REQUEUE_SIGNALS[:1])
EXIT_CODE_OFFSET = 128  # plus the signal's number, as in shells


class TrainingInterrupted(SystemExit):
    """A signal ended the run at a step boundary. The message says what was saved.

    A `SystemExit`, so that a sweep ends with the run; Hydra would take another exception for a failed job.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(EXIT_CODE_OFFSET + signum)
        self.message, self.exit_code = message, EXIT_CODE_OFFSET + signum

    def __str__(self) -> str:
        return self.message


class StopFlag:
    """Whether this process was asked to end, and by which signal.

    Use it as a context around training; `install` sets its handlers (again)::

        with StopFlag() as stop:
            ...
            if stop.signal: ...

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

    def install(self) -> None:
        """Handle the stop signals here; does nothing outside the main thread, where Python forbids it."""
        if threading.current_thread() is threading.main_thread():
            for signum in self._signals:
                signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT == self.signal and self.alone:
            signal.default_int_handler(signum, frame)
        self.signal = signum

    def __enter__(self) -> "StopFlag":
        if any(_is_submitits(signal.getsignal(signum)) for signum in REQUEUE_SIGNALS[1:]):
            self._signals = (*STOP_SIGNALS, *REQUEUE_SIGNALS[1:])
        self._before = {signum: signal.getsignal(signum) for signum in self._signals}
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for signum, before in self._before.items():
            signal.signal(signum, before)
        if isinstance(error, TrainingInterrupted):
            signum = error.exit_code - EXIT_CODE_OFFSET
            handler: Any = self._before.get(signum)
            if signum in REQUEUE_SIGNALS and _is_submitits(handler):
                log.warning("%s", error)  # the command line, which would print it, is not reached
                handler(signum, None)  # on the first rank: requeues the job and exits


def _is_submitits(handler: Any) -> bool:
    """Whether a signal's handler was set by submitit, inside one of its jobs."""
    module = getattr(handler, "__module__", None) or ""
    return "SUBMITIT_EXECUTOR" in os.environ and module.partition(".")[0] == "submitit"
