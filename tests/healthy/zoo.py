"""All kinds of healthy training, by subject."""

from tests.healthy import (
    changing_models,
    changing_objectives,
    data_mixes,
    densities_and_sequences,
    moving_targets,
    several_losses,
)
from tests.healthy.kind import Kind

KINDS: dict[str, Kind] = {
    kind.name: kind
    for group in (
        data_mixes,
        changing_objectives,
        several_losses,
        moving_targets,
        changing_models,
        densities_and_sequences,
    )
    for kind in group.KINDS
}
