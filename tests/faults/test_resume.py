"""A run that is resumed in the middle of something decides and ends as the one that was never stopped."""

from pathlib import Path

import pytest
import torch

from lion_lightning import LionGuard
from tests.faults.injected import LabelNoise, NaNBatch, NaNMomentum, Outlier, every
from tests.faults.task import Outcome, Saver, train

STEPS = 340
"""A NaN batch at 150, an outlier that the gate is not there to clip, a broken momentum, and labels gone wrong."""


def faults() -> list:
    return [NaNBatch([150]), Outlier(170, 1e5), NaNMomentum(200), LabelNoise(every(260))]


def guard(**options) -> LionGuard:
    return LionGuard(warmup_steps=60, checkpoint_snapshots=True, on_bad_loss="skip", on_divergence="recover", **options)


CHECKPOINTS = {
    30: "in warm-up",
    151: "right after a step that was skipped, before the guard has read it",
    152: "right after that",
    171: "right after an outlier",
    203: "while the weights are sick",
    265: "while bad batches are counted",
    282: "right after a rewind",
    300: "while the rate warms up again",
}


@pytest.fixture(scope="module", params=[True, False], ids=["gate", "no gate"])
def gate(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="module")
def uninterrupted(gate: bool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return train(1, guard(gate=gate), faults(), steps=STEPS, saver=Saver(folder, CHECKPOINTS)), folder


def test_the_run_has_something_of_everything(uninterrupted, gate):
    kinds = set(uninterrupted[0].kinds())
    expected = {"nonfinite", "outlier", "bad_loss", "sick_weights", "divergence"}
    assert kinds >= (expected if gate else {"poison", "divergence"})


@pytest.mark.parametrize("step", CHECKPOINTS, ids=CHECKPOINTS.values())
def test_resumed_is_uninterrupted(uninterrupted, gate, step):
    whole, folder = uninterrupted
    resumed = train(1, guard(gate=gate), faults(), steps=STEPS, resume=(folder / f"step-{step}.ckpt", step))
    assert resumed.events == whole.events
    assert (resumed.stopped, resumed.steps) == (whole.stopped, whole.steps)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
