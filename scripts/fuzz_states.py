"""Gives Lion random states, dtypes, shapes and orders of calls, each case in a process of its own.

    python scripts/fuzz_states.py --cases 2000 --seed 1 --out fuzz.jsonl

What a state means is written down here a second time (`meaning`): a state with a meaning must be stepped exactly, held
to float64; one without must be refused by a ValueError that leaves the optimizer as it was. A case that crashes, hangs
or does anything else fails, and its number reproduces it (`--only N`). Cases that OUT has already are not run again.
Exit codes: 0 all held, 1 one did not. Needs os.fork.
"""

import argparse
import collections
import copy
import io
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lion_lightning.optim import Lion  # noqa: E402
from tests.optim.exactness import assert_step_is_exact, kept, record  # noqa: E402

LIMIT_SECONDS = 60
ACTIONS_PER_CASE = 6
SHAPES = [
    (),
    (1,),
    (0,),
    (7,),
    (255,),
    (257,),
    (4095,),
    (4096,),
    (65, 64),
    (33, 257),
    (3, 5, 7),
    (2, 3, 4, 300),
    (300, 1),
    (1, 5000),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
MOMENTA = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool]
OPTIONS: dict[str, list[Any]] = {
    "weight_bits": [32, 24, 16],
    "momentum_dtype": [None, "float32", "bfloat16", "int8"],
    "fused": [None, False],
    "seed": [0, 2**64 - 1],
    "weight_decay": [0.0, 0.1],
}
WRONG_OPTIONS: dict[str, list[Any]] = {
    "lr": [-1.0, float("nan"), "x", None],
    "betas": [(0.9,), 3, (1.0, 0.9)],
    "weight_bits": [8, None],
    "momentum_dtype": ["int4", torch.float16],
    "step": [-1, 0.5, "1"],
    "seed": [-1, 0.5],
}


def meaning(param: Tensor, entry: dict[str, Any], weight_bits: int) -> tuple[Tensor, Tensor] | None:
    """The float64 weight and momentum that a state stands for; None where it has no meaning."""
    if param.dtype not in DTYPES:
        return None
    for key, value in entry.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type == "meta":
            return None
        if key != "exp_avg_scale" and value.shape != param.shape:
            return None
    exp_avg, scale, remainder = (entry.get(key) for key in ("exp_avg", "exp_avg_scale", "weight_remainder"))
    if scale is not None and (exp_avg is None or exp_avg.dtype != torch.int8):
        return None
    if exp_avg is not None and exp_avg.dtype == torch.int8:
        blocks = -(-param.numel() // 256)
        if scale is None or scale.shape != (blocks,) or not scale.is_floating_point() or scale.dtype == torch.float16:
            return None
    elif exp_avg is not None and exp_avg.dtype not in MOMENTA:
        return None
    if remainder is not None:
        if param.dtype != torch.bfloat16 or remainder.dtype not in (torch.int16, torch.int8):
            return None
        if weight_bits == 16:
            entry = {key: value for key, value in entry.items() if key != "weight_remainder"}
        elif weight_bits == 24 and remainder.dtype == torch.int16:
            entry = {**entry, "weight_remainder": remainder >> 8 << 8}
    return kept(param, entry)


class Case:
    """One optimizer over two parameters, and what happens to it."""

    def __init__(self, number: int) -> None:
        self.random = random.Random(number)
        self.generator = torch.Generator().manual_seed(number)
        dtype = self.random.choice(DTYPES)
        self.params = [nn.Parameter(self.numbers(self.random.choice(SHAPES), dtype)) for _ in range(2)]
        options = {name: self.random.choice(values) for name, values in OPTIONS.items()}
        self.optimizer = Lion(self.params, lr=1e-3, **options)
        self.counts: collections.Counter[str] = collections.Counter()

    def numbers(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Random numbers of the size of weights."""
        return (torch.randn(tuple(shape), generator=self.generator) * 0.05).to(dtype)

    def run(self) -> dict[str, int]:
        """All actions; returns how many ended in which way."""
        self.step()
        for _ in range(ACTIONS_PER_CASE):
            self.random.choice(
                [self.tamper, self.tamper, self.load, self.load, self.change, self.set_option, self.reload]
            )()
        return dict(self.counts)

    def step(self) -> None:
        """A step that must be exact, or be refused where the state of the second parameter means nothing."""
        first, param = self.params
        entry, group = self.optimizer.state.get(param, {}), self.optimizer.param_groups[0]
        meant = meaning(param, entry, group["weight_bits"])
        grad = self.numbers(param.shape, param.dtype)
        if meant is not None:
            assert_step_is_exact(self.optimizer, param, grad, *meant, others=(first,))
            self.counts["exact"] += 1
            return
        first.grad, param.grad = torch.ones_like(first), grad
        self.refused(self.optimizer.step)
        param.grad = None
        if param.dtype not in DTYPES:
            param.data = param.data.float()
        self.optimizer.state.pop(param, None)

    def refused(self, action: Callable[[], Any]) -> None:
        """Calls what must raise a ValueError and change nothing."""
        before = record(self.optimizer)
        try:
            action()
        except ValueError:
            assert record(self.optimizer) == before, "a refusal changed the optimizer"
            self.counts["refused"] += 1
            return
        raise AssertionError("a state without a meaning was accepted")

    def tampered(self, entry: dict[str, Any]) -> None:
        """Changes one tensor of a state."""
        choice = self.random.choice
        key = choice(["exp_avg", "exp_avg", "exp_avg_scale", "weight_remainder"])
        value = entry.get(key)
        if value is None:
            blocks = -(-self.params[1].numel() // 256)
            made = {
                "exp_avg": lambda: self.numbers(self.params[1].shape, choice(MOMENTA)),
                "exp_avg_scale": lambda: torch.full((blocks,), 1e-4),
                "weight_remainder": lambda: torch.zeros(self.params[1].shape, dtype=choice([torch.int16, torch.int8])),
            }
            entry[key] = made[key]()
            return
        shape = choice(
            [(), (0,), (1,), tuple(value.shape)[1:], (*value.shape, 1), (5, *value.shape), (10,), (value.numel() + 1,)]
        )
        edits: list[Callable[[], Any]] = [
            lambda: value.to(choice([*MOMENTA, *INTEGERS, torch.complex64])),
            lambda: value.to(choice(MOMENTA)),
            lambda: torch.zeros(shape, dtype=value.dtype),
            lambda: torch.stack([value, value], -1)[..., 0],
            lambda: choice([value.tolist(), None, 0.5, "x", value.to("meta"), value.to_sparse()]),
            lambda: value.flip(0) if value.ndim and key != "exp_avg_scale" else value,
        ]
        if key != "exp_avg_scale" and value.dtype != torch.int8 and value.ndim == 2:
            edits.append(lambda: value.t().contiguous().t())
        if self.random.random() < 0.15:
            del entry[key]
        else:
            entry[key] = choice(edits)()

    def tamper(self) -> None:
        """Somebody writes to `optimizer.state`."""
        self.tampered(self.optimizer.state[self.params[1]])
        self.step()

    def load(self) -> None:
        """Loads a state dict with a changed tensor or option."""
        saved = copy.deepcopy(self.optimizer.state_dict())
        wrong_option = self.random.random() < 0.2
        if wrong_option:
            name = self.random.choice(list(WRONG_OPTIONS))
            saved["param_groups"][0][name] = self.random.choice(WRONG_OPTIONS[name])
        else:
            self.tampered(saved["state"].setdefault(1, {}))
        meant = meaning(self.params[1], saved["state"].get(1, {}), saved["param_groups"][0]["weight_bits"])
        if wrong_option or meant is None:
            self.refused(lambda: self.optimizer.load_state_dict(saved))
        else:
            self.optimizer.load_state_dict(saved)
        self.step()

    def change(self) -> None:
        """Another dtype for the parameter."""
        param = self.params[1]
        param.grad = None
        param.data = param.data.to(self.random.choice([*DTYPES, torch.float16]))
        self.step()

    def set_option(self) -> None:
        """Another option in the middle of the run."""
        name = self.random.choice(list(OPTIONS))
        value = self.random.choice(OPTIONS[name])
        self.optimizer.param_groups[0][name] = value
        self.step()

    def reload(self) -> None:
        """Through a file and into a new optimizer."""
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        group = self.optimizer.param_groups[0]
        self.optimizer = Lion(self.params, fused=group["fused"])
        self.optimizer.load_state_dict(torch.load(file, weights_only=True))
        self.step()


def run_case(number: int) -> dict[str, Any]:
    """Runs one case in a forked child.

    Returns:
        Its number with the counts of `exact` and `refused`, or with `failed` and the reason.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.alarm(LIMIT_SECONDS)
        try:
            report: dict[str, Any] = Case(number).run()
        except BaseException:
            report = {"failed": traceback.format_exc()[-3000:]}
        os.write(writer, json.dumps(report).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"case": number, **(json.loads(text) if code == 0 and text else {"failed": f"died with {code}"})}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--cases", type=int, default=2000, help="how many")
    parser.add_argument("--seed", type=int, default=1, help="cases are numbered from seed * 1,000,000 on")
    parser.add_argument("--only", type=int, help="run this case alone, in this process")
    parser.add_argument("--out", type=Path, default=Path("fuzz_states.jsonl"), help="results, one a line")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    if arguments.only is not None:
        print(Case(arguments.only).run())
        return 0
    warm = Lion([nn.Parameter(torch.ones(2))])
    warm.load_state_dict(warm.state_dict())  # imports what a first step needs, before the forks
    warm.step()
    lines = arguments.out.read_text().splitlines() if arguments.out.exists() else []
    results = {result["case"]: result for result in map(json.loads, lines)}
    numbers = range(arguments.seed * 1_000_000, arguments.seed * 1_000_000 + arguments.cases)
    with arguments.out.open("a") as file:
        for number in numbers:
            if number not in results:
                results[number] = run_case(number)
                print(json.dumps(results[number]), file=file, flush=True)
    ran = [results[number] for number in numbers]
    failed = [result for result in ran if "failed" in result]
    exact, refused = (sum(result.get(kind, 0) for result in ran) for kind in ("exact", "refused"))
    print(f"seed {arguments.seed}: {len(ran)} cases, {exact} exact steps, {refused} refusals, {len(failed)} failed")
    for result in failed[:10]:
        print(f"case {result['case']}: {result['failed']}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
