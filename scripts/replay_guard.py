"""What the guard would have seen under other thresholds: the command `lion-replay-guard`; `--help` explains it."""

import sys

from lion_lightning.commands.replay_guard import main

if __name__ == "__main__":
    sys.exit(main())
