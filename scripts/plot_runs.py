"""One picture of runs against optimizer steps: `python scripts/plot_runs.py outputs/... --output curve.png`.

The curves of `scripts/compare.py`, without the statistics: the mean over seeds with its band. The dashed line is the
entropy of the validation tokens, where the runs logged it: what a model without any context would reach.
"""

import argparse
import sys
from pathlib import Path

from lion_lightning.tracking.compare import Incomparable, compare
from lion_lightning.tracking.report import write_picture
from lion_lightning.tracking.runs import AXES, Run, UnreadableRun, find_runs, read_runs


def main() -> int:
    options = _arguments()
    try:
        read = read_runs([file for place in options.folders for file in find_runs(place)])
        runs = [run for run in read if isinstance(run, Run)]
        comparison = compare(runs, metric=options.metric, unlike=options.unlike)
    except (Incomparable, UnreadableRun) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for broken in read:
        if isinstance(broken, UnreadableRun):
            print(f"not read: {broken}", file=sys.stderr)
    drawn = write_picture(comparison, options.output, axis=options.axis)
    print(f"{options.output}: {drawn} of {len(runs)} runs")
    return 0 if drawn else 2


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="where to look for runs")
    parser.add_argument("--metric", help="what to draw; default: the metric the recipe monitors")
    parser.add_argument("--axis", choices=tuple(AXES), default="steps", help="against what (default: %(default)s)")
    parser.add_argument("--unlike", action="store_true", help="draw runs that are not alike all the same")
    parser.add_argument(
        "--output", type=Path, default=Path("curve.png"), help="the PNG to write (default: %(default)s)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
