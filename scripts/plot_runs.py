"""Draw one picture of runs: `python scripts/plot_runs.py outputs/... --output curve.png`.

The curves are those of `lion-compare`: the mean over seeds with a band of one standard deviation. The dashed line
is the entropy of the validation tokens, where the runs logged it: the loss of a model that ignores context.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lion_lightning.tracking.compare import Incomparable, compare
from lion_lightning.tracking.plots import write_picture
from lion_lightning.tracking.runs import AXES, Run, UnreadableRun, find_runs, read_file


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 with a message of one line."""
    options = _options(arguments)
    try:
        read = [read_file(file) for place in options.folders for file in find_runs(place)]
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


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="folders with runs, searched recursively")
    parser.add_argument("--metric", help="the metric to draw (default: what the recipe monitors)")
    parser.add_argument(
        "--axis", choices=tuple(AXES), default="steps", help="the horizontal axis (default: %(default)s)"
    )
    parser.add_argument("--unlike", action="store_true", help="draw runs in spite of other differences")
    parser.add_argument(
        "--output", type=Path, default=Path("curve.png"), help="the PNG to write (default: %(default)s)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
