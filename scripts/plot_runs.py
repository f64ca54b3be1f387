"""Draw a metric of finished runs against optimizer steps: `python scripts/plot_runs.py outputs/... --output curve.png`.

Reads W&B's offline runs; runs of the same optimizer share a colour. The dashed line is the entropy of the validation
tokens, where a run has logged it: what a model without any context would reach.
"""

import argparse
import sys
from pathlib import Path

from lion_lightning.tracking.runs import Run, UnreadableRun, find_runs, read_run

YARDSTICK = "data/unigram_entropy"


def main() -> int:
    arguments = _arguments()
    folders = [folder for place in arguments.folders for folder in find_runs(place)]
    if not folders:
        print(f"no W&B run in {', '.join(map(str, arguments.folders))}", file=sys.stderr)
        return 2
    try:
        runs = [read_run(folder) for folder in folders]
    except UnreadableRun as error:
        print(error, file=sys.stderr)
        return 2
    drawn = draw(runs, arguments.metric or runs[0].config["recipe"]["monitor"], arguments.output)
    print(f"{arguments.output}: {drawn} of {len(runs)} runs")
    return 0 if drawn else 2


def draw(runs: list[Run], metric: str, output: Path) -> int:
    """Draw `metric` of `runs` to `output` (PNG); returns how many of the runs have it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=150)
    optimizers = sorted({run.config["optim"]["name"] for run in runs})
    labelled: set[str] = set()
    drawn = 0
    for run in runs:
        steps, values = run.curve(metric)
        if not steps:
            continue
        name = run.config["optim"]["name"]
        label = None if name in labelled else f"{name} (lr {run.config['optim']['lr']:g})"
        axes.plot(steps, values, color=f"C{optimizers.index(name)}", marker="o", markersize=3, label=label)
        labelled.add(name)
        drawn += 1
    yardsticks = {round(run.summary[YARDSTICK], 3) for run in runs if YARDSTICK in run.summary}
    if len(yardsticks) == 1 and metric == "val/loss":
        axes.axhline(yardsticks.pop(), color="grey", linestyle="--", linewidth=1, label="unigram entropy")
    axes.set(xlabel="optimizer steps", ylabel=metric)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, bbox_inches="tight")
    return drawn


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="where to look for runs")
    parser.add_argument("--metric", help="what to draw; default: the metric the recipe monitors")
    parser.add_argument(
        "--output", type=Path, default=Path("curve.png"), help="the PNG to write (default: %(default)s)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
