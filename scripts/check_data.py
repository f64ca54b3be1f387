"""What training would read of some data: the command `lion-check-data`; `--help` explains it."""

import sys

from lion_lightning.commands.check_data import main

if __name__ == "__main__":
    sys.exit(main())
