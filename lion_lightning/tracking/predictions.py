"""What a trained model makes of validation, in W&B: a table of samples (MLM fills, the worst images) and pictures."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
import wandb

from lion_lightning.tracking.wandb import RunLogger

KEY = "predictions"
Cell = str | float | int | np.ndarray


@runtime_checkable
class Predicting(Protocol):
    """A module that can show what it predicts."""

    def predictions(self) -> tuple[list[str], list[list[Cell]]]:
        """Names of the columns, and rows; an image is a uint8 array (height, width, channels)."""
        ...


@runtime_checkable
class Picturing(Protocol):
    """A module that can draw what validation found."""

    def pictures(self) -> dict[str, np.ndarray]:
        """Pictures by name, uint8 (height, width, channels)."""
        ...


def log_predictions(logger: RunLogger, module: Any) -> int:
    """Log the pictures of `module`, if it has any, and its table under `predictions`; returns the table's rows."""
    if isinstance(module, Picturing):
        for name, pixels in module.pictures().items():
            logger.log_image(name, [pixels])
    if not isinstance(module, Predicting):
        return 0
    columns, rows = module.predictions()
    logger.log_table(KEY, columns=columns, data=[[_cell(value) for value in row] for row in rows])
    return len(rows)


def _cell(value: Cell) -> Any:
    return wandb.Image(value) if isinstance(value, np.ndarray) else value
