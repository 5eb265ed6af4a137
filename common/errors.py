"""The one exception that means "the input is wrong", as opposed to a defect of the program."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class UserError(Exception):
    """Bad input: a flag, file or folder that the program cannot work with.

    Each argument describes one problem: the flag or file, what was expected and what came. The entry scripts print the problems
    without a traceback and exit with status 2.
    """

    def __str__(self) -> str:
        if len(self.args) == 1:
            return str(self.args[0])
        return "\n".join([f"{len(self.args)} problems:", *(f"  {problem}" for problem in self.args)])


class Problems:
    """Problems found in several places of the input, to be reported together."""

    def __init__(self) -> None:
        self.found: list[str] = []

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Collect a `UserError` for `report` instead of raising it."""
        try:
            yield
        except UserError as error:
            self.found.extend(error.args)

    def report(self) -> None:
        """Raise one `UserError` with all problems found, if there are any."""
        if self.found:
            raise UserError(*dict.fromkeys(self.found))


@contextmanager
def blame(flag: str) -> Iterator[None]:
    """Prefix each problem of a `UserError` with the flag, or the file's line, that the input came from."""
    try:
        yield
    except UserError as error:
        raise UserError(*(f"{flag}: {problem}" for problem in error.args)) from error


@contextmanager
def blame_arguments(flags: Mapping[str, str]) -> Iterator[None]:
    """Replace the argument name at the start of each problem of a `UserError` by its flag; `flags`: argument → flag."""
    try:
        yield
    except UserError as error:
        parts = [str(problem).partition(":") for problem in error.args]
        raise UserError(*(flags.get(name, name) + colon + rest for name, colon, rest in parts)) from error


def cause_of(error: BaseException) -> str:
    """Return one line: the system's message if a failing file caused the error, else the error's first line.

    torch.save reports a failed write as a RuntimeError about file positions; the actual cause is in its context.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    lines = str(getattr(cause, "strerror", None) or cause or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def describe(error: BaseException) -> str:
    """Return the type and first sentence of an error, without the source location that begins PyTorch's messages."""
    lines = re.sub(r"^\[[^]]*\]\s*", "", str(error).strip()).splitlines()
    return f"{type(error).__name__}: {lines[0].split('. ')[0]}" if lines else type(error).__name__
