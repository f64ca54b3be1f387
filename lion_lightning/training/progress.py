"""What a person sees while a run goes on: a bar in a terminal, a line per validation anywhere else."""

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from rich.console import Console
from typing_extensions import override

METRICS_FORMAT = ".3f"


class StepBar(RichProgressBar):
    """Lightning's bar without the count of epochs: a run here is one stream of steps."""

    @override
    def _get_train_description(self, current_epoch: int) -> str:
        return "Training".ljust(len(self.validation_description))  # as wide, so that the bars do not jump


class ValidationLines(Callback):
    """Prints `step 200/1000  train/loss 5.912  val/loss 5.870` after each validation, for logs and pipes.

    Args:
        metrics: names to print, those that exist at the time.
        console: where to.
    """

    def __init__(self, metrics: Sequence[str], console: Console) -> None:
        self.metrics, self.console = metrics, console

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        values = trainer.callback_metrics
        shown = "  ".join(f"{name} {float(values[name]):{METRICS_FORMAT}}" for name in self.metrics if name in values)
        self.console.print(f"step {trainer.global_step}/{trainer.max_steps}  {shown}", highlight=False)


def progress(console: Console, metrics: Sequence[str]) -> list[Callback]:
    """The callbacks that show progress on `console`."""
    lines = ValidationLines(metrics, console)
    if not console.is_terminal:
        return [lines]
    theme = RichProgressBarTheme(metrics_format=METRICS_FORMAT)
    return [StepBar(theme=theme, leave=False), lines]
