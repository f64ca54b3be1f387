"""The same search for every optimizer: the command `lion-tune`; `--help` explains it."""

import sys

from lion_lightning.commands.tune import main

if __name__ == "__main__":
    sys.exit(main())
