"""SIGNUM: sign descent with momentum, the special case of Lion with equal betas."""

from typing import Any

from torch import Tensor

from lion_lightning.optim.lion import Lion, ParamsT


class Signum(Lion):
    """SIGNUM (Bernstein et al., 2018, arXiv:1802.04434) in all of Lion's storage modes and engines.

    SIGNUM updates the momentum first, m <- b*m + (1-b)*g, and steps along sign(m). Lion with both betas equal to b
    steps along sign(b*m + (1-b)*g), which is the same.

    Args:
        params: as for `Lion`.
        lr: size of every weight's step.
        momentum: b, in [0, 1).
        weight_decay: decoupled; 0 in the paper.
        **options: the keyword options of `Lion`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, (momentum, momentum), weight_decay, **options)
