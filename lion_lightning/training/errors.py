"""The one exception that means: the run was asked for something that cannot be, and the message says what can."""


class ConfigError(ValueError):
    """A setting that cannot work. The message is one line: the setting, its value, and what is allowed.

    The door (`lion_lightning/__main__.py`) prints it without a traceback and exits with status 2.
    """
