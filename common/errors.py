"""The one exception that means "the input is wrong", told apart from a defect of the program."""

from __future__ import annotations

import re


class UserError(Exception):
    """Bad input: a flag, file or folder the program cannot work with.

    The message is one paragraph that names the flag or file, what was expected and what came. The entry scripts print it
    without a traceback and end with exit status 2.
    """


def describe(error: BaseException) -> str:
    """Kind and first sentence of an error; PyTorch's begin with the place in its source."""
    lines = re.sub(r"^\[[^]]*\]\s*", "", str(error).strip()).splitlines()
    return f"{type(error).__name__}: {lines[0].split('. ')[0]}" if lines else type(error).__name__
