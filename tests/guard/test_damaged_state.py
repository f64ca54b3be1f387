"""States in checkpoints that are not what the guard saved: it starts afresh, says so once, and the run goes on."""

import copy
import functools
import logging
import operator

import pytest
import torch

from lion_lightning import LionGuard
from tests.guard.test_callback import Regression, fit


def guarded() -> LionGuard:
    return LionGuard(warmup_steps=4, on_divergence="recover", checkpoint_snapshots=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    guard = guarded()
    fit(Regression(), guard, tmp_path_factory.mktemp("saved"))
    return guard.state_dict()


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A run with a new guard: where it begins, the factors of its warm-up, and the weight it ends with."""
    module = Regression()
    before = copy.deepcopy(module.state_dict())
    _, rows = fit(module, guarded(), tmp_path_factory.mktemp("fresh"))
    return before, [row.get("guard/warmup_factor") for row in rows], module.net.weight.detach()


def with_value(*path_and_value):
    """Damages a state: sets the value at a path of keys."""
    *path, last, value = path_and_value

    def damage(state):
        functools.reduce(operator.getitem, path, state)[last] = value
        return state

    return damage


def without(*path):
    """Damages a state: removes what is at a path of keys."""

    def damage(state):
        del functools.reduce(operator.getitem, path[:-1], state)[path[-1]]
        return state

    return damage


RULES, GATE = ("monitors", 0, "rules"), ("monitors", 0, "gate")
DAMAGES = {
    "empty": lambda state: {},
    "a list": lambda state: [1, 2],
    "a tensor": lambda state: torch.ones(3),
    "of another callback": lambda state: {"best_model_score": torch.tensor(1.0), "dirpath": "here"},
    "without steps": without("steps"),
    "without warm-up": without("warmup"),
    "without policy": without("policy"),
    "without part of a monitor": without(*GATE),
    "without part of a rule": without(*RULES, "divergence", "best"),
    "an older format, truncated": lambda state: {"format": 1, "watches": [1]},
    "steps in words": with_value("steps", "eight"),
    "warm-up in words": with_value("warmup", "scale", "half"),
    "a warm-up that stops the run": with_value("warmup", "scale", float("nan")),
    "monitors are a tensor": with_value("monitors", torch.ones(3)),
    "monitors are a number": with_value("monitors", 7),
    "monitors are numbers": with_value("monitors", [7]),
    "rules are a list": with_value(*RULES, []),
    "a count in words": with_value(*RULES, "clipped", "many"),
    "a count is missing its number": with_value(*RULES, "nonfinite_in_a_row", None),
    "flip rates in words": with_value(*RULES, "stuck_momentum", "rates", ["high"]),
    "a history that is too short": with_value(*GATE, "norms", "values", [1.0, 2.0]),
    "outliers of another shape": with_value(*GATE, "outliers", "values", [[1.0]]),
    "outliers at no step": with_value(*GATE, "outliers", "step", None),
    "unread readings in words": with_value("monitors", 0, "unread", [["a"] * 20]),
    "unread readings are a number": with_value("monitors", 0, "unread", 5),
    "signs are a list": with_value("monitors", 0, "signs", [1, -1]),
    "losses in words": with_value("losses", "total", "low"),
    "events of another shape": with_value("events", [{"when": 3}]),
    "telemetry without names": with_value("telemetry", {"unread": [[1.0]], "names": []}),
    "a snapshot without tensors": without("snapshots", 0, "tensors"),
    "a snapshot of a step in words": with_value("snapshots", 0, "step", "first"),
    "a snapshot with foreign rules": with_value("snapshots", 0, "rules", [{"gate": {}}]),
    "a snapshot of no optimizer": with_value("snapshots", 0, "rules", []),
    "a trial without a snapshot": with_value("trial", {"level": 0}),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_state_that_does_not_fit_starts_afresh_and_is_told_once(tmp_path, caplog, saved, fresh, name):
    before, factors, weight = fresh
    same, again = Regression(), guarded()
    same.load_state_dict(before)
    with caplog.at_level(logging.WARNING, "lion_lightning"):
        again.load_state_dict(DAMAGES[name](copy.deepcopy(saved)))
        trainer, rows = fit(same, again, tmp_path)
    told = [record.message for record in caplog.records if "afresh" in record.message]
    assert len(told) == 1, told
    assert not again.is_off
    assert trainer.global_step == again.steps == 8
    assert [row.get("guard/warmup_factor") for row in rows] == factors
    assert torch.equal(same.net.weight, weight)


def test_an_undamaged_state_goes_on(tmp_path, caplog, saved):
    guard = guarded()
    guard.load_state_dict(copy.deepcopy(saved))
    fit(Regression(), guard, tmp_path)
    assert guard.steps == 16
    assert "afresh" not in caplog.text


# The same function takes the state over; one of each part of it, and those that fail late.
@pytest.mark.parametrize(
    "name",
    [
        "a list",
        "without policy",
        "a warm-up that stops the run",
        "rules are a list",
        "outliers of another shape",
        "unread readings in words",
        "signs are a list",
        "losses in words",
        "events of another shape",
        "telemetry without names",
        "a snapshot without tensors",
        "a snapshot with foreign rules",
        "a trial without a snapshot",
    ],
)
def test_a_state_loaded_in_the_middle_of_a_run_that_does_not_fit_changes_nothing(tmp_path, caplog, saved, name):
    class Loads(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 5:
                guard.load_state_dict(DAMAGES[name](copy.deepcopy(saved)))

    guard = guarded()
    fit(Loads(), guard, tmp_path)
    assert guard.steps == 8
    assert not guard.is_off
    assert caplog.text.count("afresh") == 1
