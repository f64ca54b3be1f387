"""gpu_report.py runs its parts in order within a budget, keeps what they print, and goes on where it stopped."""

import json
from pathlib import Path

import pytest

from scripts import gpu_report
from scripts.gpu_report import PARTS, Part, main, wheels


def part(code: str, seconds: int = 30, modules: tuple[str, ...] = ()) -> Part:
    """A part that runs Python code without spaces."""
    return Part("A part", f"-c {code}", f"-c {code}", seconds, modules)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Part]:
    made = {
        "good": part("print('|a|1|')"),
        "bad": part("print('before');print('why',file=__import__('sys').stderr);raise(SystemExit(3))"),
        "slow": part("print('began',flush=True);__import__('time').sleep(60)", seconds=2),
        "bare": part("print('never')", modules=("no_such_module",)),
    }
    monkeypatch.setattr(gpu_report, "PARTS", made)
    return made


def statuses(folder: Path) -> dict[str, str]:
    return {name: entry["status"] for name, entry in json.loads((folder / "parts.json").read_text()).items()}


def test_a_part_that_fails_or_hangs_or_lacks_a_module_does_not_stop_the_others(
    parts: dict[str, Part], tmp_path: Path
) -> None:
    assert main(["--output", str(tmp_path), "--budget", "100", "--parts", "slow", "good", "bad", "bare"]) == 1
    assert statuses(tmp_path) == {
        "slow": "stopped after 2 s",
        "good": "done",
        "bad": "failed with 3",
        "bare": "skipped: no module no_such_module",
    }
    report = (tmp_path / "report.md").read_text()
    assert "began" in report, "what a part printed before it was stopped is kept"
    assert "before" in report
    assert "stderr:\n\n```\nwhy" in report
    assert "|a|1|" in report
    assert "never" not in report


def test_a_second_run_does_what_the_first_left(parts: dict[str, Part], tmp_path: Path) -> None:
    command = ["--output", str(tmp_path), "--parts", "good", "bad"]
    main([*command, "--budget", "5"])
    assert statuses(tmp_path) == dict.fromkeys(("good", "bad"), "not begun: the budget is used up")
    main([*command, "--budget", "100"])
    assert statuses(tmp_path) == {"good": "done", "bad": "failed with 3"}
    (tmp_path / "good.log").write_text("of the first run")
    main([*command, "--budget", "100"])
    assert (tmp_path / "good.log").read_text() == "of the first run"
    main([*command, "--budget", "100", "--again"])
    assert "|a|1|" in (tmp_path / "good.log").read_text()


@pytest.mark.parametrize("name", PARTS)
def test_the_files_that_parts_run_exist(name: str) -> None:
    root = Path(gpu_report.__file__).parents[1]
    for command in filter(None, (PARTS[name].command, PARTS[name].rehearsal)):
        files = [word.partition("::")[0] for word in command.split() if ".py" in word]
        assert all((root / file).is_file() for file in files)


def test_the_parts_worth_most_fit_into_ten_minutes() -> None:
    first = ["machine", "tests", "cases", "sanitizer", "large", "base", "billion", "host", "guard"]
    assert list(PARTS)[: len(first)] == first
    assert sum(PARTS[name].seconds for name in first) <= 600


def test_wheels_are_those_that_the_other_machine_lacks(tmp_path: Path) -> None:
    freeze = tmp_path / "freeze.txt"
    freeze.write_text("Lightning_Utilities==0.1\nnumpy==2.0\ntransformers @ file:///somewhere\n")
    everything, missing = ([name.partition("==")[0] for name in wheels(file)] for file in (None, freeze))
    assert {"numpy", "transformers", "lightning-utilities", "hydra-core", "omegaconf", "kornia"} <= set(everything)
    assert not {"torch", "triton", "wandb", "tomli", "colorama"} & set(everything)
    assert not {"numpy", "transformers", "lightning-utilities"} & set(missing)
    assert "omegaconf" in missing
