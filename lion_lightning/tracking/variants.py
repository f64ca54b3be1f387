"""What is compared with what: runs sorted into variants of one experiment, and the reason where they are not one."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lion_lightning.tracking.runs import Run

# What may differ between the things compared ...
COMPARED = ("optim", "schedule", "guard")
# ... and what says nothing about the result: names, places, how often something is logged.
BESIDE_THE_POINT = (
    "seed", "data.seed", "run_dir", "run_name", "group", "resume", "export", "logger", "data.cache_dir",
    "data.num_workers", "trainer.log_every_n_steps", "trainer.name", "debug", "checkpoint", "guard.trace",
)  # fmt: skip
YARDSTICK = "data/unigram_entropy"
SHOWN_DIFFERENCES = 6
SHOWN_RUNS = 3


class Incomparable(ValueError):
    """Runs that make no fair comparison. The message says in what they differ, and what can be done."""


@dataclass(frozen=True)
class Variant:
    """The runs of one setting, which differ in their seed alone.

    Attributes:
        label: the optimizer, and what else tells it from the others.
        counted: finished runs, one a seed.
        others: runs that are shown but do not count: running, crashed, failed.
    """

    label: str
    counted: list[Run] = field(default_factory=list)
    others: list[Run] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        return self.counted + self.others


def check_alike(runs: Sequence[Run], by: Sequence[str] = (), aside: Sequence[str] = ()) -> None:
    """Raise Incomparable unless the runs differ only in optimizer, schedule, guard, seed, `by` and `aside`."""
    groups = sorted({run.group for run in runs})
    if len(groups) > 1 and not by:
        counts = [f"{group or 'no group'} ({sum(run.group == group for run in runs)} runs)" for group in groups]
        raise Incomparable(
            f"the runs belong to {len(groups)} groups: {'; '.join(counts)}. Name one with --group, compare each for "
            "itself with --each-group, say what is compared with --by, or mix them with --unlike"
        )
    unlike = _differences(runs, (*COMPARED, *by, *aside))
    if unlike:
        shown = "; ".join(f"{key} is {_values(values)}" for key, values in list(unlike.items())[:SHOWN_DIFFERENCES])
        more = f"; and {len(unlike) - SHOWN_DIFFERENCES} more keys" if len(unlike) > SHOWN_DIFFERENCES else ""
        raise Incomparable(
            f"the runs differ in more than optimizer and seed: {shown}{more}. "
            "If that is what you compare, name the keys with --by; to mix them all the same, --unlike"
        )
    entropies = {round(value, 6) for run in runs if (value := run.last(YARDSTICK)) is not None}
    if len(entropies) > 1:
        raise Incomparable(
            f"the validation texts differ: unigram entropy {', '.join(map(str, sorted(entropies)))} nats (python_docs "
            "differs between Python versions). To compare all the same, --unlike"
        )


def sort_into_variants(
    runs: Sequence[Run], by: Sequence[str] = (), aside: Sequence[str] = ()
) -> tuple[list[Variant], list[str]]:
    """Variants in the order of their first run, and remarks on runs that were joined or left out."""
    members: dict[str, list[Run]] = {}
    for run, label in zip(runs, variant_labels(runs, by, aside), strict=True):
        members.setdefault(label, []).append(run)
    remarks: list[str] = []
    variants = [_variant(label, runs, remarks) for label, runs in members.items()]
    return variants, remarks


def variant_labels(runs: Sequence[Run], by: Sequence[str] = (), aside: Sequence[str] = ()) -> list[str]:
    """For each run its optimizer's name, with the settings that tell its runs apart; the keys of `by` always."""
    names = [str(run.setting("optim.name") or run.setting("optimizer") or run.name) for run in runs]
    settings = [
        {key: value for key, value in _flat(run, COMPARED, by).items() if not _is_below(key, aside)} for run in runs
    ]
    labels = []
    for name, own in zip(names, settings, strict=True):
        same_name = [other for other_name, other in zip(names, settings, strict=True) if other_name == name]
        differing = [key for key in own if key not in by and any(other.get(key) != own[key] for other in same_name)]
        told = [f"{_short(key)} {_value(own.get(key))}" for key in (*differing, *by) if key != "optim.name"]
        labels.append(f"{name} ({', '.join(told)})" if told else name)
    return labels


def _variant(label: str, runs: list[Run], remarks: list[str]) -> Variant:
    by_seed: dict[Any, list[Run]] = {}
    for number, run in enumerate(sorted(runs, key=lambda run: run.created)):
        by_seed.setdefault(("no seed", number) if run.seed is None else run.seed, []).append(run)
    variant = Variant(label)
    for seed, tries in by_seed.items():
        last, joined = _of_one_seed(tries)
        (variant.counted if last.state == "finished" else variant.others).append(last)
        if len(tries) > 1:
            what = "the last goes on from the one before" if joined else "the newest finished one counts"
            remarks.append(f"{label}, seed {seed}: {len(tries)} runs; {what}")
    if any(run.seed is None for run in runs):
        remarks.append(f"{label}: no `seed` in the configuration; each of its {len(runs)} runs counts as one")
    return variant


def _of_one_seed(tries: list[Run]) -> tuple[Run, bool]:
    """The run that counts for a seed, the newest finished one or else the newest, and whether it was joined to its
    first part, which it has if it was resumed offline."""
    finished = [run for run in tries if run.state == "finished"]
    last = finished[-1] if finished else tries[-1]
    earlier = [run for run in tries if run.created < last.created and run.history]
    if last.setting("resume") is None or not earlier or not last.history:
        return last, False
    first = earlier[-1]
    start = min(row.get("trainer/global_step", 0) for row in last.history)
    kept = [row for row in first.history if row.get("trainer/global_step", 0) < start]
    if not kept:  # `resume=auto` that found nothing to go on from
        return last, False
    spent = max((row.get("perf/seconds", 0.0) for row in kept), default=0.0)
    shifted = [
        {**row, "perf/seconds": row["perf/seconds"] + spent} if "perf/seconds" in row else row for row in last.history
    ]
    return replace(last, history=[*kept, *shifted]), True


def _flat(run: Run, kept: Collection[str] = (), by: Sequence[str] = ()) -> dict[str, str]:
    """By dotted keys: the configuration below `kept` (all of it where that is empty), and the keys of `by`."""
    flat = dict(_leaves(run.config))
    if kept:
        flat = {key: value for key, value in flat.items() if _is_below(key, kept)}
    flat = {key: value for key, value in flat.items() if not _is_below(key, BESIDE_THE_POINT)}
    return {**flat, **{key: run.setting(key) for key in by}}


def _differences(runs: Sequence[Run], ignored: Collection[str]) -> dict[str, dict[str, list[Run]]]:
    """For each key outside `ignored` that differs: its values and who has them."""
    settings = [_flat(run) for run in runs]
    keys = sorted({key for one in settings for key in one if not _is_below(key, ignored)})
    found: dict[str, dict[str, list[Run]]] = {}
    for key in keys:
        values: dict[str, list[Run]] = {}
        for run, one in zip(runs, settings, strict=True):
            values.setdefault(_value(one[key]) if key in one else "missing", []).append(run)
        if len(values) > 1:
            found[key] = values
    return found


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_below(key: str, prefixes: Collection[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _values(values: Mapping[str, list[Run]]) -> str:
    def owners(runs: list[Run]) -> str:
        names = sorted({run.name for run in runs})
        return ", ".join(names[:SHOWN_RUNS]) + (", ..." if len(names) > SHOWN_RUNS else "")

    return " and ".join(f"{value} ({owners(runs)})" for value, runs in values.items())


def _short(key: str) -> str:
    group, _, rest = key.partition(".")
    return rest if group in ("optim", "data", "trainer") and rest != "name" else key


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "/".join(_value(part) for part in value)
    return value if isinstance(value, str) else json.dumps(value)
