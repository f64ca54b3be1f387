"""What people see of an event: a line, a row of W&B's table, an alert; read back with W&B's own tools."""

import json
import logging
import subprocess
from pathlib import Path
from types import SimpleNamespace

from wandb.util import get_core_path

from lion_lightning.guard.events import Event, EventLog
from lion_lightning.tracking.wandb import RunLogger


def event(step: int, kind: str = "outlier") -> Event:
    return Event(step, kind, "the step was clipped", "the gradient norm 783 is an outlier")


def test_the_first_lines_are_said_and_then_ever_fewer(caplog):
    log = EventLog()
    with caplog.at_level(logging.WARNING, "lion_lightning"):
        for step in range(120):
            log.add(event(step), [])
    said = [record.message for record in caplog.records]
    assert len(log.events) == 120
    assert len(said) == 5
    assert said[0] == "LionGuard, step 0, outlier: the gradient norm 783 is an outlier; the step was clipped."
    assert "(number 100)" in said[-1]
    for step in range(120, 2000):
        log.add(event(step), [])
    assert len(log.events) == 1000, "a checkpoint does not grow for ever"


def test_a_log_goes_on_counting_after_a_resume(caplog):
    log, again = EventLog(), EventLog()
    for step in range(9):
        log.add(event(step), [])
    again.load_state_dict(log.state_dict())
    with caplog.at_level(logging.WARNING, "lion_lightning"):
        again.add(event(9), [])
    assert again.events[:9] == log.events
    assert "(number 10)" in caplog.records[-1].message


def test_a_table_has_the_place_of_its_latest_event():
    """Without a step W&B takes 0, and a resumed run would seem to begin anew."""
    logged = []
    log = EventLog()
    for step in (0, 21):
        log.add(event(step), [SimpleNamespace(log_table=lambda key, **table: logged.append(table["step"]))])
    assert logged == [0, 20]


def test_wandb_gets_a_table_and_one_alert_a_kind(tmp_path: Path):
    logger = RunLogger("project", "run", "group", str(tmp_path), mode="offline")
    log = EventLog()
    for step, kind in ((3, "outlier"), (5, "outlier"), (9, "poison")):
        log.add(event(step, kind), [logger])
    folder = logger.run_folder
    logger.finish(0)
    (file,) = folder.glob("run-*.wandb")
    # What `wandb leet inspect --json` starts, as in tracking/runs.py: its command line takes seconds to load.
    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", str(file), str(folder)]
    records = [json.loads(line) for line in subprocess.check_output(command, text=True).splitlines()]
    alerts = [record["alert"]["title"] for record in records if record["type"] == "alert"]
    assert alerts == ["LionGuard: outlier", "LionGuard: poison"]
    tables = sorted(
        (folder / "files" / "media" / "table" / "guard").glob("*.json"), key=lambda path: path.stat().st_size
    )
    table = json.loads(max(tables, key=lambda path: path.stat().st_size).read_text())
    assert table["columns"] == ["step", "kind", "remedy", "message"]
    assert [row[:2] for row in table["data"]] == [[3, "outlier"], [5, "outlier"], [9, "poison"]]
