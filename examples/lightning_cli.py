"""Lion and the guard from LightningCLI's command line and YAML; needs `pip install 'jsonargparse[signatures]'`.

python examples/lightning_cli.py fit --config examples/lightning_cli.yaml --optimizer.lr 3e-5
"""

from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.utilities.types import OptimizerLRScheduler


class Model(BoringModel):
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Left to the command line."""


if __name__ == "__main__":
    LightningCLI(Model, BoringDataModule, seed_everything_default=0)
