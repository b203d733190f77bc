"""Errors for people: what was wrong, where, what is allowed."""


class ConfigError(ValueError):
    """A setting the user gave is wrong. The message is one sentence ready to print."""


class UnsupportedModelError(ValueError):
    """The model or the server options rule compression out.

    The message is one sentence that ends with the option to change.
    """
