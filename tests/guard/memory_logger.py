"""A logger that remembers."""

from lightning.pytorch.loggers.logger import DummyLogger


class MemoryLogger(DummyLogger):
    """What was logged: every row in `rows`, the newest value of each figure in `latest`."""

    def __init__(self):
        super().__init__()
        self.rows, self.latest = [], {}

    def log_metrics(self, metrics, step=None):
        self.rows.append(metrics)
        self.latest.update(metrics)
