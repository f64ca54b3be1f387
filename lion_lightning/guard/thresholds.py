"""When each rule of the guard acts: every number in one place."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Thresholds:
    """Limits of the rules. docs/guard.md has the measured false-alarm rate and delay of each default.

    Steps are optimizer steps. Raises ValueError for a limit that is not above 0.
    """

    window: int = 128
    """Steps that the medians of gradient norm and flip rate look back on."""
    armed_after: int = 32
    """Steps seen before a rule that compares with a median may act."""
    outlier_z: float = 8.0
    """Robust z of the log norm (median, median absolute deviation) beyond which a step is clipped ..."""
    outlier_ratio: float = 3.0
    """... if the norm is also above this multiple of the median norm, to which it is clipped."""
    loss_z: float = 10.0
    """Robust z of a step's loss beyond which the step is skipped."""
    nonfinite_steps: int = 4
    """Skipped steps in a row after which the weights themselves are looked at."""
    nonfinite_limit: int = 64
    """Skipped steps in a row after which the run stops, though its weights are healthy."""
    poison_ratio: float = 0.25
    """Share of its median that the flip rate of the update's sign has to fall below ..."""
    poison_steps: int = 5
    """... for this many steps in a row to tell that the momentum is poisoned."""
    fast_half_life: float = 10.0
    slow_half_life: float = 100.0
    """Half-lives of the two averages of the loss, in steps."""
    divergence_sigmas: float = 4.0
    divergence_share: float = 0.1
    """The fast average diverges above the best slow one by the larger of so many deviations and this share of it ..."""
    divergence_steps: int = 20
    """... for this many steps in a row."""
    lock_in_window: int = 64
    lock_in_rejections: int = 32
    """Clipped steps of the latest `lock_in_window` that re-baseline the gradient norm, if the loss is quiet."""
    snapshot_every: int = 100
    snapshots: int = 3
    """Spacing and number of the snapshots kept in host memory."""
    proven_after: int = 100
    """Healthy steps after a snapshot before it is one to go back to."""
    horizon: int = 1000
    """Healthy steps after which earlier recoveries are forgotten."""
    dead: float = 0.10
    """Share of elements that move without a gradient."""
    unmoved: float = 0.50
    """Share of weights that a step does not change."""
    near_bound: float = 0.05
    """Share of weights beyond 0.9 / weight_decay."""
    cosine: float = 0.05
    """Least cosine between update and gradient."""
    gauge_half_life: float = 50.0
    """Of the averages that the last four are held to, in samples of each."""
    look_every: int = 5
    """Readings that may wait until the rules look at them, where nothing speaks for a look at once; no more than
    `poison_steps` or `divergence_steps`."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if not value > 0:
                raise ValueError(f"thresholds.{entry.name} must be above 0, got {value}")
            if entry.type is int and not isinstance(value, int):
                raise ValueError(f"thresholds.{entry.name} must be a whole number, got {value}")
