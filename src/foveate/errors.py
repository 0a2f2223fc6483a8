"""The one exception that Foveate raises for bad input."""


class FoveateError(Exception):
    """Bad input: the message names the thing, its value and the way out. The command line prints it and exits with code 2."""
