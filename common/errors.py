"""The one exception that means "the input is wrong", told apart from a defect of the program."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Bad input: a flag, file or folder the program cannot work with.

    The message is one paragraph that names the flag or file, what was expected and what came; or one line for each of several
    problems. The entry scripts print it without a traceback and exit with status 2.
    """


class Problems:
    """Bad input found in several places, to be reported together."""

    def __init__(self) -> None:
        self.found: list[str] = []

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Keep a `UserError` for `report`."""
        try:
            yield
        except UserError as error:
            self.found.append(str(error))

    def report(self) -> None:
        """Raise one `UserError` for all that was found, if any was."""
        if len(self.found) > 1:
            raise UserError("\n".join([f"{len(self.found)} problems:", *(f"  {text}" for text in self.found)]))
        if self.found:
            raise UserError(self.found[0])


@contextmanager
def blame(flag: str) -> Iterator[None]:
    """Put the flag, or the file's line, that an input came from before the message of its `UserError`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error


def describe(error: BaseException) -> str:
    """Kind and first sentence of an error; PyTorch's begin with the place in its source."""
    lines = re.sub(r"^\[[^]]*\]\s*", "", str(error).strip()).splitlines()
    return f"{type(error).__name__}: {lines[0].split('. ')[0]}" if lines else type(error).__name__
