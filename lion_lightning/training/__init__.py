"""Training runs. Importing the package registers the resolvers that the configuration in `conf/` uses."""

from lion_lightning.training.run_stamp import register

register()
