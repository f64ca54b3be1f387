"""Secrets on the command line of a sweep, handed to its jobs in the environment.

Hydra keeps every override of a sweep in `multirun.yaml`, and submitit in the file of each job. What they keep of a
secret is `${oc.env:NAME}`; the jobs inherit the environment.
"""

import json
import os
import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from lion_lightning.errors import ConfigError
from lion_lightning.training.redaction import HIDDEN, redacted_argument

VARIABLE = "LION_LIGHTNING_SECRET_{}"
_SWEEP = ("-m", "--multirun", "hydra.mode=MULTIRUN")
_ASSIGNED = re.compile(r"(?P<name>[+~]*[\w./@-]+=)(?P<value>.*)", re.DOTALL)
_INTERPOLATION = re.compile(r"\$\{[^{}]*\}")


def is_sweep(arguments: Sequence[str]) -> bool:
    """Whether a command line asks Hydra for several runs."""
    return any(argument in _SWEEP for argument in arguments)


def carried_in_environment(arguments: Sequence[str]) -> list[str]:
    """`arguments` with an interpolation in place of each secret, which is in this process's environment from now on.

    Raises:
        ConfigError: a choice between secrets, or one in a mapping or beside an interpolation.
    """
    return [_carried(argument, number) for number, argument in enumerate(arguments)]


def _carried(argument: str, number: int) -> str:
    found = _ASSIGNED.fullmatch(argument)
    if found is None or redacted_argument(argument) == argument:
        return argument
    name, value = found["name"], found["value"]
    if not _INTERPOLATION.sub("", value).strip(" ,'\"[]"):
        return argument  # it is in the environment already
    try:
        parsed = OverridesParser.create().parse_override(argument)
    except OverrideParseException:
        return argument  # Hydra will say what is wrong with it, and keep nothing
    if parsed.is_sweep_override() or "{" in value:
        raise ConfigError(
            f"{name}{HIDDEN}: a sweep would keep the secrets in multirun.yaml; put each in an environment variable "
            f"and write {name}'${{oc.env:NAME}}'"
        )
    kept, variable = parsed.value(), VARIABLE.format(number)
    os.environ[variable] = kept if isinstance(kept, str) else json.dumps(kept)
    value = f"${{oc.env:{variable}}}"
    return name + (value if isinstance(kept, str) else f"'${{oc.decode:{value}}}'")
