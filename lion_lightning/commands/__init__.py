"""The commands beside `lion-train`, a module each; the scripts of the same names call them."""

import importlib.util
import sys


def run_tune() -> int:
    """`lion-tune`, whose libraries are an extra."""
    missing = [name for name in ("optuna", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: {missing[0]} is not installed; pip install 'lion-lightning[tune]'", file=sys.stderr)
        return 2
    from lion_lightning.commands.tune import main

    return main()
