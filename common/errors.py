"""The one exception that means "the input is wrong", told apart from a defect of the program."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class UserError(Exception):
    """Bad input: a flag, file or folder the program cannot work with.

    Each argument is one problem, a paragraph that names the flag or file, what was expected and what came. The entry scripts print
    them without a traceback and exit with status 2.
    """

    def __str__(self) -> str:
        if len(self.args) == 1:
            return str(self.args[0])
        return "\n".join([f"{len(self.args)} problems:", *(f"  {problem}" for problem in self.args)])


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
            self.found.extend(error.args)

    def report(self) -> None:
        """Raise one `UserError` for all that was found, if any was."""
        if self.found:
            raise UserError(*dict.fromkeys(self.found))


@contextmanager
def blame(flag: str) -> Iterator[None]:
    """Put the flag, or the file's line, that an input came from before each problem of a `UserError`."""
    try:
        yield
    except UserError as error:
        raise UserError(*(f"{flag}: {problem}" for problem in error.args)) from error


@contextmanager
def blame_arguments(flags: Mapping[str, str]) -> Iterator[None]:
    """Put the flag for the argument that a problem of a `UserError` begins with; `flags`: argument → flag."""
    try:
        yield
    except UserError as error:
        parts = [str(problem).partition(":") for problem in error.args]
        raise UserError(*(flags.get(name, name) + colon + rest for name, colon, rest in parts)) from error


def cause_of(error: BaseException) -> str:
    """One line: the system's words where a failing file is at the bottom of it, else the error's first line.

    torch.save answers a failed write with a RuntimeError about file positions; the cause is behind it.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    lines = str(getattr(cause, "strerror", None) or cause or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def describe(error: BaseException) -> str:
    """Kind and first sentence of an error; PyTorch's begin with the place in its source."""
    lines = re.sub(r"^\[[^]]*\]\s*", "", str(error).strip()).splitlines()
    return f"{type(error).__name__}: {lines[0].split('. ')[0]}" if lines else type(error).__name__
