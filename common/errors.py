"""The one exception that means "the input is wrong", told apart from a defect of the program."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: a flag, file or folder the program cannot work with.

    The message is one paragraph that names the flag or file, what was expected and what came. The entry scripts print it
    without a traceback and end with exit status 2.
    """
