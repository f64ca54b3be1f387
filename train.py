"""The command line of every recipe: `python train.py recipe=bert_mlm optim=lion`; `python train.py --help` explains it.

The configuration is in conf/, what runs is `lion_lightning.training.run`. An installed package has the same command
line as `lion-train` and as `python -m lion_lightning`.
"""

from lion_lightning.__main__ import main

if __name__ == "__main__":
    main()
