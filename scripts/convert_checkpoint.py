"""Convert the optimizer state of another Lion: the command `lion-convert`; `--help` explains it."""

import sys

from lion_lightning.commands.convert import main

if __name__ == "__main__":
    sys.exit(main())
