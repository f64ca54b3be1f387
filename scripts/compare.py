"""Compare optimizers, with significance and cost: the command `lion-compare`; `--help` explains it."""

import sys

from lion_lightning.commands.compare import main

if __name__ == "__main__":
    sys.exit(main())
