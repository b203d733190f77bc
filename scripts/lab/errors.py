"""What ends a run of the lab with a sentence."""


class RunError(Exception):
    """Something a person can read and act on."""
