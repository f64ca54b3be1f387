"""The door to every recipe: `python train.py recipe=bert_mlm optim=lion`, and `python train.py --help` for the rest.

The configuration lies in conf/, what runs is `lion_lightning.training.run`. The same door opens as `lion-train` and as
`python -m lion_lightning` where the package is installed.
"""

from lion_lightning.__main__ import main

if __name__ == "__main__":
    main()
