"""Lion and SIGNUM as torch optimizers. Needs torch alone; the rest of the project is not imported."""

from lion_lightning.optim.gradient_release import release_gradients
from lion_lightning.optim.lion import Lion
from lion_lightning.optim.signum import Signum

__all__ = ["Lion", "Signum", "release_gradients"]
