"""Lion and SIGNUM as torch optimizers. Needs torch alone and imports nothing else of the project."""

from lion_lightning.optim.gradient_release import release_gradients
from lion_lightning.optim.lion import Lion, Signum

__all__ = ["Lion", "Signum", "release_gradients"]
