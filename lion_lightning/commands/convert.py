"""Turns the optimizer state of another Lion into one that `lion_lightning.Lion` loads.

    lion-convert optimizer.pt lion.pt
    lion-convert last.ckpt lion.pt --from optimi --model model.pt

IN is a file of torch.save: the optimizer's state_dict(), or a checkpoint that holds it under optimizer_states,
optimizer_state_dict, optimizer or optim. OUT is for `optimizer.load_state_dict(torch.load(OUT, weights_only=True))`.

Order: an optimizer's state knows its parameters by position. Build Lion over the same parameters in the same order and
groups as the optimizer that saved IN; `model.parameters()` in both is the usual case.

--model is needed where the state holds what bf16 weights cannot (optimi's Kahan sum, FlashLion's error bits), and
checks shapes everywhere else. Its tensors are taken in order, tied ones once and buffers of integers left out; where
that is not the optimizer's order, name the parameters in order with --names.

Files are read with weights_only=True and nothing is downloaded. Exit codes: 0 done, 1 the checkpoint does not fit or
cannot be read, 2 wrong arguments.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lion_lightning.optim.import_state import SOURCES, converted, optimizer_state, read, source_of

MODEL_CONTAINERS = ("state_dict", "model_state_dict", "model", "module")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    description, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", metavar="IN", type=Path, help="checkpoint with the other optimizer's state")
    parser.add_argument("output", metavar="OUT", type=Path, help="file to write; must not exist without --force")
    parser.add_argument("--from", dest="source", default="auto", choices=("auto", *SOURCES), help="who saved IN")
    parser.add_argument("--model", metavar="FILE", type=Path, help="weights of the model at that step (a state_dict)")
    parser.add_argument(
        "--names", metavar="A,B,...", help="names in --model in the optimizer's order; @FILE, one a line"
    )
    parser.add_argument(
        "--drop-compensation", action="store_true", help="go on from the bf16 weights alone; needs no --model"
    )
    parser.add_argument(
        "--no-hyperparameters", action="store_true", help="leave lr, betas and decay to the new optimizer"
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    return parser.parse_args(argv)


def model_weights(path: Path, names: str | None) -> list[Tensor]:
    """The weights in a model's file, in the order of the optimizer."""
    found = read(path)
    for key in MODEL_CONTAINERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    tensors = {name: value for name, value in dict(found).items() if isinstance(value, Tensor)}
    if names is None:
        floating = [value for value in tensors.values() if value.is_floating_point()]
        return list({(value.data_ptr(), value.shape): value for value in floating}.values())
    wanted = Path(names[1:]).read_text().split() if names.startswith("@") else names.split(",")
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise ValueError(f"--names {missing[0]!r} is not in {path}; it has {', '.join(list(tensors)[:5])} ...")
    return [tensors[name] for name in wanted]


def convert(options: argparse.Namespace) -> str:
    """Reads, converts and writes; returns what to tell the user."""
    if options.output.exists() and not options.force:
        raise ValueError(f"OUT={str(options.output)!r} exists: use another name, or --force")
    state = optimizer_state(read(options.input))
    source = source_of(state) if options.source == "auto" else options.source
    weights = None if options.model is None else model_weights(options.model, options.names)
    fresh = converted(
        state,
        weights,
        source,
        hyperparameters=not options.no_hyperparameters,
        drop_compensation=options.drop_compensation,
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.output.with_name(f".writing-{options.output.name}")
    try:
        with open(temporary, "wb") as file:
            torch.save(fresh, file)
        os.replace(temporary, options.output)
    finally:
        temporary.unlink(missing_ok=True)
    groups = fresh["param_groups"]
    remainders = sum("weight_remainder" in entry for entry in fresh["state"].values())
    return (
        f"{source}: momentum of {len(fresh['state'])} parameters in {len(groups)} groups, {remainders} with the lower "
        f"bits of a bf16 weight, {groups[0].get('step', 0) if groups else 0} steps -> {options.output}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    try:
        print(convert(options))
    except (ValueError, OSError, RuntimeError) as error:  # the last of torch, where it cannot write
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
