"""Time of an optimizer step, beside every peer that imports, and what survives of it in bf16.

    python scripts/bench/bench_step.py --model bert_base --repeats 7 --output outputs/bench
    python scripts/bench/bench_step.py --modes fp32 bf16/32 --only Lion AdamW

Everything runs in one process; each repeat measures all optimizers in turn. The streaming limit, three arrays read and
two written in place, is measured in every repeat. Missing peers are named and skipped: pip install .[bench]
"""

import argparse
import datetime
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for the modules beside this one

from scripts.bench import bench_measure, bench_peers, bench_report
from scripts.bench.bench_hardware import hardware
from scripts.bench.bench_models import MODELS


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bert_base", choices=list(MODELS), help="whose parameter shapes (bert_base)")
    parser.add_argument("--repeats", type=_positive, default=7, help="rounds over all optimizers (7)")
    parser.add_argument("--steps", type=_positive, default=3, help="timed steps a round, of which the best counts (3)")
    parser.add_argument("--modes", nargs="+", metavar="MODE", help=f"our modes: {', '.join(bench_peers.MODES)}")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="optimizers whose name contains one of these")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for NAME.md, NAME.json and NAME.png")
    parser.add_argument("--name", default="bench", help="name of the files (bench)")
    parser.add_argument("--note", action="append", default=[], help="a sentence for the report; may be repeated")
    options = parser.parse_args(argv)
    unknown = sorted(set(options.modes or ()) - set(bench_peers.MODES))
    if unknown:
        parser.error(f"--modes {unknown[0]!r} is not allowed: use {', '.join(bench_peers.MODES)}")
    return options


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: use a whole number above 0")
    return int(text)


def chosen(options: argparse.Namespace, device: torch.device) -> list[bench_peers.Subject]:
    """The subjects asked for; fused AdamW is always among them, as the yardstick."""
    subjects = [*bench_peers.ours(device), *bench_peers.torch_own(), *bench_peers.peers(device)]
    if options.modes:
        subjects = [s for s in subjects if s.family != "lion_lightning" or s.mode in options.modes]
    if options.only:
        wanted = [name.lower() for name in options.only]
        subjects = [s for s in subjects if "AdamW fused" in s.name or any(name in s.name.lower() for name in wanted)]
    return subjects


def load_average() -> str:
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    device, console = torch.device(options.device), Console()
    arena = bench_measure.Arena(MODELS[options.model](), device)
    load_before = load_average()
    with console.status("making parameters") as status:
        measured = bench_measure.run(chosen(options, device), arena, options.repeats, options.steps, status.update)
    results, limits = measured
    done = [result for result in results if result.error is None]
    entries = [bench_report.figures(result, done, arena.count, limits) for result in done]
    way, limit = bench_report.streaming_limit(limits)
    about: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "scripts/bench/bench_step.py", *(sys.argv[1:] if argv is None else argv)]),
        "model": options.model,
        "parameters": arena.count,
        "hardware": hardware(device),
        "load_average": f"{load_before} before, {load_average()} after",
        "streaming_limit_gb_per_second": limit,
        "streaming_limit_way": way,
        "repeats": options.repeats,
        "versions": bench_peers.versions(),
        "notes": options.note,
    }
    report(options, about, entries, results, console)
    return 0


def report(
    options: argparse.Namespace,
    about: dict[str, Any],
    entries: list[dict[str, Any]],
    results: list[bench_measure.Result],
    console: Console,
) -> None:
    """Prints the tables and writes the files."""
    title = f"A step of {about['model']} ({about['parameters'] / 1e6:.1f} M parameters)"
    skipped = {f"{result.subject.name}: {result.error}": None for result in results if result.error is not None}
    notes = [
        f"{about['date']}, {about['hardware']}",
        f"`{about['command']}`",
        ", ".join(f"{name} {version}" for name, version in about["versions"].items()),
        f"Streaming limit {about['streaming_limit_gb_per_second']:.1f} GB/s ({about['streaming_limit_way']})",
        f"Load average {about['load_average']}; {about['repeats']} rounds",
        *about["notes"],
        *(f"Skipped: {reason}" for reason in skipped),
    ]
    console.print(title)
    bench_report.terminal(entries, notes, console)
    if options.output is None:
        return
    options.output.mkdir(parents=True, exist_ok=True)
    picture = options.output / f"{options.name}.png"
    try:
        bench_report.chart(entries, title, picture)
    except ModuleNotFoundError:
        console.print("No chart: matplotlib is not installed (pip install .[report])")
    markdown = bench_report.markdown(entries, notes, title, picture.name if picture.exists() else None)
    (options.output / f"{options.name}.md").write_text(markdown)
    bench_report.write_json(options.output / f"{options.name}.json", entries, about, results)


if __name__ == "__main__":
    sys.exit(main())
