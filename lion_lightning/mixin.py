"""LionMixin: `configure_optimizers` for any LightningModule, from two attributes."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import TypeAlias, cast

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lion_lightning.hyperparams import parameter_groups
from lion_lightning.optim import Lion
from lion_lightning.schedules import Schedule, cosine

OptimizerFactory: TypeAlias = Callable[..., Optimizer]


class LionMixin:
    """Give a LightningModule Lion, named parameter groups and a schedule over the whole run.

    Put it before `LightningModule` in the bases. Set `optimizer_factory` and `schedule` where the defaults do not fit::

        class Classifier(LionMixin, LightningModule):
            optimizer_factory = partial(Lion, **from_adamw(lr=1e-3, weight_decay=0.1))

    Attributes:
        optimizer_factory: an optimizer class, or a `functools.partial` of one, of torch or of ours. Its `weight_decay`
            goes to the `decay` group alone (see `hyperparams.parameter_groups`).
        schedule: from the number of optimizer steps of the run to the factor of the learning rate at each; see
            `schedules`. The number is `trainer.estimated_stepping_batches`.
    """

    optimizer_factory: OptimizerFactory = Lion
    schedule: Schedule = staticmethod(cosine)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over named groups, and its schedule, stepped once an optimizer step."""
        module = cast(LightningModule, self)
        factory = self.optimizer_factory
        groups = parameter_groups(module, _weight_decay(factory))
        optimizer = factory(groups)
        factor = self.schedule(int(module.trainer.estimated_stepping_batches))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step", "frequency": 1},
        }


def _weight_decay(factory: OptimizerFactory) -> float:
    """The decay the factory would use: what was given to it, else the default of the optimizer."""
    if isinstance(factory, partial) and "weight_decay" in factory.keywords:
        return float(factory.keywords["weight_decay"])
    optimizer = factory.func if isinstance(factory, partial) else factory
    default = inspect.signature(optimizer).parameters.get("weight_decay")
    return float(default.default) if default is not None else 0.0
