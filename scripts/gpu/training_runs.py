"""Trainings of train.py side by side, one optimizer after the other, and when each reached a value.

    python scripts/gpu/training_runs.py --metric val/top1 --reach 0.94 0.96 -- recipe=cifar10 data.path=FOLDER
    python scripts/gpu/training_runs.py --optimizers lion adamw -- recipe=bert_mlm model=bert_mini

Reads metrics.csv of each run: the monitored metric at every validation, and the seconds since training began.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def validations(folder: Path, metric: str) -> list[tuple[int, float, float]]:
    """Step, seconds since training began (as of the last log entry before), and value at each validation of a run."""
    found, seconds = [], 0.0
    for file in folder.rglob("metrics.csv"):
        with file.open(newline="") as lines:
            for row in csv.DictReader(lines):
                seconds = float(row.get("perf/seconds") or seconds)
                if row.get(metric):
                    found.append((int(row["step"]), seconds, float(row[metric])))
    return found


def lines(optim: str, found: Sequence[tuple[int, float, float]], reach: Sequence[float]) -> str:
    """A row of the table."""
    if not found:
        return f"| {optim} | no validation |" + " |" * (2 + len(reach))
    step, seconds, value = found[-1]
    times = [next((f"{at:.0f} s" for _, at, seen in found if seen >= level), "not reached") for level in reach]
    return f"| {' | '.join([optim, str(step), f'{seconds:.0f}', f'{value:.4f}', *times])} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", help="as for train.py")
    parser.add_argument("--optimizers", nargs="+", default=["lion", "adamw"])
    parser.add_argument("--metric", default="val/loss")
    parser.add_argument("--reach", nargs="*", type=float, default=[], help="values of the metric, from below")
    options = parser.parse_args()
    print(f"`train.py {' '.join(options.overrides)}`\n")
    columns = ["optimizer", "last step", "seconds", f"last {options.metric}", *(f"{v:g}" for v in options.reach)]
    print(f"| {' | '.join(columns)} |\n| --- |{' ---: |' * (len(columns) - 1)}", flush=True)
    failed = 0
    for optim in options.optimizers:
        with tempfile.TemporaryDirectory() as folder:
            ours = [f"optim={optim}", f"run_dir={folder}", "logger=csv", "export=false", "hydra.run.dir=" + folder]
            done = subprocess.run(
                [sys.executable, str(ROOT / "train.py"), *options.overrides, *ours],
                cwd=ROOT, capture_output=True, text=True, check=False,
            )  # fmt: skip
            print(lines(optim, validations(Path(folder), options.metric), options.reach), flush=True)
        if done.returncode:
            failed += 1
            print(f"\n{optim} ended with {done.returncode}: {(done.stderr or done.stdout)[-500:]}\n", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
